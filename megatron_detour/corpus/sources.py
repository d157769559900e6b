"""Where documents come from: files, folders, globs and Hugging Face datasets, cut into stretches that workers own."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError, brief
from megatron_detour.structured import read_json_object

COMPRESSIONS = (".gz", ".zst")
LINE_KINDS = (".jsonl", ".txt")
KINDS = (*(kind + c for kind in LINE_KINDS for c in ("", *COMPRESSIONS)), ".parquet")
STRETCH_BYTES = 32 << 20
MOST_STRETCHES = 4_096  # in a part
KEY_LENGTH = 24
OWN = (".manifest.json", ".bin", ".idx", ".rejects.jsonl", ".lengths.png")  # what builds leave, perhaps in their input
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
class InputShard:
    """What one worker reads in one go; it depends on the input alone, never on the number of workers.

    `kind` says what `start` and `end` count: "lines" bytes of a plain text file, "compressed" nothing (the whole file),
    "file" nothing (the whole file is one document), "parquet" row groups, "dataset" rows, "streamed" shards.
    """

    kind: str
    path: str
    start: int
    end: int
    size: int  # bytes on the disk, for the progress shown
    state: str = ""  # of the whole input when it was planned: size and time of change, or what a dataset calls itself
    dataset: HubDataset | None = None


@dataclass(frozen=True)
class Part:
    """Consecutive stretches, so that many small files make few parts; what a worker does at a time."""

    key: str  # names everything that its ids depend on: a part of the same key need not be done again
    stretches: tuple[InputShard, ...]

    @property
    def size(self) -> int:
        return sum(stretch.size for stretch in self.stretches)


def shown(path: str) -> str:
    """A path as text: bytes of a name that are not UTF-8 as \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_compressed(name: str) -> bool:
    return name.endswith(COMPRESSIONS)


def is_json_lines(name: str) -> bool:
    return name.endswith(tuple(f".jsonl{compression}" for compression in ("", *COMPRESSIONS)))


def is_text(name: str) -> bool:
    return name.endswith(tuple(f".txt{compression}" for compression in ("", *COMPRESSIONS)))


def check_kind(name: str) -> None:
    """Raises DetourError for a file that is missing or of an unknown kind."""
    if not Path(name).is_file():
        raise DetourError(f"{name}: there is no such input file")
    if not name.endswith(KINDS):
        raise DetourError(f"{name}: an input file must end in {', '.join(KINDS)}; pandas' to_parquet writes one")


def find_inputs(names: list[str], but_not: tuple[Path, ...] = ()) -> tuple[list[str], list[str]]:
    """Files and saved datasets behind files, folders and globs, and the files there that are of no known kind.

    A folder's files are sorted by name, and a file that links give several names is taken once; hidden ones and
    `but_not` are passed over. Raises DetourError for a name that leads to nothing and for an input that two of `names`
    lead to.
    """
    found: list[str] = []
    others: list[str] = []
    for name in names:
        here = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (may be absolute)
        if not here:
            raise DetourError(f"{name}: there is no such input file{' that matches' if '*' in name else ''}")
        if len(here) == 1 and Path(name).is_file():
            check_kind(name)
        paths = [path for place in here for path in (_inside(place) if Path(place).is_dir() else [place])]
        once = {os.path.realpath(path): path for path in reversed(paths)}  # by the first of its names
        skipped = {os.path.realpath(other) for other in but_not}
        mine = [
            path for path in paths if once.pop(os.path.realpath(path), None) and os.path.realpath(path) not in skipped
        ]
        mine = [path for path in mine if not path.endswith(OWN)]
        accepted = [path for path in mine if path.endswith(KINDS) or Path(path).is_dir()]
        if not accepted:
            raise DetourError(f"{name}: no file there ends in {', '.join(KINDS)}")
        found += accepted
        others += [path for path in mine if not path.endswith(KINDS) and Path(path).is_file()]
    twice = [path for path, count in Counter(os.path.realpath(path) for path in found).items() if count > 1]
    if twice:
        raise DetourError(f"{min(twice)}: this input is named twice")
    return found, others


def _inside(folder: str) -> list[str]:
    """The files in a folder and the folders in it, links followed; a saved dataset is one input."""
    found: list[str] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise DetourError(f"{shown(error.filename or folder)}: cannot be read: {error.strerror}")

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        if DATASET_STATE in files or DATASET_SPLITS in files:
            found.append(place)
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [str(Path(place) / name) for name in files if not name.startswith(".")]
    return sorted(found)


def plan_shards(
    inputs: list[str], whole_files: bool = False, split: str | None = None, dataset: HubDataset | None = None
) -> list[InputShard]:
    """Cuts inputs (find_inputs) and a dataset into stretches, in order. Raises DetourError for what does not open."""
    stretches = [stretch for name in inputs for stretch in _stretches_of(name, whole_files, split)]
    return stretches + (list(_hub_stretches(dataset)) if dataset else [])


def plan_parts(stretches: list[InputShard], under: str) -> list[Part]:
    """Groups stretches into parts of at least STRETCH_BYTES; `under` names what else decides on their ids."""
    parts: list[Part] = []
    group: list[InputShard] = []
    size = 0
    for stretch in stretches:
        group.append(stretch)
        size += stretch.size
        if size >= STRETCH_BYTES or len(group) == MOST_STRETCHES or stretch.kind == "streamed":
            parts.append(_part(group, under))
            group, size = [], 0
    return [*parts, _part(group, under)] if group else parts


def _part(stretches: list[InputShard], under: str) -> Part:
    places = [(s.kind, s.path, s.start, s.end, s.state) for s in stretches]
    return Part(hashlib.sha256(json.dumps([under, places]).encode()).hexdigest()[:KEY_LENGTH], tuple(stretches))


def _stretches_of(name: str, whole_files: bool, split: str | None) -> Iterator[InputShard]:
    if Path(name).is_dir():
        yield from _saved_stretches(_saved_split(name, split))
        return
    check_kind(name)
    facts = Path(name).stat()
    size, state = facts.st_size, f"{facts.st_size} {facts.st_mtime_ns}"
    if name.endswith(".parquet"):
        yield from _parquet_stretches(name, state)
    elif is_compressed(name) and not size:
        raise DetourError(f"{name}: cannot be read to its end: it is empty")
    elif whole_files and not is_json_lines(name):
        yield InputShard("file", name, 0, size, size, state)
    elif is_compressed(name):
        yield InputShard("compressed", name, 0, size, size, state)
    else:
        for start in range(0, size, STRETCH_BYTES):
            end = min(start + STRETCH_BYTES, size)
            yield InputShard("lines", name, start, end, end - start, state)


def _parquet_stretches(name: str, state: str) -> Iterator[InputShard]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        groups = read_metadata(name)
    except (ArrowException, OSError) as error:
        raise DetourError(f"{name}: not a Parquet file that can be read: {brief(error)}") from None
    start = size = 0
    for group in range(groups.num_row_groups):
        size += groups.row_group(group).total_byte_size
        if size >= STRETCH_BYTES or group + 1 == groups.num_row_groups:
            yield InputShard("parquet", name, start, group + 1, size, state)
            start, size = group + 1, 0


def _saved_split(name: str, split: str | None) -> str:
    folder = Path(name)
    if (folder / DATASET_STATE).is_file():
        return name
    splits = read_json_object(folder / DATASET_SPLITS).get("splits")
    if not isinstance(splits, list) or not all(map(_is_plain_name, splits)):
        raise DetourError(f"{folder / DATASET_SPLITS}: its splits are not a list of names of folders beside it")
    if split not in splits:
        known = "|".join(splits[:10])
        raise DetourError(f"{name}: a dataset of {len(splits)} splits; choose one with --split {known}")
    return str(folder / split)


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set("/\0") & set(name)


def _saved_stretches(folder: str) -> Iterator[InputShard]:
    if not Path(folder, DATASET_STATE).is_file():
        raise DetourError(f"{folder}: not a dataset of save_to_disk: it has no {DATASET_STATE}")
    files = [file.stat() for file in sorted(Path(folder).iterdir())]
    state = " ".join(f"{file.st_size} {file.st_mtime_ns}" for file in files)
    yield from _row_stretches(folder, len(open_saved(folder)), sum(file.st_size for file in files), state, None)


def _hub_stretches(dataset: HubDataset) -> Iterator[InputShard]:
    opened = open_hub(dataset)
    if dataset.streaming:
        state = json.dumps(sorted(getattr(opened.info, "download_checksums", None) or ()))  # addresses with revisions
        for shard in range(opened.num_shards):
            yield InputShard("streamed", dataset.name, shard, opened.num_shards, 0, state, dataset)
    else:
        size = opened.dataset_size or 0
        yield from _row_stretches(dataset.name, len(opened), size, opened._fingerprint, dataset)


def _row_stretches(name: str, rows: int, size: int, state: str, dataset: HubDataset | None) -> Iterator[InputShard]:
    per_stretch = max(1, rows * STRETCH_BYTES // max(size, 1))
    for start in range(0, rows, per_stretch):
        end = min(start + per_stretch, rows)
        yield InputShard("dataset", name, start, end, size * (end - start) // rows, state, dataset)


def open_saved(folder: str) -> Any:
    """The datasets.Dataset that save_to_disk left in a folder. Raises DetourError."""
    from datasets import load_from_disk

    files = read_json_object(Path(folder, DATASET_STATE)).get("_data_files")
    if not isinstance(files, list) or not all(isinstance(f, dict) and _is_plain_name(f.get("filename")) for f in files):
        raise DetourError(f"{folder}/{DATASET_STATE}: its _data_files are not a list of files beside it")
    try:
        return load_from_disk(folder)
    except Exception as error:  # of pyarrow, datasets and the file system alike
        raise DetourError(f"{folder}: not a dataset of save_to_disk that can be opened: {brief(error)}") from None


def open_hub(dataset: HubDataset) -> Any:
    """A datasets.Dataset or, streaming, an IterableDataset. Raises DetourError; no network unless `download`."""
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = not dataset.download
    try:
        return datasets.load_dataset(dataset.name, dataset.config, split=dataset.split, streaming=dataset.streaming)
    except Exception as error:
        hint = "" if dataset.download else " (without the network, which --download allows)"
        raise DetourError(f"{dataset.name}: the dataset cannot be opened{hint}: {brief(error)}") from None
