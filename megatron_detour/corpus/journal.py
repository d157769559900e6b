"""The folder of an unfinished build, beside the corpus.

A part's files are named by its key, a hash of everything that its ids depend on: an interrupted build reuses its
finished parts, and other input or options give other keys. Files get their names when they are complete and on disk.

    .NAME.building/KEY.bin      ids of a part
    .NAME.building/KEY.length   and other columns: one value per document
    .NAME.building/KEY.json     its Counts, written last: a part without it is unfinished
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec
import numpy as np

from megatron_detour.corpus.sources import KEY_LENGTH, Part
from megatron_detour.errors import DetourError
from megatron_detour.files import write_whole
from megatron_detour.structured import read_json

# The files of a part: one value per token, or one per document.
COLUMNS = {
    "bin": None,  # ids, in the corpus's dtype
    "length": ("<i4", ()),  # tokens
    "held_out": ("?", ()),
    "keys": ("<u8", (-1, 2)),  # hashes that equal or similar documents share
}


@dataclass
class Counts:
    """The fate of a part's records: records = documents + empty + rejects + removed."""

    records: list[int] = field(default_factory=list)  # per shard
    documents: int = 0
    tokens: int = 0
    unknown: int = 0  # of the tokens
    empty: int = 0
    rejects: list[tuple[int, int, str]] = field(
        default_factory=list
    )  # index of the shard in the part, of the record in the shard, reason
    removed: dict[str, int] = field(default_factory=Counter)  # by reason
    bytes: dict[Literal["bin", "length", "held_out", "keys"], int] = field(default_factory=dict)  # of each file


class PartFiles:
    """The files of a part while they are written, under names unique to this process."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._temporary = f"{key}.{uuid.uuid4().hex[:12]}.part"
        self._files: dict[str, BinaryIO] = {}

    def append(self, columns: dict[str, np.ndarray]) -> None:
        for name, values in columns.items():
            if name not in self._files:
                self._files[name] = (self._folder / f"{self._temporary}.{name}").open("wb")
            self._files[name].write(np.ascontiguousarray(values).data)

    def finish(self) -> dict[str, int]:
        """Sync the files to disk, rename them and return their sizes."""
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
            file.close()
            Path(file.name).replace(self._folder / f"{self._key}.{name}")
        return sizes

    def discard(self) -> None:
        """Remove unfinished files."""
        for file in self._files.values():
            file.close()
            Path(file.name).unlink(missing_ok=True)


class Journal:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.folder = Path(prefix).parent / f".{Path(prefix).name}.building"

    @contextlib.contextmanager
    def lock(self, shard: int | None = None) -> Iterator[None]:
        """Keep two builds of a corpus, or of one shard, from running at the same time. Raises DetourError.

        This only avoids duplicate work: without file locks parts are still correct, as renaming is atomic.
        """
        with contextlib.ExitStack() as stack:
            self._take(stack, "lock", fcntl.LOCK_EX if shard is None else fcntl.LOCK_SH)
            if shard is not None:
                self._take(stack, f"lock-{shard}", fcntl.LOCK_EX)
            yield

    def _take(self, stack: contextlib.ExitStack, name: str, kind: int) -> None:
        while True:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((self.folder / name).open("w"))
            except OSError as error:
                if isinstance(error, FileNotFoundError) and self.folder.parent.is_dir():
                    continue  # another build has just deleted the folder
                raise DetourError(f"{self.prefix}: cannot create files there: {error.strerror}") from None
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DetourError(
                    f"{self.prefix}: another build of this corpus is running ({self.folder / name} is locked)"
                ) from None
            except OSError:
                pass  # a file system without locks
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), (self.folder / name).stat()):
                    return

    def begin(self, part: Part) -> PartFiles:
        return PartFiles(self.folder, part.key)

    def file(self, part: Part, suffix: str) -> Path:
        return self.folder / f"{part.key}.{suffix}"

    def finish(self, part: Part, counts: Counts) -> None:
        write_whole(self.file(part, "json"), json.dumps(vars(counts)))

    def finished(self, part: Part) -> Counts | None:
        """Return the counts of a part that has a valid entry and files of the recorded sizes."""
        try:
            counts = self.counts(part)
            sizes = [self.file(part, name).stat().st_size == size for name, size in counts.bytes.items()]
        except (DetourError, OSError, msgspec.ValidationError):
            return None
        records = len(counts.records) == len(part.shards)
        rejects = all(0 <= shard < len(part.shards) for shard, _, _ in counts.rejects)
        whole = all(sizes) and records and rejects and counts.bytes.get("length", 0) == 4 * counts.documents
        return counts if whole else None

    def counts(self, part: Part) -> Counts:
        counts = msgspec.convert(read_json(self.file(part, "json")), Counts)
        counts.removed = Counter(counts.removed)
        return counts

    def column(self, part: Part, name: str, documents: int) -> np.ndarray:
        """Return a memory-mapped column of a part: [documents], for keys [documents, keys, 2]."""
        dtype, shape = COLUMNS[name]
        return np.memmap(self.file(part, name), dtype, "r").reshape(documents, *shape)

    def any_finished(self) -> bool:
        return any(self.folder.glob("?" * KEY_LENGTH + ".json"))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
