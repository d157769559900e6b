"""The parts of a build into the corpus and, where asked for, its held-out share; the manifests are published last."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_detour import __version__
from megatron_detour.data.build.duplicates import Column, first_of_equal, first_of_similar
from megatron_detour.data.build.journal import Counts, Journal
from megatron_detour.data.build.options import BuildOptions
from megatron_detour.data.indexed import CHUNK, bin_path, idx_path, write_index
from megatron_detour.data.manifest import Manifest, manifest_path
from megatron_detour.data.sources import Part
from megatron_detour.errors import DetourError
from megatron_detour.files import file_facts, flush

COPY_BYTES = 1 << 22


class HashedFile:
    """A file that is only appended to, with the SHA-256 of what it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._file = path.open("wb")

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._hash.update(content)
        self.size += len(content)

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}


class Corpus:
    """A corpus that is being written aside, as .NAME.building/KIND.bin and so on."""

    def __init__(self, folder: Path, kind: str, dtype: np.dtype) -> None:
        self._at = {suffix: folder / f"{kind}.{suffix}" for suffix in ("bin", "idx", "manifest", "lengths")}
        self._dtype = dtype
        self._bin = HashedFile(self._at["bin"])
        self._lengths = self._at["lengths"].open("wb")
        self.documents = self.tokens = 0

    def add(self, source: BinaryIO, lengths: np.ndarray, chosen: np.ndarray | None = None) -> None:
        """Appends the documents of a part, all or the `chosen`, bool [documents]; `source` holds their ids."""
        for start, size in self._runs(lengths, chosen):
            source.seek(start)
            self._copy(source, size)
        self._count(lengths if chosen is None else lengths[chosen])

    def append(self, source: BinaryIO, lengths: np.ndarray) -> None:
        """Appends a corpus of any size; lengths: int32 [documents], in memory or mapped."""
        for start in range(0, len(lengths), CHUNK):
            some = lengths[start : start + CHUNK]
            self._copy(source, int(some.sum(dtype=np.int64)) * self._dtype.itemsize)
            self._count(some)

    def _copy(self, source: BinaryIO, size: int) -> None:
        while size and (block := source.read(min(size, COPY_BYTES))):
            self._bin.write(block)
            size -= len(block)

    def _count(self, lengths: np.ndarray) -> None:
        self._lengths.write(lengths.tobytes())
        self.documents += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))

    def _runs(self, lengths: np.ndarray, chosen: np.ndarray | None) -> Iterator[tuple[int, int]]:
        """Begin and size, in bytes, of the stretches of ids to copy."""
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        if chosen is None or chosen.all():
            yield 0, int(ends[-1]) if len(ends) else 0
            return
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
        begins = ends - lengths.astype(np.int64) * self._dtype.itemsize
        for first, after in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            yield int(begins[first]), int(ends[after - 1] - begins[first])

    def close(self, manifest: dict[str, Any]) -> Manifest:
        """Writes the index and the manifest, which gets its figures and the `manifest` given."""
        facts = self._bin.close()
        self._lengths.close()
        lengths = np.memmap(self._at["lengths"], "<i4", "r") if self.documents else np.zeros(0, "<i4")
        write_index(self._at["idx"], lengths, self._dtype)
        files = {"bin": facts, "idx": file_facts(self._at["idx"])}
        whole = Manifest(documents=self.documents, tokens=self.tokens, files=files, **manifest)
        whole.write(self._at["manifest"])
        for suffix in ("bin", "idx", "manifest"):
            flush(self._at[suffix])
        return whole

    def publish(self, prefix: str) -> None:
        """Gives the files their names, the manifest last; the caller has removed an old manifest."""
        self._at["bin"].replace(bin_path(prefix))
        self._at["idx"].replace(idx_path(prefix))
        self._at["manifest"].replace(manifest_path(prefix))


def held_out_prefix(prefix: str) -> str:
    return f"{prefix}.heldout"


def rejects_path(prefix: str) -> Path:
    return Path(f"{prefix}.rejects.jsonl")


def totals(counts: list[Counts]) -> dict[str, int]:
    """Figures of all parts: records, documents, tokens, empty, rejects."""
    return {
        "records": sum(sum(c.records) for c in counts),
        "documents": sum(c.documents for c in counts),
        "tokens": sum(c.tokens for c in counts),
        "empty": sum(c.empty for c in counts),
        "rejects": sum(len(c.rejects) for c in counts),
    }


def join(
    parts: list[Part], journal: Journal, options: BuildOptions, dtype: np.dtype, about: dict[str, Any]
) -> Manifest:
    """Joins finished parts in order, publishes the corpus and returns its manifest. `about` goes into the manifest."""
    counts = [journal.counts(part) for part in parts]
    stay = _first_of_their_kind(parts, counts, journal, options)
    main = Corpus(journal.folder, "corpus", dtype)
    held_out = Corpus(journal.folder, "heldout", dtype) if options.held_out else None
    removed = sum((c.removed for c in counts), Counter())
    start = 0
    for part, count in zip(parts, counts, strict=True):
        if not count.documents:
            continue
        lengths = journal.column(part, "length")
        chosen = None if stay is None else stay[start : start + count.documents]
        start += count.documents
        with journal.file(part, "bin").open("rb") as ids:
            if held_out is None:
                main.add(ids, lengths, chosen)
                continue
            apart = journal.column(part, "held_out")
            chosen = np.ones(len(lengths), dtype=bool) if chosen is None else chosen
            main.add(ids, lengths, chosen & ~apart)
            held_out.add(ids, lengths, chosen & apart)
    if stay is not None:
        removed["duplicate"] = int(len(stay) - stay.sum())
    if not main.documents or (held_out and not held_out.documents):
        share = "held-out documents" if main.documents else "documents"
        raise DetourError(f"{options.output_prefix}: the input has no {share}, so there is no corpus to build")
    figures = totals(counts)
    shared = {key: figures[key] for key in ("records", "empty", "rejects")} | {
        "removed": dict(sorted(removed.items())),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
        **about,
    }
    return _publish(main, held_out, parts, counts, journal, options.output_prefix, shared)


def _publish(
    main: Corpus,
    held_out: Corpus | None,
    parts: list[Part],
    counts: list[Counts],
    journal: Journal,
    prefix: str,
    shared: dict[str, Any],
) -> Manifest:
    manifest = main.close(shared | {"held_out": held_out.documents if held_out else 0})
    if held_out:
        held_out.close(shared | {"held_out": main.documents})
    rejects = _write_rejects(parts, counts, journal.folder / "rejects")
    # An old manifest must not vouch for new files, nor the new one for old files.
    for name in (prefix, held_out_prefix(prefix)) if held_out else (prefix,):
        manifest_path(name).unlink(missing_ok=True)
    if rejects:
        rejects.replace(rejects_path(prefix))
    else:
        rejects_path(prefix).unlink(missing_ok=True)
    if held_out:
        held_out.publish(held_out_prefix(prefix))
    main.publish(prefix)
    flush(Path(prefix).parent)
    return manifest


def _write_rejects(parts: list[Part], counts: list[Counts], path: Path) -> Path | None:
    """Lists rejects by file and line (or row), with the reason and without any text."""
    before: Counter[str] = Counter()
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for part, count in zip(parts, counts, strict=True):
            for number, stretch in enumerate(part.stretches):
                for where, record, reason in count.rejects:
                    if where == number:
                        line = {"file": stretch.path, "line": before[stretch.path] + record + 1, "reason": reason}
                        out.write(json.dumps(line, ensure_ascii=False) + "\n")
                        written += 1
                before[stretch.path] += count.records[number]
    return path if written else None


def _first_of_their_kind(
    parts: list[Part], counts: list[Counts], journal: Journal, options: BuildOptions
) -> np.ndarray | None:
    """bool [documents]: true for those that stay; None where duplicates may stay."""
    if not options.deduplicate:
        return None
    filled = [part for part, count in zip(parts, counts, strict=True) if count.documents]
    documents = sum(count.documents for count in counts)

    def column(name: str, of: tuple = ()) -> Iterator[np.ndarray]:
        for part in filled:
            yield journal.column(part, name)[(slice(None), *of)]

    if options.deduplicate == "exact" or not filled:
        return first_of_equal(partial(column, "hash"), documents)
    bands = journal.column(filled[0], "bands").shape[1]
    columns: list[Column] = [partial(column, "bands", (band,)) for band in range(bands)]
    return first_of_similar(columns, documents)
