"""Building one part of the input, in a worker process or a task of a cluster."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import connection, parent_process
from pathlib import Path

import numpy as np

from megatron_detour.corpus.documents import read_shard, records_before
from megatron_detour.corpus.engines import ENGINES, CannotEncode, Engine, HuggingFace, first_difference, one_thread
from megatron_detour.corpus.exclusion import Exclusion
from megatron_detour.corpus.filters import Cleaner
from megatron_detour.corpus.journal import Counts, Journal
from megatron_detour.corpus.options import BuildOptions
from megatron_detour.corpus.publish import rejects_path
from megatron_detour.corpus.records import TextKeys
from megatron_detour.corpus.sources import Part
from megatron_detour.errors import DetourError

CHECK_EVERY = 4_096  # documents of a part
CHECKED_CHARACTERS = 4_096


@dataclass(frozen=True)
class Job:
    """What all parts of a build have in common."""

    options: BuildOptions
    engine: str
    tokenizer_file: str
    dtype: str
    special_tokens: int  # that the tokenizer adds to a text
    unknown: int | None = None  # the id of [UNK]
    excluded: str | None = None  # identity of the Exclusion, which is saved in the journal's folder


class Stopped(Exception):
    """Raised to stop a worker because another part failed or the build was interrupted."""


@lru_cache(maxsize=1)
def _tools(job: Job) -> tuple[Engine, Engine, Cleaner]:
    """Return engine, reference and cleaner, created once per process."""
    file = Path(job.tokenizer_file)
    return ENGINES[job.engine](file), HuggingFace(file), Cleaner(job.options, _exclusion(job))


def _exclusion(job: Job) -> Exclusion | None:
    folder, words = Journal(job.options.output_prefix).folder, job.options.exclude_words
    return Exclusion.load(folder, job.excluded, words) if job.excluded else None


def begin_worker(job: Job) -> None:
    """Prepare a worker process: only the parent handles Ctrl-C, and workers exit with it."""
    one_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    _tools(job)


def build_part(part: Part, job: Job, report: Callable[[int, int], None]) -> Counts:
    """Write the files of a part and then its entry in the journal; `report` gets the new bytes read and tokens written.

    On a DetourError the part is not in the journal.
    """
    journal = Journal(job.options.output_prefix)
    keys = TextKeys(job.options.text_key, job.options.text_separator)
    counts, files = Counts(), journal.begin(part)
    try:
        for number, shard in enumerate(part.shards):
            counts.records.append(0)
            for block in read_shard(shard, keys, lambda read: report(read, 0)):
                before = counts.tokens
                counts.records[number] += block.records
                counts.empty += block.empty
                counts.rejects += [(number, record, reason) for record, reason in block.rejects]
                if len(counts.rejects) > job.options.max_rejects:
                    raise too_many_rejects(part, counts, job.options)
                try:
                    files.append(_columns(block.texts, job, counts))
                except CannotEncode as error:
                    last = records_before(shard) + counts.records[number]
                    raise DetourError(
                        f"{shard.path}, lines {last - block.records + 1:,} to {last:,}: {error}"
                    ) from None
                report(0, counts.tokens - before)
        counts.bytes = files.finish()
    finally:
        files.discard()
    journal.finish(part, counts)
    return counts


def too_many_rejects(part: Part, counts: Counts, options: BuildOptions) -> DetourError:
    """Return the error for the first reject of a part, or for the first beyond --max-rejects."""
    where, record, reason = counts.rejects[min(options.max_rejects, len(counts.rejects) - 1)]
    shard = part.shards[where]
    advice = (
        f"more than --max-rejects {options.max_rejects} records are invalid"
        if options.max_rejects
        else "fix it, or add --max-rejects N to skip up to N invalid records and list them in "
        f"{rejects_path(options.output_prefix)}"
    )
    return DetourError(f"{shard.path}, line {records_before(shard) + record + 1:,}: {reason}; {advice}")


def _columns(texts: list[str], job: Job, counts: Counts) -> dict[str, np.ndarray]:
    """Return the ids of texts and the other columns; count what is removed."""
    engine, reference, cleaner = _tools(job)
    texts = cleaner.clean(texts, counts.removed)
    ids, begins = engine.encode(texts)
    _spot_check(texts, engine, reference, counts.documents)
    lengths = np.diff(begins)
    filled = lengths > job.special_tokens
    if not filled.all():  # a tokenizer may drop whitespace and control characters
        counts.empty += int((~filled).sum())
        texts = [text for text, keep in zip(texts, filled.tolist(), strict=True) if keep]
        ids, lengths = ids[np.repeat(filled, lengths)], lengths[filled]
    counts.documents += len(texts)
    counts.tokens += len(ids)
    if job.unknown is not None:
        counts.unknown += int(np.count_nonzero(ids == job.unknown))
    return {"bin": ids.astype(job.dtype)} | cleaner.columns(texts, lengths)


def _spot_check(texts: list[str], engine: Engine, reference: Engine, before: int) -> None:
    """Compare every CHECK_EVERY-th document of a part with the reference; `before` counts the part's earlier ones."""
    beginnings = [text[:CHECKED_CHARACTERS] for text in texts[-before % CHECK_EVERY :: CHECK_EVERY]]
    if beginnings and engine.name != reference.name and first_difference(engine, reference, beginnings) is not None:
        raise DetourError(
            f"--engine {engine.name}: its ids differ from those of tokenizers on a document of this corpus; use "
            "--engine tokenizers"
        )
