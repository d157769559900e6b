"""Joining the parts of a build into the corpus and, if requested, its held-out documents."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour import __version__
from megatron_detour.corpus.duplicates import first_occurrences
from megatron_detour.corpus.journal import Counts, Journal
from megatron_detour.corpus.options import BuildOptions
from megatron_detour.corpus.progress import BuildProgress
from megatron_detour.corpus.publish import CorpusWriter, publish, rejects_path
from megatron_detour.corpus.sources import Part, printable
from megatron_detour.data.manifest import Manifest, held_out_prefix
from megatron_detour.errors import DetourError


def join(
    parts: list[Part], journal: Journal, options: BuildOptions, dtype: np.dtype, fields: dict[str, Any]
) -> Manifest:
    """Join finished parts in order, publish the corpus and return its manifest, which includes `fields`."""
    counts = [journal.counts(part) for part in parts]
    kept = _first_occurrences(parts, counts, journal, options)
    main = CorpusWriter(journal.folder, "corpus", dtype)
    held_out = CorpusWriter(journal.folder, "heldout", dtype) if options.held_out else None
    _copy_parts(parts, counts, journal, kept, main, held_out)
    removed = sum((count.removed for count in counts), Counter())
    if kept is not None:
        removed["duplicate"] = int(len(kept) - kept.sum())
    figures = {
        "records": sum(sum(count.records) for count in counts),
        "empty": sum(count.empty for count in counts),
        "rejects": sum(len(count.rejects) for count in counts),
    }
    if held_out and bool(main.documents) != bool(held_out.documents):
        raise DetourError(
            f"{options.output_prefix}: --held-out {options.held_out} takes {held_out.documents:,} of "
            f"{main.documents + held_out.documents:,} documents; set another fraction"
        )
    if not main.documents:
        left_out = ", ".join(f"{count:,} {what}" for what, count in (figures | removed).items() if count)
        raise DetourError(f"{options.output_prefix}: the input has no usable documents ({left_out or 'it is empty'})")
    shared = (
        fields
        | figures
        | {
            "removed": dict(sorted(removed.items())),
            "unknown": sum(count.unknown for count in counts),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": __version__,
        }
    )
    manifest = main.close(shared | {"held_out": held_out.documents if held_out else 0})
    renames = []
    if manifest.rejects:
        renames.append((_write_rejects(parts, counts, journal.folder / "rejects"), rejects_path(options.output_prefix)))
    if held_out:
        held_out.close(shared | {"held_out": main.documents})
        renames += held_out.renames(held_out_prefix(options.output_prefix))
    publish(journal.folder, options.output_prefix, fields["plan"], renames + main.renames(options.output_prefix))
    return manifest


def _copy_parts(
    parts: list[Part],
    counts: list[Counts],
    journal: Journal,
    kept: np.ndarray | None,
    main: CorpusWriter,
    held_out: CorpusWriter | None,
) -> None:
    start = done = 0
    with BuildProgress(sum(count.bytes.get("bin", 0) for count in counts), "joining") as progress:
        for part, count in zip(parts, counts, strict=True):
            if not count.documents:
                continue
            lengths = journal.column(part, "length", count.documents)
            chosen = None if kept is None else kept[start : start + count.documents]
            start += count.documents
            with journal.file(part, "bin").open("rb") as ids:
                if held_out is None:
                    main.add(ids, lengths, chosen)
                else:
                    is_held_out = journal.column(part, "held_out", count.documents)
                    for corpus, selected in ((main, ~is_held_out), (held_out, is_held_out)):
                        ids.seek(0)
                        corpus.add(ids, lengths, selected if chosen is None else selected & chosen)
            done += count.bytes["bin"]
            progress.show(done, main.tokens)


def _write_rejects(parts: list[Part], counts: list[Counts], path: Path) -> Path:
    """List rejects by file and line (or row), with the reason and without any text."""
    before: Counter[str] = Counter()
    with path.open("w", encoding="utf-8") as out:
        for part, count in zip(parts, counts, strict=True):
            firsts = []
            for shard, records in zip(part.shards, count.records, strict=True):
                firsts.append(before[shard.path])
                before[shard.path] += records
            for shard, record, reason in count.rejects:
                line = {
                    "file": printable(part.shards[shard].path),
                    "line": firsts[shard] + record + 1,
                    "reason": reason,
                }
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def _first_occurrences(
    parts: list[Part], counts: list[Counts], journal: Journal, options: BuildOptions
) -> np.ndarray | None:
    """Return bool [documents], true for those to keep, or None without deduplication."""
    if not options.deduplicate:
        return None
    documents = sum(count.documents for count in counts)
    filled = [(part, count) for part, count in zip(parts, counts, strict=True) if count.documents]
    keys = (journal.column(part, "keys", count.documents) for part, count in filled)
    return first_occurrences(keys, documents, journal.folder)
