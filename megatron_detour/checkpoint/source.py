"""Read a Hugging Face model's configuration and, from safetensors headers, its weights' names and sizes; no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError
from megatron_detour.structured import parse_json, read_json_object
from megatron_detour.tokenizer.vocabulary import hub_file

WEIGHTS, WEIGHTS_INDEX, PICKLED = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
LONGEST_HEADER = 100_000_000  # bytes; the format's limit
WRAPPED = re.compile(r"(?:module\.|_orig_mod\.)+")  # prefixes of DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class Source:
    """A Hugging Face model: a folder, or a hub id in the local cache, downloaded if `download` allows it."""

    name: str
    download: bool = False

    def file(self, name: str) -> Path:
        """Raise DetourError if the file does not exist."""
        folder = Path(self.name)
        if not folder.is_dir():
            return hub_file(self.name, name, self.download, "model")
        if not (folder / name).is_file():
            raise DetourError(f"{folder}: the folder has no {name}, so it is not a Hugging Face model")
        return folder / name

    def config(self) -> dict[str, Any]:
        return read_json_object(self.file("config.json"))

    def has(self, name: str) -> bool:
        try:
            return self.file(name).is_file()
        except DetourError:
            return False

    def weight_files(self) -> list[Path]:
        """Raise DetourError if the model has no safetensors files."""
        if self.has(WEIGHTS):
            return [self.file(WEIGHTS)]
        if self.has(WEIGHTS_INDEX):
            path = self.file(WEIGHTS_INDEX)
            names = read_json_object(path).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
                raise DetourError(f"{path}: weight_map must name a file for each weight; save the model again")
            for name in names.values():
                if Path(name).name != name:
                    raise DetourError(
                        f"{path}: weight_map names {name!r}, which must be a file name in the same folder"
                    )
            return [self.file(name) for name in sorted(set(names.values()))]
        if self.has(PICKLED):
            raise DetourError(
                f"{self.name}: the weights exist only as {PICKLED}, and pickle files are never opened; write "
                f"{WEIGHTS} with transformers: AutoModelForMaskedLM.from_pretrained({self.name!r})"
                ".save_pretrained('another-folder')"
            )
        where = "the folder" if Path(self.name).is_dir() else "the hub's local cache"
        raise DetourError(f"{self.name}: {where} has no {WEIGHTS}; download the model again")


@dataclass(frozen=True)
class StoredWeights:
    """The file, stored name and size of each weight."""

    where: dict[str, tuple[Path, str]]
    sizes: dict[str, tuple[int, ...]]

    @classmethod
    def from_source(cls, source: Source) -> StoredWeights:
        """Read the headers; strip a wrapper's prefix that all names share. Raise DetourError on unreadable files."""
        weights = [(name, path, size) for path in source.weight_files() for name, size in _header(path).items()]
        prefixes = {match[0] if (match := WRAPPED.match(name)) else "" for name, *_ in weights}
        cut = len(prefixes.pop()) if len(prefixes) == 1 else 0
        return cls(
            {name[cut:]: (path, name) for name, path, _ in weights}, {name[cut:]: size for name, _, size in weights}
        )

    def check(self, sizes: dict[str, tuple[int, ...]], origin: str) -> None:
        """Raise DetourError unless every parameter exists with its size."""
        for name, size in sizes.items():
            stored = self.sizes.get(name)
            if stored is None:
                raise DetourError(f"{origin}: the weights have no {name}; {self._why_missing(name, sizes)}")
            if stored != size:
                raise DetourError(f"{origin}: {name} has size {stored}, but config.json implies {size}")

    def _why_missing(self, name: str, wanted: dict[str, tuple[int, ...]]) -> str:
        if name.partition(".")[2] in self.sizes:
            return (
                "this encoder has no masked-LM head (it was saved by AutoModel); start from the folder or hub id that "
                "it was loaded from, or from one saved by AutoModelForMaskedLM"
            )
        if not wanted.keys().isdisjoint(self.sizes):
            return "use a model with a masked-LM head, as saved by AutoModelForMaskedLM"
        names = ", ".join(sorted(self.sizes)[:2]) or "nothing"
        return f"their names differ ({names}, ...); save the model with AutoModelForMaskedLM's save_pretrained"


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """Return sizes by name. Raise DetourError unless this is an intact safetensors file."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, LONGEST_HEADER))
        whole = path.stat().st_size
    except OSError as error:
        raise DetourError(f"{path}: cannot read: {error.strerror}") from None
    if not 2 <= length <= LONGEST_HEADER or len(text) < length:
        raise DetourError(f"{path}: not a safetensors file, or truncated; download or save the model again")
    header = parse_json(text.decode("utf-8", "replace"), str(path))
    if not isinstance(header, dict):
        raise DetourError(f"{path}: not a safetensors file; download or save the model again")
    header.pop("__metadata__", None)
    sizes = {name: _size(entry, whole - 8 - length) for name, entry in header.items()}
    for name, size in sizes.items():
        if size is None:
            raise DetourError(f"{path}: truncated or damaged at weight {name!r}; download or save the model again")
    return sizes


def _size(entry: Any, bytes_of_data: int) -> tuple[int, ...] | None:
    """Return the size in a header's entry; None if the entry is invalid or its data lie beyond the file's end."""
    try:
        size, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
        valid = all(type(n) is int and n >= 0 for n in (*size, start, end)) and start <= end <= bytes_of_data
        return size if valid and math.prod(size) <= end - start else None
    except (TypeError, KeyError, ValueError):
        return None
