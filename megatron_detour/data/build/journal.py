"""The folder of an unfinished build, beside the corpus.

A part's files bear its key, which names all that its ids depend on: a build that was broken off goes on with what is
there, and changed input or options make other keys.

    .NAME.building/KEY.bin      ids of a part
    .NAME.building/KEY.length   and other columns: a value a document
    .NAME.building/KEY.json     its Counts, written last: a part without it was never finished
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_detour.data.sources import Part
from megatron_detour.errors import DetourError
from megatron_detour.files import write_whole

COLUMNS = {"length": ("<i4", ()), "held_out": ("?", ()), "hash": ("<u8", (2,)), "bands": ("<u8", (-1,))}


@dataclass
class Counts:
    """What became of a part's records: records = documents + empty + rejects + removed."""

    records: list[int] = field(default_factory=list)  # of each stretch
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    rejects: list[tuple[int, int, str]] = field(default_factory=list)  # stretch in the part, record in it, reason
    removed: Counter[str] = field(default_factory=Counter)  # by reason
    columns: list[str] = field(default_factory=list)


class Journal:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.folder = Path(prefix).parent / f".{Path(prefix).name}.building"

    @contextlib.contextmanager
    def lock(self, shard: int | None) -> Iterator[None]:
        """Keeps two builds of a corpus, or of a shard, from running at once. Raises DetourError."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            self._take(stack, "lock", fcntl.LOCK_EX if shard is None else fcntl.LOCK_SH)
            if shard is not None:
                self._take(stack, f"lock-{shard}", fcntl.LOCK_EX)
            yield

    def _take(self, stack: contextlib.ExitStack, name: str, kind: int) -> None:
        file = stack.enter_context((self.folder / name).open("w"))
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DetourError(f"{self.prefix}: another build of it is running ({self.folder / name} is held)") from None
        except OSError:
            return  # a file system without locks

    def file(self, part: Part, suffix: str) -> Path:
        return self.folder / f"{part.key}.{suffix}"

    def finish(self, part: Part, counts: Counts) -> None:
        write_whole(self.file(part, "json"), json.dumps(vars(counts)))

    def is_finished(self, part: Part) -> bool:
        return self.file(part, "json").exists()

    def counts(self, part: Part) -> Counts:
        raw = json.loads(self.file(part, "json").read_text(encoding="utf-8"))
        return Counts(**raw | {"removed": Counter(raw["removed"])})

    def column(self, part: Part, name: str) -> np.ndarray:
        """A value a document: length int32, held_out bool, hash uint64 [documents, 2], bands [documents, bands]."""
        dtype, shape = COLUMNS[name]
        return np.fromfile(self.file(part, name), dtype=dtype).reshape(self.counts(part).documents, *shape)

    def any_finished(self) -> bool:
        return any(self.folder.glob("*.json"))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
