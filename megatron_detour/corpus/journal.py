"""The folder of an unfinished build, beside the corpus.

A part's files bear its key, which names all that its ids depend on: a build that was broken off goes on with what is
there, and changed input or options make other keys. Each file gets its name when it is whole and on the disk.

    .NAME.building/KEY.bin      ids of a part
    .NAME.building/KEY.length   and other columns: a value a document
    .NAME.building/KEY.json     its Counts, written last: a part without it was never finished
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

# The files of a part: one value a token, or one a document.
COLUMNS = {
    "bin": None,  # ids, of the corpus's type
    "length": ("<i4", ()),  # tokens
    "held_out": ("?", ()),
    "keys": ("<u8", (-1, 2)),  # what equal or similar documents have in common
}


@dataclass
class Counts:
    """What became of a part's records: records = documents + empty + rejects + removed."""

    records: list[int] = field(default_factory=list)  # of each stretch
    documents: int = 0
    tokens: int = 0
    unknown: int = 0  # of the tokens
    empty: int = 0
    rejects: list[tuple[int, int, str]] = field(default_factory=list)  # stretch in the part, record in it, reason
    removed: dict[str, int] = field(default_factory=Counter)  # by reason
    bytes: dict[Literal["bin", "length", "held_out", "keys"], int] = field(default_factory=dict)  # of each file


class PartFiles:
    """The files of a part while they are written, under names that no other process has."""

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key
        self._aside = f"{key}.{uuid.uuid4().hex[:12]}.part"
        self._files: dict[str, BinaryIO] = {}

    def append(self, columns: dict[str, np.ndarray]) -> None:
        for name, values in columns.items():
            if name not in self._files:
                self._files[name] = (self._folder / f"{self._aside}.{name}").open("wb")
            self._files[name].write(np.ascontiguousarray(values).data)

    def finish(self) -> dict[str, int]:
        """Brings the files to the disk, names them and returns their sizes."""
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
            file.close()
            Path(file.name).replace(self._folder / f"{self._key}.{name}")
        return sizes

    def discard(self) -> None:
        """Removes what was not finished."""
        for file in self._files.values():
            file.close()
            Path(file.name).unlink(missing_ok=True)


class Journal:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.folder = Path(prefix).parent / f".{Path(prefix).name}.building"

    @contextlib.contextmanager
    def lock(self, shard: int | None = None) -> Iterator[None]:
        """Keeps two builds of a corpus, or of a shard, from doing the same at once. Raises DetourError.

        It spares work and puzzles; where a file system has no locks, parts are still whole, as each is named whole.
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
                    continue  # another build has just removed the folder
                raise DetourError(f"{self.prefix}: no files can be made there: {error.strerror}") from None
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DetourError(
                    f"{self.prefix}: another build of it is running ({self.folder / name} is held)"
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

    def is_finished(self, part: Part) -> bool:
        """Whether a part's entry is there, is one, and its files are as long as it says."""
        try:
            counts = self.counts(part)
            sizes = [self.file(part, name).stat().st_size == size for name, size in counts.bytes.items()]
        except (DetourError, OSError, msgspec.ValidationError):
            return False
        records = len(counts.records) == len(part.stretches)
        rejects = all(0 <= stretch < len(part.stretches) for stretch, _, _ in counts.rejects)
        return all(sizes) and records and rejects and counts.bytes.get("length", 0) == 4 * counts.documents

    def counts(self, part: Part) -> Counts:
        counts = msgspec.convert(read_json(self.file(part, "json")), Counts)
        counts.removed = Counter(counts.removed)
        return counts

    def column(self, part: Part, name: str, documents: int) -> np.ndarray:
        """A column of a part, mapped: [documents], keys [documents, keys, 2]."""
        dtype, shape = COLUMNS[name]
        return np.memmap(self.file(part, name), dtype, "r").reshape(documents, *shape)

    def any_finished(self) -> bool:
        return any(self.folder.glob("?" * KEY_LENGTH + ".json"))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
