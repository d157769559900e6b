"""What is kept in the repository and follows from the code; `python -m tests.generated` writes it again."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_detour.config import RunConfig
from megatron_detour.corpus import BuildOptions
from megatron_detour.evaluation.task import Task
from megatron_detour.model.families import FAMILIES
from megatron_detour.settings import flag, json_schema, markdown_table

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "examples/recipes/run.schema.json"


def schema() -> str:
    return json.dumps(json_schema(RunConfig, "run file of megatron-detour"), indent=1) + "\n"


def families() -> str:
    """Each family of encoders and what distinguishes it."""
    rows = [
        "| family | `model_type` | published, for example | split by | output layer | `compute.compile` |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES.values():
        known = ", ".join(name.partition("/")[2] for name in family.published) or "–"
        split = ", ".join(family.split_evenly)
        output = "the embedding's" if "tie_word_embeddings" in family.fixed else "the embedding's, or its own"
        compiled = "yes" if family.compiles else "no"
        rows.append(f"| {family.label} | `{family.model_type}` | {known} | {split} | {output} | {compiled} |")
    return "\n".join(rows)


TABLES = {  # marker -> page, table
    "run-file": ("docs/guide.md", lambda: markdown_table(RunConfig)),
    "task-file": ("docs/tasks.md", lambda: markdown_table(Task)),
    "families": ("docs/families.md", families),
    "build-options": ("docs/data.md", lambda: markdown_table(BuildOptions, flag)),
}


def written(page: Path) -> str:
    """The page with its tables as they follow from the code."""
    text = page.read_text(encoding="utf-8")
    for marker, (name, table) in TABLES.items():
        if ROOT / name == page:
            between = re.compile(rf"(?<=<!-- {marker} -->\n).*?(?=<!-- /{marker} -->)", re.DOTALL)
            text, count = between.subn(lambda _, table=table: f"{table()}\n", text)
            assert count == 1, f"{page}: has the marker {marker} {count} times"
    return text


PAGES = sorted({ROOT / name for name, _ in TABLES.values()})

if __name__ == "__main__":
    SCHEMA.write_text(schema(), encoding="utf-8")
    for page in PAGES:
        page.write_text(written(page), encoding="utf-8")
