"""The files of a corpus: written aside, brought to the disk, then named, the manifest last.

A note beside them says what is to be named. If the naming is broken off, the same build finishes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np

from megatron_detour.data.indexed import CHUNK, bin_path, idx_path, write_index
from megatron_detour.data.integrity import sample_sha256
from megatron_detour.data.manifest import Manifest, manifest_path, read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.files import file_facts, flush, write_whole
from megatron_detour.structured import read_json

COPY_BYTES = 1 << 22
NOTE = "publishing.json"


def held_out_prefix(prefix: str) -> str:
    return f"{prefix}.heldout"


def rejects_path(prefix: str) -> Path:
    return Path(f"{prefix}.rejects.jsonl")


def histogram_path(prefix: str) -> Path:
    return Path(f"{prefix}.lengths.png")


def corpus_files(prefix: str) -> list[Path]:
    """The three files of a corpus, the manifest first."""
    return [manifest_path(prefix), bin_path(prefix), idx_path(prefix)]


class Note(msgspec.Struct):
    """Which build is to be named, and its files: the names they have and the names they get."""

    plan: str
    steps: list[tuple[str, str]]


class CorpusWriter:
    """A corpus that is being written aside, as FOLDER/KIND.bin and so on."""

    def __init__(self, folder: Path, kind: str, dtype: np.dtype) -> None:
        self._at = {suffix: folder / f"{kind}.{suffix}" for suffix in ("bin", "idx", "manifest.json", "lengths")}
        self._dtype = dtype
        self._hash = hashlib.sha256()
        self._bin = self._at["bin"].open("wb")
        self._lengths = self._at["lengths"].open("wb")
        self.documents = self.tokens = 0

    def add(self, source: BinaryIO, lengths: np.ndarray, chosen: np.ndarray | None = None, hashed: Any = None) -> None:
        """Appends documents, all or the `chosen`, bool [documents]; `source` holds their ids, lengths are int32.

        `hashed` is a hash that is given all that is copied.
        """
        if chosen is not None and not chosen.all():
            self._add_chosen(source, lengths, chosen)
            return
        for start in range(0, len(lengths), CHUNK):
            some = lengths[start : start + CHUNK]
            self._copy(source, int(some.sum(dtype=np.int64)), hashed)
            self._count(some)

    def _add_chosen(self, source: BinaryIO, lengths: np.ndarray, chosen: np.ndarray) -> None:
        ends = np.cumsum(lengths, dtype=np.int64)
        begins = ends - lengths
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
        for first, after in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            source.seek(int(begins[first]) * self._dtype.itemsize)
            self._copy(source, int(ends[after - 1] - begins[first]))
        self._count(lengths[chosen])

    def _copy(self, source: BinaryIO, tokens: int, hashed: Any = None) -> None:
        left = tokens * self._dtype.itemsize
        while left:
            block = source.read(min(left, COPY_BYTES))
            if not block:
                raise DetourError(f"{source.name}: ended too early; remove it and start again")
            self._bin.write(block)
            self._hash.update(block)
            if hashed is not None:
                hashed.update(block)
            left -= len(block)

    def _count(self, lengths: np.ndarray) -> None:
        self._lengths.write(np.ascontiguousarray(lengths).data)
        self.documents += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))

    def close(self, about: dict[str, Any]) -> Manifest:
        """Writes the index and the manifest, which gets the figures and what `about` says, and flushes all."""
        self._bin.close()
        self._lengths.close()
        lengths = np.memmap(self._at["lengths"], "<i4", "r") if self.documents else np.zeros(0, "<i4")
        write_index(self._at["idx"], lengths, self._dtype)
        binary = {"bytes": self._at["bin"].stat().st_size, "sha256": self._hash.hexdigest()}
        files = {"bin": binary | {"sample": sample_sha256(self._at["bin"])}, "idx": file_facts(self._at["idx"])}
        manifest = Manifest(documents=self.documents, tokens=self.tokens, files=files, **about)
        manifest.write(self._at["manifest.json"])
        for suffix in ("bin", "idx", "manifest.json"):
            flush(self._at[suffix])
        return manifest

    def names(self, prefix: str) -> list[tuple[Path, Path]]:
        """Where the files are and what they are to be called, the manifest last."""
        return [(self._at[suffix], Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx", "manifest.json")]


def publish(folder: Path, prefix: str, plan: str, names: Iterable[tuple[Path, Path]]) -> None:
    """Names finished files of `folder`, in order; what an earlier corpus of the prefix left is removed first."""
    steps = [(source.name, target.name) for source, target in names]
    write_whole(folder / NOTE, json.dumps({"plan": plan, "steps": steps}))
    flush(folder)
    _name(folder, prefix, steps)


def finish_publishing(folder: Path, prefix: str, plan: str) -> Manifest | None:
    """Goes on with a publication of the same plan that was broken off, and returns its manifest; else None."""
    try:
        note = msgspec.convert(read_json(folder / NOTE), Note)
    except (FileNotFoundError, DetourError, msgspec.ValidationError):  # a damaged one is written again by the build
        return None
    plain = all(Path(name).name == name for step in note.steps for name in step)
    if note.plan != plan or not plain or not all(to.startswith(f"{Path(prefix).name}.") for _, to in note.steps):
        return None
    _name(folder, prefix, note.steps)
    return read_manifest(prefix)


def _name(folder: Path, prefix: str, steps: list[tuple[str, str]]) -> None:
    # An old manifest must not vouch for new files, nor an old held-out share for the new corpus. What is not in the
    # folder any more was named before and is new.
    named = {target for source, target in steps if not (folder / source).exists()}
    held_out = held_out_prefix(prefix)
    pictures = (histogram_path(prefix), histogram_path(held_out))
    for old in (*corpus_files(prefix), *corpus_files(held_out), rejects_path(prefix), *pictures):
        if old.name not in named:
            old.unlink(missing_ok=True)
    for source, target in steps:
        if (folder / source).exists():  # else it was named before
            (folder / source).replace(Path(prefix).parent / target)
    flush(Path(prefix).parent)
    (folder / NOTE).unlink()


def published(prefix: str, plan: str, overwrite: bool, held_out: bool = False) -> Manifest | None:
    """The manifest of the same corpus made before. Raises DetourError for another one in the way; else None."""
    prefixes = (prefix, held_out_prefix(prefix)) if held_out else (prefix,)
    there = [path for name in prefixes for path in corpus_files(name) if path.exists()]
    if overwrite or not there:
        return None
    if all(manifest_path(name) in there for name in prefixes):
        manifests = [read_manifest(name) for name in prefixes]
        if all(manifest.plan == plan for manifest in manifests):
            return manifests[0]
    raise DetourError(f"{there[0]}: a corpus is already there; choose another prefix or --overwrite")
