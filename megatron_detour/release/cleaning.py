"""A corpus's filters as text for a card, from its manifest."""

from __future__ import annotations

from typing import Any

REMOVED = {
    "short": "too short",
    "long": "too long",
    "language": "in other languages",
    "excluded": "with excluded text",
    "duplicate": "duplicates",
}


def filters(manifest: dict[str, Any]) -> tuple[str, str]:
    """Return the filters with the removed documents, and the held-out ones. Raises KeyError or TypeError if invalid."""
    options, removed = manifest["options"], manifest["removed"]
    rules = [_length(options.get("min_chars") or 0, options.get("max_chars"))]
    if languages := options.get("language"):
        rules.append(f"in {', '.join(languages)}")
    if options.get("normalize"):
        rules.append(f"{options['normalize']} normalization")
    if kind := options.get("deduplicate"):
        rules.append(f"{kind} duplicates removed" + (f" (similarity {options['similarity']:g})" * (kind == "near")))
    if shared := options.get("exclude_words"):
        rules.append(f"without {shared} words in a row of excluded texts")
    counts = [f"{count:,} {REMOVED.get(why, why)}" for why, count in removed.items() if count]
    removed_words = f"removed from {manifest['records']:,}: {', '.join(counts)}" if counts else ""
    words = "; ".join(filter(None, [*rules, removed_words])) or "none"
    share, held_out = options.get("held_out") or 0, manifest["held_out"]
    return words, f"{held_out:,} documents ({100 * share:.3g}%)" if held_out else "none"


def _length(least: int, most: int | None) -> str:
    if most:
        return f"{least:,} to {most:,} characters"
    return f"{least:,} characters or more" if least else ""
