"""The parts of a build into the corpus and, where asked for, its held-out share."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour import __version__
from megatron_detour.corpus.duplicates import first_of_their_kind
from megatron_detour.corpus.journal import Counts, Journal
from megatron_detour.corpus.options import BuildOptions
from megatron_detour.corpus.progress import BuildProgress
from megatron_detour.corpus.publish import CorpusWriter, held_out_prefix, publish, rejects_path
from megatron_detour.corpus.sources import Part, shown
from megatron_detour.data.manifest import Manifest
from megatron_detour.errors import DetourError


def join(
    parts: list[Part], journal: Journal, options: BuildOptions, dtype: np.dtype, about: dict[str, Any]
) -> Manifest:
    """Joins finished parts in order, publishes the corpus and returns its manifest. `about` goes into the manifest."""
    counts = [journal.counts(part) for part in parts]
    stay = _first_of_their_kind(parts, counts, journal, options)
    main = CorpusWriter(journal.folder, "corpus", dtype)
    held_out = CorpusWriter(journal.folder, "heldout", dtype) if options.held_out else None
    _copy_parts(parts, counts, journal, stay, main, held_out)
    removed = sum((count.removed for count in counts), Counter())
    if stay is not None:
        removed["duplicate"] = int(len(stay) - stay.sum())
    figures = {
        "records": sum(sum(count.records) for count in counts),
        "empty": sum(count.empty for count in counts),
        "rejects": sum(len(count.rejects) for count in counts),
    }
    if held_out and bool(main.documents) != bool(held_out.documents):
        raise DetourError(
            f"{options.output_prefix}: --held-out {options.held_out} takes {held_out.documents:,} of "
            f"{main.documents + held_out.documents:,} documents; give another share"
        )
    if not main.documents:
        left_out = ", ".join(f"{count:,} {what}" for what, count in (figures | removed).items() if count)
        raise DetourError(
            f"{options.output_prefix}: the input has no documents to build from ({left_out or 'nothing'})"
        )
    shared = (
        about
        | figures
        | {
            "removed": dict(sorted(removed.items())),
            "unknown": sum(count.unknown for count in counts),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "version": __version__,
        }
    )
    manifest = main.close(shared | {"held_out": held_out.documents if held_out else 0})
    names = []
    if manifest.rejects:
        names.append((_write_rejects(parts, counts, journal.folder / "rejects"), rejects_path(options.output_prefix)))
    if held_out:
        held_out.close(shared | {"held_out": main.documents})
        names += held_out.names(held_out_prefix(options.output_prefix))
    publish(journal.folder, options.output_prefix, about["plan"], names + main.names(options.output_prefix))
    return manifest


def _copy_parts(
    parts: list[Part],
    counts: list[Counts],
    journal: Journal,
    stay: np.ndarray | None,
    main: CorpusWriter,
    held_out: CorpusWriter | None,
) -> None:
    start = done = 0
    with BuildProgress(sum(count.bytes.get("bin", 0) for count in counts), "joining") as progress:
        for part, count in zip(parts, counts, strict=True):
            if not count.documents:
                continue
            lengths = journal.column(part, "length", count.documents)
            chosen = None if stay is None else stay[start : start + count.documents]
            start += count.documents
            with journal.file(part, "bin").open("rb") as ids:
                if held_out is None:
                    main.add(ids, lengths, chosen)
                else:
                    apart = journal.column(part, "held_out", count.documents)
                    for corpus, mine in ((main, ~apart), (held_out, apart)):
                        ids.seek(0)
                        corpus.add(ids, lengths, mine if chosen is None else mine & chosen)
            done += count.bytes["bin"]
            progress.show(done, main.tokens)


def _write_rejects(parts: list[Part], counts: list[Counts], path: Path) -> Path:
    """Lists rejects by file and line (or row), with the reason and without any text."""
    before: Counter[str] = Counter()
    with path.open("w", encoding="utf-8") as out:
        for part, count in zip(parts, counts, strict=True):
            firsts = []
            for stretch, records in zip(part.stretches, count.records, strict=True):
                firsts.append(before[stretch.path])
                before[stretch.path] += records
            for stretch, record, reason in count.rejects:
                line = {
                    "file": shown(part.stretches[stretch].path),
                    "line": firsts[stretch] + record + 1,
                    "reason": reason,
                }
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
    return path


def _first_of_their_kind(
    parts: list[Part], counts: list[Counts], journal: Journal, options: BuildOptions
) -> np.ndarray | None:
    """bool [documents]: true for those that stay; None where duplicates may stay."""
    if not options.deduplicate:
        return None
    documents = sum(count.documents for count in counts)
    filled = [(part, count) for part, count in zip(parts, counts, strict=True) if count.documents]
    keys = (journal.column(part, "keys", count.documents) for part, count in filled)
    return first_of_their_kind(keys, documents, journal.folder)
