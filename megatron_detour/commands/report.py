"""`megatron-detour report`: a run's page, written again from its folder."""

from __future__ import annotations

from pathlib import Path

from megatron_detour.observe.report import as_text, write_report


def run(folder: str) -> int:
    page = write_report(Path(folder))
    print(f"{as_text(Path(folder))}\n\nreport   {page}")
    return 0
