"""A part of the input into arrays on the disk: what runs in each worker process, or as a task of a cluster."""

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
from megatron_detour.corpus.filters import Cleaner
from megatron_detour.corpus.journal import Counts, Journal
from megatron_detour.corpus.options import BuildOptions
from megatron_detour.corpus.publish import rejects_path
from megatron_detour.corpus.records import TextKeys
from megatron_detour.corpus.sources import Part
from megatron_detour.errors import DetourError

JUDGED_EVERY = 4_096  # documents of a part
JUDGED_CHARACTERS = 4_096


@dataclass(frozen=True)
class Job:
    """What all parts of a build have in common."""

    options: BuildOptions
    engine: str
    tokenizer_file: str
    dtype: str
    special_tokens: int  # that the tokenizer puts around a text
    unknown: int | None = None  # the id of [UNK]


class Stopped(Exception):
    """The build ends for another part's reason."""


@lru_cache(maxsize=1)
def _tools(job: Job) -> tuple[Engine, Engine, Cleaner]:
    """Engine, judge and cleaner are made once a process."""
    file = Path(job.tokenizer_file)
    return ENGINES[job.engine](file), HuggingFace(file), Cleaner(job.options)


def begin_worker(job: Job) -> None:
    """Prepares a worker process: the parent alone answers to Ctrl-C, and no worker outlives it."""
    one_thread()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (connection.wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    _tools(job)


def build_part(part: Part, job: Job, report: Callable[[int, int], None]) -> Counts:
    """Writes the files of a part and then its entry in the journal; `report` gets bytes read and tokens made.

    Raises DetourError; then the part is not in the journal.
    """
    journal = Journal(job.options.output_prefix)
    keys = TextKeys(job.options.text_key, job.options.text_separator)
    counts, files = Counts(), journal.begin(part)
    try:
        for number, stretch in enumerate(part.stretches):
            counts.records.append(0)
            for block in read_shard(stretch, keys, lambda read: report(read, 0)):
                before = counts.tokens
                counts.records[number] += block.records
                counts.empty += block.empty
                counts.rejects += [(number, record, reason) for record, reason in block.rejects]
                if len(counts.rejects) > job.options.max_rejects:
                    raise too_many_rejects(part, counts, job.options)
                try:
                    files.append(_columns(block.texts, job, counts))
                except CannotEncode as error:
                    last = records_before(stretch) + counts.records[number]
                    raise DetourError(
                        f"{stretch.path}, lines {last - block.records + 1:,} to {last:,}: {error}"
                    ) from None
                report(0, counts.tokens - before)
        counts.bytes = files.finish()
    finally:
        files.discard()
    journal.finish(part, counts)
    return counts


def too_many_rejects(part: Part, counts: Counts, options: BuildOptions) -> DetourError:
    """Names the first reject of a part, or the first that is one too many."""
    where, record, reason = counts.rejects[min(options.max_rejects, len(counts.rejects) - 1)]
    stretch = part.stretches[where]
    listed = rejects_path(options.output_prefix)
    if options.max_rejects:
        return DetourError(
            f"{stretch.path}, line {records_before(stretch) + record + 1:,}: {reason}; with it there are more than "
            f"--max-rejects {options.max_rejects} records that are no documents"
        )
    return DetourError(
        f"{stretch.path}, line {records_before(stretch) + record + 1:,}: {reason}; mend it, or go on with "
        f"--max-rejects N, which leaves up to N such records out and lists them in {listed}"
    )


def _columns(texts: list[str], job: Job, counts: Counts) -> dict[str, np.ndarray]:
    """Ids of texts and what else is kept of each; counts what is left out."""
    engine, judge, cleaner = _tools(job)
    texts = cleaner.clean(texts, counts.removed)
    ids, begins = engine.encode(texts)
    _judge(texts, engine, judge, counts.documents)
    lengths = np.diff(begins)
    filled = lengths > job.special_tokens
    if not filled.all():  # a tokenizer may take white space and control characters for nothing
        counts.empty += int((~filled).sum())
        texts = [text for text, whole in zip(texts, filled.tolist(), strict=True) if whole]
        ids, lengths = ids[np.repeat(filled, lengths)], lengths[filled]
    counts.documents += len(texts)
    counts.tokens += len(ids)
    if job.unknown is not None:
        counts.unknown += int(np.count_nonzero(ids == job.unknown))
    return {"bin": ids.astype(job.dtype)} | cleaner.columns(texts, lengths)


def _judge(texts: list[str], engine: Engine, judge: Engine, before: int) -> None:
    """Has the judge look at every JUDGED_EVERY-th document of a part; `before` is how many it had until now."""
    beginnings = [text[:JUDGED_CHARACTERS] for text in texts[-before % JUDGED_EVERY :: JUDGED_EVERY]]
    if beginnings and engine.name != judge.name and first_difference(engine, judge, beginnings) is not None:
        raise DetourError(
            f"--engine {engine.name}: its ids are not those of tokenizers on a document of this corpus; use --engine "
            "tokenizers"
        )
