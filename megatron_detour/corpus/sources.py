"""Inputs of a build: files, folders, globs and Hugging Face datasets, split into shards for workers."""

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
SHARD_BYTES = 32 << 20
MAX_SHARDS = 4_096  # in a part
KEY_LENGTH = 24
OUTPUTS = (".manifest.json", ".bin", ".idx", ".rejects.jsonl", ".lengths.png")  # of builds, perhaps in an input folder
DATASET_STATE, DATASET_SPLITS = "state.json", "dataset_dict.json"  # written by save_to_disk


@dataclass(frozen=True)
class HubDataset:
    """A dataset for datasets.load_dataset: on the Hugging Face hub or in a local folder."""

    name: str
    config: str | None = None
    split: str = "train"
    streaming: bool = False
    download: bool = False


@dataclass(frozen=True)
class InputShard:
    """A part of an input that one worker reads; it depends only on the input, not on the number of workers.

    `kind` gives the unit of `start` and `end`: bytes of a plain text file for "lines", row groups for "parquet", rows
    for "dataset", shards for "streamed"; "compressed" and "file" are whole files, the latter one document.
    """

    kind: str
    path: str
    start: int
    end: int
    size: int  # bytes on disk, for the progress display
    state: str = ""  # of the whole input at planning time: size and modification time, or a dataset's fingerprint
    dataset: HubDataset | None = None


@dataclass(frozen=True)
class Part:
    """Consecutive shards, the unit of work: many small files form few parts."""

    key: str  # hash of everything that its ids depend on: a finished part with the same key is reused
    shards: tuple[InputShard, ...]

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)


def printable(path: str) -> str:
    """Return a path with bytes that are not UTF-8 escaped, such as \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def is_compressed(name: str) -> bool:
    return name.endswith(COMPRESSIONS)


def is_json_lines(name: str) -> bool:
    return name.endswith(tuple(f".jsonl{compression}" for compression in ("", *COMPRESSIONS)))


def is_text(name: str) -> bool:
    return name.endswith(tuple(f".txt{compression}" for compression in ("", *COMPRESSIONS)))


def check_kind(name: str) -> None:
    """Raise DetourError for a missing file or an unsupported extension."""
    if not Path(name).is_file():
        raise DetourError(f"{name}: no such input file")
    if not name.endswith(KINDS):
        raise DetourError(
            f"{name}: input files must end in {', '.join(KINDS)}; convert it, e.g. with pandas' to_parquet"
        )


def find_inputs(names: list[str], exclude: tuple[Path, ...] = ()) -> tuple[list[str], list[str]]:
    """Return the files and saved datasets that files, folders and globs name, and the files with another extension.

    A folder's files are sorted by name, and a file with several links is read once; hidden files and `exclude` are
    skipped. Raises DetourError for a name without inputs and for an input that two of `names` lead to.
    """
    inputs: list[str] = []
    unsupported: list[str] = []
    for name in names:
        matches = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (absolute)
        if not matches:
            raise DetourError(f"{name}: {'no input file matches' if '*' in name else 'no such input file'}")
        if len(matches) == 1 and Path(name).is_file():
            check_kind(name)
        paths = [path for match in matches for path in (walk(match) if Path(match).is_dir() else [match])]
        first_names = {os.path.realpath(path): path for path in reversed(paths)}
        skipped = {os.path.realpath(other) for other in exclude}
        paths = [
            path
            for path in paths
            if first_names.pop(os.path.realpath(path), None) and os.path.realpath(path) not in skipped
        ]
        paths = [path for path in paths if not path.endswith(OUTPUTS)]
        accepted = [path for path in paths if path.endswith(KINDS) or Path(path).is_dir()]
        if not accepted:
            raise DetourError(f"{name}: no file ends in {', '.join(KINDS)}")
        inputs += accepted
        unsupported += [path for path in paths if not path.endswith(KINDS) and Path(path).is_file()]
    twice = [path for path, count in Counter(os.path.realpath(path) for path in inputs).items() if count > 1]
    if twice:
        raise DetourError(f"{min(twice)}: this input is given twice")
    return inputs, unsupported


def walk(folder: str) -> list[str]:
    """Return all files below a folder, following links; a saved dataset is one input."""
    inputs: list[str] = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise DetourError(f"{printable(error.filename or folder)}: cannot be read: {error.strerror}")

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        if DATASET_STATE in files or DATASET_SPLITS in files:
            inputs.append(place)
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        inputs += [str(Path(place) / name) for name in files if not name.startswith(".")]
    return sorted(inputs)


def plan_shards(
    inputs: list[str], whole_files: bool = False, split: str | None = None, dataset: HubDataset | None = None
) -> list[InputShard]:
    """Split inputs (from find_inputs) and a dataset into shards, in order. Raises DetourError."""
    shards = [shard for name in inputs for shard in _file_shards(name, whole_files, split)]
    return shards + (list(_hub_shards(dataset)) if dataset else [])


def plan_parts(shards: list[InputShard], under: str) -> list[Part]:
    """Group shards into parts of at least SHARD_BYTES; `under` names everything else that affects their ids."""
    parts: list[Part] = []
    group: list[InputShard] = []
    size = 0
    for shard in shards:
        group.append(shard)
        size += shard.size
        if size >= SHARD_BYTES or len(group) == MAX_SHARDS or shard.kind == "streamed":
            parts.append(_part(group, under))
            group, size = [], 0
    return [*parts, _part(group, under)] if group else parts


def _part(shards: list[InputShard], under: str) -> Part:
    places = [(s.kind, s.path, s.start, s.end, s.state) for s in shards]
    return Part(hashlib.sha256(json.dumps([under, places]).encode()).hexdigest()[:KEY_LENGTH], tuple(shards))


def _file_shards(name: str, whole_files: bool, split: str | None) -> Iterator[InputShard]:
    if Path(name).is_dir():
        yield from _saved_shards(_saved_split(name, split))
        return
    check_kind(name)
    facts = Path(name).stat()
    size, state = facts.st_size, f"{facts.st_size} {facts.st_mtime_ns}"
    if name.endswith(".parquet"):
        yield from _parquet_shards(name, state)
    elif is_compressed(name) and not size:
        raise DetourError(f"{name}: cannot be read to its end: the file is empty")
    elif whole_files and not is_json_lines(name):
        yield InputShard("file", name, 0, size, size, state)
    elif is_compressed(name):
        yield InputShard("compressed", name, 0, size, size, state)
    else:
        for start in range(0, size, SHARD_BYTES):
            end = min(start + SHARD_BYTES, size)
            yield InputShard("lines", name, start, end, end - start, state)


def _parquet_shards(name: str, state: str) -> Iterator[InputShard]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        groups = read_metadata(name)
    except (ArrowException, OSError) as error:
        raise DetourError(f"{name}: not a readable Parquet file: {brief(error)}") from None
    start = size = 0
    for group in range(groups.num_row_groups):
        size += groups.row_group(group).total_byte_size
        if size >= SHARD_BYTES or group + 1 == groups.num_row_groups:
            yield InputShard("parquet", name, start, group + 1, size, state)
            start, size = group + 1, 0


def _saved_split(name: str, split: str | None) -> str:
    folder = Path(name)
    if (folder / DATASET_STATE).is_file():
        return name
    splits = read_json_object(folder / DATASET_SPLITS).get("splits")
    if not isinstance(splits, list) or not all(map(_is_plain_name, splits)):
        raise DetourError(f"{folder / DATASET_SPLITS}: splits must be a list of names of adjacent folders")
    if split not in splits:
        choices = "|".join(splits[:10])
        raise DetourError(f"{name}: the dataset has {len(splits)} splits; choose one with --split {choices}")
    return str(folder / split)


def _is_plain_name(name: Any) -> bool:
    return isinstance(name, str) and name not in ("", ".", "..") and not set("/\0") & set(name)


def _saved_shards(folder: str) -> Iterator[InputShard]:
    if not Path(folder, DATASET_STATE).is_file():
        raise DetourError(f"{folder}: not a dataset written by save_to_disk: it has no {DATASET_STATE}")
    files = [file.stat() for file in sorted(Path(folder).iterdir())]
    state = " ".join(f"{file.st_size} {file.st_mtime_ns}" for file in files)
    yield from _row_shards(folder, len(open_saved(folder)), sum(file.st_size for file in files), state, None)


def _hub_shards(dataset: HubDataset) -> Iterator[InputShard]:
    opened = open_hub(dataset)
    if dataset.streaming:
        state = json.dumps(sorted(getattr(opened.info, "download_checksums", None) or ()))  # URLs with revisions
        for shard in range(opened.num_shards):
            yield InputShard("streamed", dataset.name, shard, opened.num_shards, 0, state, dataset)
    else:
        size = opened.dataset_size or 0
        yield from _row_shards(dataset.name, len(opened), size, opened._fingerprint, dataset)


def _row_shards(name: str, rows: int, size: int, state: str, dataset: HubDataset | None) -> Iterator[InputShard]:
    per_shard = max(1, rows * SHARD_BYTES // max(size, 1))
    for start in range(0, rows, per_shard):
        end = min(start + per_shard, rows)
        yield InputShard("dataset", name, start, end, size * (end - start) // rows, state, dataset)


def open_saved(folder: str) -> Any:
    """Open a datasets.Dataset that save_to_disk has written. Raises DetourError."""
    from datasets import load_from_disk

    files = read_json_object(Path(folder, DATASET_STATE)).get("_data_files")
    if not isinstance(files, list) or not all(isinstance(f, dict) and _is_plain_name(f.get("filename")) for f in files):
        raise DetourError(f"{folder}/{DATASET_STATE}: _data_files must be a list of adjacent files")
    try:
        return load_from_disk(folder)
    except Exception as error:  # of pyarrow, datasets or the file system
        raise DetourError(f"{folder}: cannot open this dataset of save_to_disk: {brief(error)}") from None


def open_hub(dataset: HubDataset) -> Any:
    """Open a datasets.Dataset or, if streaming, an IterableDataset; offline unless `download`. Raises DetourError."""
    import datasets
    import huggingface_hub.constants

    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = not dataset.download
    try:
        return datasets.load_dataset(dataset.name, dataset.config, split=dataset.split, streaming=dataset.streaming)
    except Exception as error:
        hint = "" if dataset.download else " offline (--download allows network access)"
        raise DetourError(f"{dataset.name}: cannot open this dataset{hint}: {brief(error)}") from None
