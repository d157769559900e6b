"""`megatron-detour compare`: runs side by side."""

from __future__ import annotations

from pathlib import Path


def run(folders: list[str], output: str) -> int:
    from megatron_detour.observe.compare import write_comparison

    page, text = write_comparison([Path(folder) for folder in folders], Path(output))
    print(f"{text}\n\npage  {page}")
    return 0
