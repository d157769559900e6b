"""What a gpu-day showed: measured against modeled, the settings it suggests, and a table for docs/performance.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_detour.ui.tables import Table

CLOSE = 0.02  # settings within this share of the fastest are as good; the first of them is suggested


@dataclass(frozen=True)
class Summary:
    facts: dict[str, Any]
    markdown: str


def summarize(day: dict[str, Any], baseline: dict[str, Any] | None = None) -> Summary:
    """`day` and `baseline` are contents of gpu-day's file."""
    before = {_key(row): row["tokens_per_second"] for row in (_rows(baseline) if baseline else [])}
    rows = _rows(day)
    suggestion = suggest(rows)
    header = ["contender", "model", "objective", "length", "tokens per micro-batch", "attention", "kernels", "tokens/s"]
    header += ["of the roofline", "of a product's", "GiB", *(["of the baseline"] if before else [])]
    table = [
        [
            row["contender"],
            row["size"],
            row["objective"],
            f"{row['sequence_length']:,}",
            f"{row['micro_tokens']:,}",
            row["attention"],
            row["kernels"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / row['roofline']:.0%}" if row.get("roofline") else "",
            f"{row['share_of_matrix_rate']:.1%}",
            f"{row['bytes'] / 2**30:.1f}" if row["bytes"] else "",
            *([_ratio(row, before)] if before else []),
        ]
        for row in rows
    ]
    parts = [
        [name, part["status"], f"{part.get('seconds', 0):.0f}", _remark(part)] for name, part in day["parts"].items()
    ]
    blocks = [Table(["part", "status", "s", ""], parts, align="llrl").markdown()]
    if table:
        blocks.append(Table(header, table, align="lllrrllrrrrr"[: len(header)]).markdown())
    if suggestion:
        blocks.append("Suggested: " + ", ".join(f"`{key}: {value}`" for key, value in suggestion.items()))
    return Summary({"suggested": suggestion}, "\n\n".join(blocks))


def suggest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the attention and kernels of the fastest rows, whether compiled layers were faster than theirs, and the
    smallest micro-batch that is as fast as any."""
    rows = [row for row in rows if row["size"] != "large"]
    compiled = [row["times_as_fast"] for row in rows if row["contender"] == "megatron_detour, compiled"]
    rows = [row for row in rows if row["contender"] == "megatron_detour"]
    if not rows:
        return {}
    best = max(rows, key=lambda row: row["share_of_matrix_rate"])
    sweeps: dict[tuple, list[dict[str, Any]]] = {}  # rows that differ in the micro-batch alone
    for row in rows:
        sweeps.setdefault((row["objective"], row["sequence_length"], row["attention"], row["kernels"]), []).append(row)
    sweep = max(sweeps.values(), key=len)
    fastest = max(row["tokens_per_second"] for row in sweep)
    return {
        "compute.attention": best["attention"],
        "compute.kernels": best["kernels"],
        **({"compute.compile": all(ratio < 1 - CLOSE for ratio in compiled)} if compiled else {}),
        "tokens per micro-batch": min(
            row["micro_tokens"] for row in sweep if row["tokens_per_second"] >= (1 - CLOSE) * fastest
        ),
    }


def _rows(day: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for part in day["parts"].values() for row in part.get("results", {}).get("rows", [])]


def _key(row: dict[str, Any]) -> tuple:
    names = ("size", "contender", "objective", "sequence_length", "micro_tokens", "attention", "kernels")
    return tuple(row[name] for name in names)


def _ratio(row: dict[str, Any], before: dict[tuple, float]) -> str:
    old = before.get(_key(row))
    return f"{row['tokens_per_second'] / old:.2f}" if old else ""


def _remark(part: dict[str, Any]) -> str:
    """Return a part's main figure, or why it has none."""
    results = part.get("results", {})
    if part["status"] in ("failed", "timed out"):
        return (part["output"] or ["no output"])[-1]
    if part["status"] == "skipped":
        return part["why"]
    return results.get("remark", "; ".join(results.get("left_out", [])))
