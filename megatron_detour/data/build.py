"""Text files into an indexed corpus: PREFIX.bin, PREFIX.idx and PREFIX.manifest.json.

The input is cut into parts that depend on the input alone: byte ranges of plain files, whole compressed files. Each
worker turns parts into arrays of its own; the parts are joined in order, so the result does not depend on the number of
workers. Everything is written into a folder beside the corpus and renamed, the manifest last.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import multiprocessing
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from megatron_detour import __version__
from megatron_detour.data.documents import BadLine, check_kind, document_of
from megatron_detour.data.indexed import bin_path, concatenate, idx_path, token_type, write_index
from megatron_detour.data.manifest import Manifest, manifest_path
from megatron_detour.data.vocabulary import Vocabulary, find_tokenizer, load_tokenizer, load_vocabulary
from megatron_detour.errors import DetourError
from megatron_detour.files import file_facts, flush

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RANGE_BYTES = 32 << 20
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Part:
    """A worker's share: the lines of `path` that begin in the byte range, or all of a compressed file."""

    number: int
    path: str
    start: int
    end: int


@dataclass(frozen=True)
class Counts:
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad_lines: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self.astuple(), other.astuple(), strict=True)))

    def astuple(self) -> tuple[int, ...]:
        return (self.documents, self.tokens, self.empty, self.bad_lines)


def build_corpus(
    inputs: list[str],
    prefix: str,
    tokenizer: str,
    *,
    text_key: str = "text",
    workers: int = 1,
    skip_bad_lines: bool = False,
    overwrite: bool = False,
    download: bool = False,
) -> Manifest:
    """Builds the corpus at `prefix` and returns its manifest. Raises DetourError; then nothing new is at `prefix`."""
    if workers < 1:
        raise DetourError(f"--workers: at least one is needed, it is {workers}")
    parts = plan_parts(inputs)
    for path in (manifest_path(prefix), bin_path(prefix), idx_path(prefix)):
        if path.exists() and not overwrite:
            raise DetourError(f"{path}: a corpus is already there; choose another prefix or --overwrite")
    tokenizer_file = find_tokenizer(tokenizer, download)
    vocabulary = load_vocabulary(tokenizer, download)
    _check_template(tokenizer_file, vocabulary)
    work = Path(prefix).parent / f".{Path(prefix).name}.building-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)  # of a killed build that had the same process number
    work.mkdir(parents=True)
    try:
        job = _Job(str(tokenizer_file), token_type(vocabulary.size), text_key, skip_bad_lines, work)
        counts = _run(parts, job, workers)
        if not counts.tokens:
            raise DetourError(f"{', '.join(inputs)}: no line holds text, so there is no corpus to build")
        return _publish(parts, job, prefix, counts, vocabulary, inputs)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_template(tokenizer_file: Path, vocabulary: Vocabulary) -> None:
    """Raises DetourError for a tokenizer that knows [CLS] and [SEP] and does not put them around a text."""
    tokenizer = load_tokenizer(tokenizer_file)
    ids = tokenizer.encode("a").ids
    for expected, found in ((vocabulary.cls, ids[:1]), (vocabulary.sep, ids[-1:])):
        if expected is not None and [expected] != found:
            raise DetourError(
                f"{tokenizer_file}: the tokenizer does not put {tokenizer.id_to_token(expected)} around a text; give "
                "its post_processor the template [CLS] $A [SEP]"
            )


def plan_parts(inputs: list[str]) -> list[Part]:
    """Cuts input files into parts. Raises DetourError for a file that is missing or of an unknown kind."""
    parts: list[Part] = []
    for name in inputs:
        check_kind(name)
        size = Path(name).stat().st_size
        stride = size if name.endswith(".gz") else RANGE_BYTES
        for start in range(0, size, max(stride, 1)):
            parts.append(Part(len(parts), name, start, min(start + stride, size)))
    return parts


@dataclass(frozen=True)
class _Job:
    tokenizer: str
    dtype: np.dtype
    text_key: str
    skip_bad_lines: bool
    work: Path

    def ids_of(self, part: Part) -> Path:
        return self.work / f"{part.number:06d}.bin"

    def lengths_of(self, part: Part) -> Path:
        return self.work / f"{part.number:06d}.lengths"


# Set in each worker by _begin: the tokenizer is loaded once, and `_bytes_done` is shared with the parent's display.
_tokenizer: Tokenizer
_bytes_done: Any


def _begin(tokenizer: str, bytes_done: Any) -> None:
    global _tokenizer, _bytes_done
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer, _bytes_done = load_tokenizer(tokenizer), bytes_done


def _run(parts: list[Part], job: _Job, workers: int) -> Counts:
    context = multiprocessing.get_context("spawn")
    bytes_done = context.Value("q", 0)
    with ProcessPoolExecutor(workers, context, _begin, (job.tokenizer, bytes_done)) as pool:
        futures = [pool.submit(_build_part, part, job) for part in parts]
        try:
            _show(futures, bytes_done, sum(part.end - part.start for part in parts))
            return sum((future.result() for future in futures), Counts())
        except BrokenProcessPool:
            raise DetourError("a worker process died, most likely for want of memory; try fewer --workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _show(futures: list[Future], bytes_done: Any, total: int) -> None:
    """Shows progress until all parts are done or the first one fails."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("tokenizing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("", total=total)
        waiting: set[Future] = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=0.5, return_when="FIRST_EXCEPTION")
            progress.update(task, completed=bytes_done.value)
            for future in done:
                future.result()


def _build_part(part: Part, job: _Job) -> Counts:
    counts, lengths = Counts(), []
    with job.ids_of(part).open("wb") as out:
        for texts, empty, bad in _batches(part, job):
            encodings = _tokenizer.encode_batch_fast(texts)
            for encoding in encodings:
                out.write(np.array(encoding.ids, dtype=job.dtype).tobytes())
                lengths.append(len(encoding.ids))
            counts += Counts(len(texts), sum(lengths[len(lengths) - len(texts) :]), empty, bad)
    job.lengths_of(part).write_bytes(np.array(lengths, dtype="<i4").tobytes())
    return counts


def _batches(part: Part, job: _Job) -> Iterator[tuple[list[str], int, int]]:
    """Yields texts of about BATCH_CHARACTERS, with the numbers of empty and bad lines met on the way."""
    texts: list[str] = []
    characters = empty = bad = 0
    for number, line in enumerate(_lines(part)):
        try:
            text = document_of(line, part.path, job.text_key)
        except BadLine as reason:
            if not job.skip_bad_lines:
                where = f"{part.path}, line {_lines_before(part) + number + 1:,}"
                raise DetourError(
                    f"{where}: {reason}; mend it, or leave such lines out with --skip-bad-lines"
                ) from None
            bad += 1
            continue
        if not text.strip():
            empty += 1
            continue
        texts.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield texts, empty, bad
            texts, characters, empty, bad = [], 0, 0, 0
    yield texts, empty, bad


def _lines(part: Part) -> Iterator[bytes]:
    """The lines that begin in the part, without their line ends; keeps the shared count of bytes up to date."""
    with Path(part.path).open("rb") as raw:
        with _opened(raw, part) as file:
            reported = part.start
            for line in _owned(file, part):
                here = min(raw.tell(), part.end)
                if here - reported > 1 << 18:
                    _report(here - reported)
                    reported = here
                yield line.rstrip(b"\r\n")
        _report(part.end - reported)


def _owned(file: BinaryIO, part: Part) -> Iterator[bytes]:
    compressed = part.path.endswith(".gz")
    position = 0
    if part.start:
        file.seek(part.start - 1)
        position = part.start - 1 + len(file.readline())
    try:
        while compressed or position < part.end:
            line = file.readline()
            if not line:
                return
            position += len(line)
            yield line
    except (EOFError, OSError, zlib.error) as error:
        raise DetourError(f"{part.path}: cannot be read to its end: {error}") from None


def _opened(raw: BinaryIO, part: Part) -> contextlib.AbstractContextManager[BinaryIO]:
    return io.BufferedReader(gzip.GzipFile(fileobj=raw)) if part.path.endswith(".gz") else contextlib.nullcontext(raw)


def _report(count: int) -> None:
    with _bytes_done.get_lock():
        _bytes_done.value += count


def _lines_before(part: Part) -> int:
    if not part.start:
        return 0
    with Path(part.path).open("rb") as file:
        left, lines = part.start - 1, 1  # the line that holds the byte before the part is another part's
        while left and (block := file.read(min(left, 1 << 20))):
            lines += block.count(b"\n")
            left -= len(block)
    return lines


def _publish(
    parts: list[Part], job: _Job, prefix: str, counts: Counts, vocabulary: Vocabulary, inputs: list[str]
) -> Manifest:
    bin_file, idx_file, manifest_file = job.work / "bin", job.work / "idx", job.work / "manifest"
    concatenate((job.ids_of(part) for part in parts), bin_file)
    lengths = np.concatenate([np.fromfile(job.lengths_of(part), dtype="<i4") for part in parts])
    write_index(idx_file, lengths, job.dtype)
    manifest = Manifest(
        documents=counts.documents,
        tokens=counts.tokens,
        empty=counts.empty,
        bad_lines=counts.bad_lines,
        sources=[{"path": name, "bytes": Path(name).stat().st_size} for name in inputs],
        tokenizer=vocabulary.to_dict(),
        files={"bin": file_facts(bin_file), "idx": file_facts(idx_file)},
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        version=__version__,
    )
    manifest.write(manifest_file)
    for file in (bin_file, idx_file, manifest_file):
        flush(file)
    # An old manifest must not vouch for new files, nor the new one for old files.
    manifest_path(prefix).unlink(missing_ok=True)
    bin_file.replace(bin_path(prefix))
    idx_file.replace(idx_path(prefix))
    manifest_file.replace(manifest_path(prefix))
    return manifest
