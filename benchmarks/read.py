"""How fast a large corpus is read: startup at any position, documents, masking, memory. No model, no GPU.

The corpus is synthetic: documents of log-normal lengths in a real index, and a sparse .bin, so that tens of billions of
tokens take no disk space. Each figure is measured in a new process.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from megatron_detour.config import Corpus
from megatron_detour.data.batches import DocumentMixture, rank_batch
from megatron_detour.data.indexed import CODES, HEADER, MAGIC, bin_path, idx_path
from megatron_detour.data.manifest import Manifest, manifest_path, read_manifest
from megatron_detour.data.order import rank_micro_batches
from megatron_detour.files import file_facts
from megatron_detour.objectives import Masking
from megatron_detour.settings import Flag, Range, validate
from megatron_detour.tokenizer.vocabulary import Vocabulary
from megatron_detour.ui.tables import Table

SPREAD = 0.8  # standard deviation of the logarithms of the documents' lengths
SHORTEST = 3
CHUNK = 1 << 20  # documents written at a time
# A sparse file reads as zeros: here 0 is an ordinary id.
VOCABULARY = Vocabulary(50_368, (1, 2, 3, 4, 5), mask=1, pad=2, cls=3, sep=4, unk=5, sha256="0" * 64)
DTYPE = np.dtype(np.uint16)
DEEP = 0.9  # of an epoch
MASK_RATE = 0.3


HELP = "start-up, reading, masking, memory and padding with a large synthetic corpus"
Positive = Annotated[int, Range(above=0)]


@dataclass(frozen=True)
class Settings:
    folder: Annotated[Path, Flag("DIR"), "for the corpus: 20 bytes per document, and a sparse file"]
    documents: Annotated[Positive, "documents in the corpus"] = 50_000_000
    mean: Annotated[Positive, "mean tokens per document"] = 400
    sequence_length: Annotated[tuple[Positive, ...], "one or more"] = (1024, 8192)
    sequences: Annotated[Positive, "sequences per batch"] = 512
    batches: Annotated[Positive, "batches to read"] = 100


def run(settings: Settings, say: Callable[[str], None]) -> None:
    print(table(measure(settings, say)))


def measure(settings: Settings, say: Callable[[str], None]) -> list[tuple[str, str]]:
    """Return rows of (what, figure). Raises DetourError for invalid settings."""
    validate(settings)
    prefix = make_corpus(settings, say)
    rows = []
    for length in settings.sequence_length:
        deep = int(DEEP * read_manifest(prefix).tokens)
        places = (("token 0", 0, False), (f"token {deep:,}", deep, False), ("there again", deep, True))
        for name, first, again in places:
            for kept in [] if again else settings.folder.glob(f"{Path(prefix).name}.windows-*"):
                kept.unlink()
            say(f"opening at length {length:,}, {name}")
            rows.append((f"{length:,}: start at {name}", _started(_fresh(start, prefix, length, first, settings))))
        say(f"reading and masking at length {length:,}")
        rows += [(f"{length:,}: {what}", figure) for what, figure in _fresh(speeds, prefix, length, settings)]
    return rows


def table(rows: list[tuple[str, str]]) -> str:
    """Return a Markdown table."""
    return Table(["what", "figure"], rows).markdown()


def make_corpus(settings: Settings, say: Callable[[str], None]) -> str:
    """Write the corpus in bounded memory, unless it exists, and return its prefix."""
    prefix = str(settings.folder / f"made_up_{settings.documents}_{settings.mean}")
    if manifest_path(prefix).exists():
        return prefix
    say(f"generating {settings.documents:,} documents in {settings.folder}")
    settings.folder.mkdir(parents=True, exist_ok=True)
    tokens = 0
    with idx_path(prefix).open("wb") as out:
        out.write(HEADER.pack(MAGIC, 1, CODES[DTYPE], settings.documents, settings.documents + 1))
        for lengths in _lengths(settings):
            out.write(lengths.astype("<i4").tobytes())
        for lengths in _lengths(settings):  # drawn again instead of kept in memory
            ends = tokens + np.cumsum(lengths)
            out.write(((ends - lengths) * DTYPE.itemsize).astype("<i8").tobytes())
            tokens = int(ends[-1])
        for first in range(0, settings.documents + 1, CHUNK):
            out.write(np.arange(first, min(first + CHUNK, settings.documents + 1), dtype="<i8").tobytes())
    with bin_path(prefix).open("wb") as out:
        out.truncate(tokens * DTYPE.itemsize)
    # The checksum of the sparse text is never read.
    files = {"bin": {"bytes": tokens * DTYPE.itemsize, "sha256": "0" * 64}, "idx": file_facts(idx_path(prefix))}
    manifest = Manifest(
        documents=settings.documents,
        tokens=tokens,
        records=settings.documents,
        tokenizer=VOCABULARY.to_dict(),
        files=files,
    )
    manifest.write(manifest_path(prefix))
    return prefix


def start(prefix: str, length: int, first: int, settings: Settings) -> dict[str, float]:
    """Return the seconds from opening to a first batch at token `first`, and the memory that this adds."""
    before = _memory()
    started = time.perf_counter()
    mixture = _open(prefix, length)
    mixture.tokens(mixture.documents(first, first + settings.sequences * length))
    seconds = time.perf_counter() - started
    after = _memory()
    return {"seconds": seconds} | {key: after[key] - before[key] for key in after} | {"whole": after["VmHWM"]}


def speeds(prefix: str, length: int, settings: Settings) -> list[tuple[str, str]]:
    """Measure batches in training order from the beginning, then the memory that this took."""
    mixture, objective, count = _open(prefix, length), Masking(VOCABULARY, MASK_RATE), settings.sequences
    before, step = _memory(), count * length
    starts = [number * step for number in range(settings.batches)]
    reading = []
    for _ in range(2):
        started = time.perf_counter()
        for start in starts:
            documents = mixture.documents(start, start + step)
            tokens = mixture.tokens(documents)
        reading.append(len(starts) * count / (time.perf_counter() - started))
    times = []
    for _ in starts:
        started = time.perf_counter()
        objective.apply(tokens, documents.lengths, 17, documents.numbers)
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    for start in starts:
        mine, of = rank_micro_batches(step, min(count, 64) * length, 0, 1)
        rank_batch(mixture, mixture.documents(start, start + step), mine, of, objective, 17)
    both = len(starts) * count / (time.perf_counter() - started)
    grown = _memory()["VmHWM"] - before["VmRSS"]
    return [
        ("sequences read per second, first pass", f"{reading[0]:,.0f}"),
        ("sequences read per second, second pass", f"{reading[1]:,.0f}"),
        (f"masking {count} sequences", f"{statistics.median(times) * 1_000:.2f} ms"),
        ("sequences read, masked and batched per second", f"{both:,.0f}"),
        (f"peak memory of reading {len(starts) * count:,}", _megabytes(grown)),
    ]


def _open(prefix: str, length: int) -> DocumentMixture:
    return DocumentMixture((Corpus(prefix),), length, 42, VOCABULARY)


def _fresh(function: Callable, *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _lengths(settings: Settings) -> Iterator[np.ndarray]:
    """Yield lengths, int64 [documents], in chunks; deterministic."""
    for number, first in enumerate(range(0, settings.documents, CHUNK)):
        drawn = np.random.default_rng(number).lognormal(
            np.log(settings.mean) - SPREAD**2 / 2, SPREAD, min(CHUNK, settings.documents - first)
        )
        yield np.maximum(drawn.astype(np.int64), SHORTEST)


def _memory() -> dict[str, int]:
    """Return this process's resident bytes, current and peak (VmHWM), including mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {key: int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM", "RssAnon", "RssFile")}


def _started(figures: dict[str, float]) -> str:
    memory = f"at most {_megabytes(figures['VmHWM'])} more, then {_megabytes(figures['RssAnon'])} and of files "
    whole = f"all with torch {_megabytes(figures['whole'])}"
    return f"{figures['seconds']:.2f} s; {memory}{_megabytes(figures['RssFile'])}; {whole}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"
