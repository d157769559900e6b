"""`megatron-detour report`: a run's page, written again from its folder."""

from __future__ import annotations

from pathlib import Path

from megatron_detour.observe.report import write_report


def run(folder: str) -> int:
    print(write_report(Path(folder)))
    return 0
