"""How a corpus was made from its records, in the words of a card, from its manifest."""

from __future__ import annotations

from typing import Any

LEFT_OUT = {"short": "too short", "long": "too long", "language": "in other languages", "duplicate": "duplicates"}


def filters(manifest: dict[str, Any]) -> tuple[str, str]:
    """Which documents were left out, and which were set apart. Raises KeyError, TypeError where it is no manifest."""
    options, removed = manifest["options"], manifest["removed"]
    rules = [_length(options.get("min_chars") or 0, options.get("max_chars"))]
    if languages := options.get("language"):
        rules.append(f"in {', '.join(languages)}")
    if options.get("normalize"):
        rules.append(f"{options['normalize']} normalization")
    if kind := options.get("deduplicate"):
        rules.append(f"{kind} duplicates removed" + (f" (similarity {options['similarity']:g})" * (kind == "near")))
    counts = [f"{count:,} {LEFT_OUT.get(why, why)}" for why, count in removed.items() if count]
    left_out = f"left out of {manifest['records']:,}: {', '.join(counts)}" if counts else ""
    words = "; ".join(filter(None, [*rules, left_out])) or "none"
    share, held_out = options.get("held_out") or 0, manifest["held_out"]
    return words, f"{held_out:,} documents ({100 * share:.3g}%)" if held_out else "none"


def _length(least: int, most: int | None) -> str:
    if most:
        return f"{least:,} to {most:,} characters"
    return f"{least:,} characters or more" if least else ""
