"""Publishing a corpus: its files are written under temporary names, synced to disk, then renamed, the manifest last.

A note beside them lists the renames. If they are interrupted, the same build finishes them.
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
from megatron_detour.data.manifest import Manifest, held_out_prefix, manifest_path, read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.files import file_facts, flush, write_whole
from megatron_detour.structured import read_json

COPY_BYTES = 1 << 18  # fits in a cache: hashed, then written
NOTE = "publishing.json"


def rejects_path(prefix: str) -> Path:
    return Path(f"{prefix}.rejects.jsonl")


def histogram_path(prefix: str) -> Path:
    return Path(f"{prefix}.lengths.png")


def corpus_files(prefix: str) -> list[Path]:
    """Return the three files of a corpus, the manifest first."""
    return [manifest_path(prefix), bin_path(prefix), idx_path(prefix)]


class Note(msgspec.Struct):
    """The build to publish, and its renames: current and final names."""

    plan: str
    steps: list[tuple[str, str]]


class CorpusWriter:
    """Writes a corpus as FOLDER/KIND.bin and so on, to be published later."""

    def __init__(self, folder: Path, kind: str, dtype: np.dtype) -> None:
        self._paths = {suffix: folder / f"{kind}.{suffix}" for suffix in ("bin", "idx", "manifest.json", "lengths")}
        self._dtype = dtype
        self._hash = hashlib.sha256()
        self._bin = self._paths["bin"].open("wb")
        self._lengths = self._paths["lengths"].open("wb")
        self.documents = self.tokens = 0

    def add(self, source: BinaryIO, lengths: np.ndarray, chosen: np.ndarray | None = None, digest: Any = None) -> None:
        """Append all documents, or the `chosen` ones, bool [documents].

        `source` contains their ids; lengths: int32 [documents]. `digest` is a hash to update with what is copied.
        """
        if chosen is not None and not chosen.all():
            self._add_chosen(source, lengths, chosen)
            return
        for start in range(0, len(lengths), CHUNK):
            some = lengths[start : start + CHUNK]
            self._copy(source, int(some.sum(dtype=np.int64)), digest)
            self._count(some)

    def _add_chosen(self, source: BinaryIO, lengths: np.ndarray, chosen: np.ndarray) -> None:
        ends = np.cumsum(lengths, dtype=np.int64)
        begins = ends - lengths
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
        for first, after in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            source.seek(int(begins[first]) * self._dtype.itemsize)
            self._copy(source, int(ends[after - 1] - begins[first]))
        self._count(lengths[chosen])

    def _copy(self, source: BinaryIO, tokens: int, digest: Any = None) -> None:
        left = tokens * self._dtype.itemsize
        while left:
            block = source.read(min(left, COPY_BYTES))
            if not block:
                raise DetourError(f"{source.name}: truncated; delete it and run the command again")
            self._bin.write(block)
            self._hash.update(block)
            if digest is not None:
                digest.update(block)
            left -= len(block)

    def _count(self, lengths: np.ndarray) -> None:
        self._lengths.write(np.ascontiguousarray(lengths).data)
        self.documents += len(lengths)
        self.tokens += int(lengths.sum(dtype=np.int64))

    def close(self, fields: dict[str, Any]) -> Manifest:
        """Write the index and the manifest, which includes `fields`, and sync all files to disk."""
        self._bin.close()
        self._lengths.close()
        lengths = np.memmap(self._paths["lengths"], "<i4", "r") if self.documents else np.zeros(0, "<i4")
        write_index(self._paths["idx"], lengths, self._dtype)
        binary = {"bytes": self._paths["bin"].stat().st_size, "sha256": self._hash.hexdigest()}
        files = {"bin": binary | {"sample": sample_sha256(self._paths["bin"])}, "idx": file_facts(self._paths["idx"])}
        manifest = Manifest(documents=self.documents, tokens=self.tokens, files=files, **fields)
        manifest.write(self._paths["manifest.json"])
        for suffix in ("bin", "idx", "manifest.json"):
            flush(self._paths[suffix])
        return manifest

    def renames(self, prefix: str) -> list[tuple[Path, Path]]:
        """Return the current and final paths of the files, the manifest last."""
        return [(self._paths[suffix], Path(f"{prefix}.{suffix}")) for suffix in ("bin", "idx", "manifest.json")]


def publish(folder: Path, prefix: str, plan: str, renames: Iterable[tuple[Path, Path]]) -> None:
    """Rename finished files of `folder` in order, after removing the files of an earlier corpus with this prefix."""
    steps = [(source.name, target.name) for source, target in renames]
    write_whole(folder / NOTE, json.dumps({"plan": plan, "steps": steps}))
    flush(folder)
    _rename(folder, prefix, steps)


def finish_publishing(folder: Path, prefix: str, plan: str) -> Manifest | None:
    """Finish an interrupted publication of the same plan and return its manifest; None if there is none."""
    try:
        note = msgspec.convert(read_json(folder / NOTE), Note)
    except (FileNotFoundError, DetourError, msgspec.ValidationError):  # the build rewrites a damaged note
        return None
    plain = all(Path(name).name == name for step in note.steps for name in step)
    if note.plan != plan or not plain or not all(to.startswith(f"{Path(prefix).name}.") for _, to in note.steps):
        return None
    _rename(folder, prefix, note.steps)
    return read_manifest(prefix)


def _rename(folder: Path, prefix: str, steps: list[tuple[str, str]]) -> None:
    # Remove old files first: an old manifest must not describe new files, nor old held-out documents belong to the new
    # corpus. Files that are no longer in the folder were renamed before the interruption: they are new.
    renamed = {target for source, target in steps if not (folder / source).exists()}
    held_out = held_out_prefix(prefix)
    pictures = (histogram_path(prefix), histogram_path(held_out))
    for old in (*corpus_files(prefix), *corpus_files(held_out), rejects_path(prefix), *pictures):
        if old.name not in renamed:
            old.unlink(missing_ok=True)
    for source, target in steps:
        if (folder / source).exists():  # else it was renamed before
            (folder / source).replace(Path(prefix).parent / target)
    flush(Path(prefix).parent)
    (folder / NOTE).unlink()


def existing_corpus(prefix: str, plan: str, overwrite: bool, held_out: bool = False) -> Manifest | None:
    """Return the manifest of an existing corpus of this plan, if any. Raises DetourError for another corpus."""
    prefixes = (prefix, held_out_prefix(prefix)) if held_out else (prefix,)
    existing = [path for name in prefixes for path in corpus_files(name) if path.exists()]
    if overwrite or not existing:
        return None
    if all(manifest_path(name) in existing for name in prefixes):
        manifests = [read_manifest(name) for name in prefixes]
        if all(manifest.plan == plan for manifest in manifests):
            return manifests[0]
    raise DetourError(f"{existing[0]}: already exists; choose another prefix or add --overwrite")
