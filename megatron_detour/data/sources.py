"""Where documents come from: files, folders, globs and Hugging Face datasets, cut into stretches that workers own."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError

COMPRESSIONS = (".gz", ".zst")
LINE_KINDS = (".jsonl", ".txt")
KINDS = (*(kind + c for kind in LINE_KINDS for c in ("", *COMPRESSIONS)), ".parquet")
STRETCH_BYTES = 32 << 20
MOST_STRETCHES = 4_096  # in a part
DATASET_STATE, DATASET_SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk leaves in a folder


@dataclass(frozen=True)
class HubDataset:
    """A dataset that datasets.load_dataset opens: of the Hugging Face hub or a local folder."""

    name: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    download: bool = False


@dataclass(frozen=True)
class Stretch:
    """What one worker reads in one go; it depends on the input alone, never on the number of workers.

    `kind` says what `start` and `end` count: "lines" bytes of a plain text file, "compressed" nothing (the whole file),
    "file" nothing (the whole file is one document), "parquet" row groups, "dataset" rows, "streamed" shards.
    """

    kind: str
    path: str
    start: int
    end: int
    size: int  # bytes on the disk, for the progress shown
    dataset: HubDataset | None = None


@dataclass(frozen=True)
class Part:
    """Consecutive stretches, so that many small files make few parts; what a worker does at a time."""

    key: str  # names everything that its ids depend on: a part of the same key need not be done again
    stretches: tuple[Stretch, ...]

    @property
    def size(self) -> int:
        return sum(stretch.size for stretch in self.stretches)


def is_compressed(name: str) -> bool:
    return name.endswith(COMPRESSIONS)


def check_kind(name: str) -> None:
    """Raises DetourError for a file that is missing or of an unknown kind."""
    if not Path(name).is_file():
        raise DetourError(f"{name}: there is no such input file")
    if not name.endswith(KINDS):
        raise DetourError(f"{name}: an input file must end in {', '.join(KINDS)}")


def find_inputs(names: list[str]) -> list[str]:
    """Files and folders of saved datasets behind files, folders and globs; a folder's files sorted by name.

    Raises DetourError for a name that leads to nothing.
    """
    found: list[str] = []
    for name in names:
        here = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (a pattern may be absolute)
        if not here:
            raise DetourError(f"{name}: there is no such input file")
        before = len(found)
        for path in here:
            found += _inside(Path(path)) if Path(path).is_dir() else _accepted(path, alone=len(here) == 1)
        if len(found) == before:
            raise DetourError(f"{name}: no file there ends in {', '.join(KINDS)}")
    twice = {name for name in found if found.count(name) > 1} if len(set(found)) < len(found) else set()
    if twice:
        raise DetourError(f"{min(twice)}: this input is named twice")
    return found


def _accepted(path: str, alone: bool) -> list[str]:
    """A file named by itself must be of a known kind; among a glob's finds others are passed over."""
    if alone:
        check_kind(path)
    return [path] if path.endswith(KINDS) else []


def _inside(folder: Path) -> list[str]:
    if (folder / DATASET_STATE).is_file() or (folder / DATASET_SPLITS).is_file():
        return [str(folder)]
    return sorted(str(path) for path in folder.rglob("*") if path.is_file() and path.name.endswith(KINDS))


def plan_stretches(
    inputs: list[str], whole_files: bool = False, split: str | None = None, dataset: HubDataset | None = None
) -> list[Stretch]:
    """Cuts inputs (find_inputs) and a dataset into stretches, in order. Raises DetourError for what does not open."""
    stretches = [stretch for name in inputs for stretch in _stretches_of(name, whole_files, split)]
    return stretches + (list(_hub_stretches(dataset)) if dataset else [])


def plan_parts(stretches: list[Stretch], under: str) -> list[Part]:
    """Groups stretches into parts of at least STRETCH_BYTES; `under` names what else decides on their ids."""
    parts: list[Part] = []
    group: list[Stretch] = []
    for stretch in stretches:
        group.append(stretch)
        if sum(s.size for s in group) >= STRETCH_BYTES or len(group) == MOST_STRETCHES:
            parts.append(_part(group, under))
            group = []
    return [*parts, _part(group, under)] if group else parts


def _part(stretches: list[Stretch], under: str) -> Part:
    state = [(dataclasses.astuple(stretch), _state(stretch.path)) for stretch in stretches]
    return Part(hashlib.sha256(json.dumps([under, state]).encode()).hexdigest()[:24], tuple(stretches))


def _state(path: str) -> list[int]:
    """Size and time of change of a file, or of all of a folder's."""
    place = Path(path)
    files = sorted(place.iterdir()) if place.is_dir() else [place] if place.exists() else []
    return [number for file in files for number in (file.stat().st_size, file.stat().st_mtime_ns)]


def _stretches_of(name: str, whole_files: bool, split: str | None) -> Iterator[Stretch]:
    if Path(name).is_dir():
        yield from _dataset_stretches(_saved_split(name, split))
        return
    check_kind(name)
    if name.endswith(".parquet"):
        yield from _parquet_stretches(name)
        return
    size = Path(name).stat().st_size
    if whole_files and ".txt" in Path(name).suffixes:
        yield Stretch("file", name, 0, size, size)
    elif is_compressed(name):
        yield Stretch("compressed", name, 0, size, size)
    else:
        for start in range(0, size, STRETCH_BYTES):
            end = min(start + STRETCH_BYTES, size)
            yield Stretch("lines", name, start, end, end - start)


def _parquet_stretches(name: str) -> Iterator[Stretch]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        groups = read_metadata(name)
    except (ArrowException, OSError) as error:
        raise DetourError(f"{name}: not a Parquet file that can be read: {error}") from None
    start = size = 0
    for group in range(groups.num_row_groups):
        size += groups.row_group(group).total_byte_size
        if size >= STRETCH_BYTES or group + 1 == groups.num_row_groups:
            yield Stretch("parquet", name, start, group + 1, size)
            start, size = group + 1, 0


def _saved_split(name: str, split: str | None) -> str:
    folder = Path(name)
    if (folder / DATASET_STATE).is_file():
        return name
    splits = json.loads((folder / DATASET_SPLITS).read_text(encoding="utf-8"))["splits"]
    if split not in splits:
        raise DetourError(f"{name}: a dataset of {len(splits)} splits; choose one with --split {'|'.join(splits)}")
    return str(folder / split)


def _dataset_stretches(folder: str) -> Iterator[Stretch]:
    size = sum(file.stat().st_size for file in Path(folder).glob("*.arrow"))
    yield from _row_stretches(folder, len(open_saved(folder)), size, None)


def _hub_stretches(dataset: HubDataset) -> Iterator[Stretch]:
    opened = open_hub(dataset)
    if dataset.streaming:
        for shard in range(opened.num_shards):
            yield Stretch("streamed", dataset.name, shard, opened.num_shards, 0, dataset)
    else:
        yield from _row_stretches(dataset.name, len(opened), opened.dataset_size or 0, dataset)


def _row_stretches(name: str, rows: int, size: int, dataset: HubDataset | None) -> Iterator[Stretch]:
    per_stretch = max(1, rows * STRETCH_BYTES // max(size, 1))
    for start in range(0, rows, per_stretch):
        end = min(start + per_stretch, rows)
        yield Stretch("dataset", name, start, end, size * (end - start) // rows, dataset)


def open_saved(folder: str) -> Any:
    """The datasets.Dataset that save_to_disk left in a folder. Raises DetourError."""
    from datasets import load_from_disk

    try:
        return load_from_disk(folder)
    except Exception as error:  # of pyarrow, datasets and the file system alike
        raise DetourError(f"{folder}: not a dataset of save_to_disk that can be opened: {error}") from None


def open_hub(dataset: HubDataset) -> Any:
    """A datasets.Dataset or, streaming, an IterableDataset. Raises DetourError; no network unless `download`."""
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = not dataset.download
    try:
        return datasets.load_dataset(dataset.name, dataset.config, split=dataset.split, streaming=dataset.streaming)
    except Exception as error:
        hint = "" if dataset.download else " (without the network, which --download allows)"
        raise DetourError(f"{dataset.name}: the dataset cannot be opened{hint}: {error}") from None
