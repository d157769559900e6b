"""Read a start model's configuration and its weights' names and sizes; no torch, unless the weights are pickled."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour.checkpoint.flexbert import read_flexbert
from megatron_detour.errors import DetourError
from megatron_detour.model.families import DECODER, Family, as_encoder, family_of
from megatron_detour.structured import parse_json, read_json_object
from megatron_detour.tokenizer.vocabulary import hub_file

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX, COMPOSER = "pytorch_model.bin", "pytorch_model.bin.index.json", "*.pt"
FLEXBERT = "*.yaml"
PICKLES = (".bin", ".pt")
WEIGHT_FILES = (WEIGHTS, WEIGHTS_INDEX, PICKLED, PICKLED_INDEX)
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
        """Return config.json, of the encoder that a decoder's weights are trained as, or what FlexBERT has for it."""
        return as_encoder(self._config())

    @property
    def is_decoder(self) -> bool:
        return self._config().get("model_type") == DECODER

    def _config(self) -> dict[str, Any]:
        path = self.config_file()
        return read_flexbert(path) if path.suffix == FLEXBERT[1:] else read_json_object(path)

    def config_file(self) -> Path:
        """Return config.json, or the training file beside a checkpoint of Composer. Raise DetourError for neither."""
        folder = Path(self.name)
        if self.has("config.json") or len([*folder.glob(COMPOSER)]) != 1:
            return self.file("config.json")
        if len(files := [path for path in sorted(folder.glob(FLEXBERT)) if path.is_file()]) == 1:
            return files[0]
        raise DetourError(
            f"{folder}: a checkpoint of Composer needs a config.json beside it, or FlexBERT's training file as the "
            f"only {FLEXBERT}; there are {len(files)}"
        )

    @property
    def is_composers(self) -> bool:
        """Whether the weights are in a file as Composer writes it, which transformers does not open."""
        return self.weight_files()[0].suffix == COMPOSER[1:]

    def has(self, name: str) -> bool:
        try:
            return self.file(name).is_file()
        except DetourError:
            return False

    def weight_files(self) -> list[Path]:
        """Raise DetourError if the model has no files of weights."""
        for single, index in ((WEIGHTS, WEIGHTS_INDEX), (PICKLED, PICKLED_INDEX)):
            if self.has(single):
                return [self.file(single)]
            if not self.has(index):
                continue
            path = self.file(index)
            names = read_json_object(path).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
                raise DetourError(f"{path}: weight_map must name a file for each weight; save the model again")
            for name in names.values():
                if Path(name).name != name:
                    raise DetourError(
                        f"{path}: weight_map names {name!r}, which must be a file name in the same folder"
                    )
            return [self.file(name) for name in sorted(set(names.values()))]
        if len(found := sorted(Path(self.name).glob(COMPOSER))) == 1:
            return found
        where = "the folder" if Path(self.name).is_dir() else "the hub's local cache"
        raise DetourError(
            f"{self.name}: {where} has no {WEIGHTS}, {PICKLED} or single {COMPOSER} file; download the model "
            "again, or save it with transformers if it is in another format"
        )


def adjusted_config(source: Source, given: dict[str, Any] | None) -> dict[str, Any]:
    """Return a start model's config.json with a run file's changes to its positions. Raise DetourError for others."""
    config = source.config()
    return family_of(config, source.name).adjusted(config, given or {})


@dataclass(frozen=True)
class StoredWeights:
    """The files and stored names of each weight, of all its parts in order, and its size."""

    where: dict[str, list[tuple[Path, str]]]
    sizes: dict[str, tuple[int, ...]]

    @classmethod
    def from_source(cls, source: Source, family: type[Family] | None = None) -> StoredWeights:
        """Read the headers; strip a wrapper's prefix that all names share, and name weights as the family does.

        Raise DetourError on unreadable files.
        """
        weights = [(name, path, size) for path in source.weight_files() for name, size in _sizes_in(path).items()]
        prefixes = {match[0] if (match := WRAPPED.match(name)) else "" for name, *_ in weights}
        cut = len(prefixes.pop()) if len(prefixes) == 1 else 0
        parts: dict[str, dict[int, tuple[Path, str, tuple[int, ...]]]] = {}
        for stored, path, size in weights:
            name, part = family.own_name(stored[cut:]) if family else (stored[cut:], 0)
            parts.setdefault(name, {})[part] = (path, stored, size)
        ordered = {name: [by_part[part] for part in sorted(by_part)] for name, by_part in parts.items()}
        return cls(
            {name: [(path, stored) for path, stored, _ in of_name] for name, of_name in ordered.items()},
            {name: _joined([size for *_, size in of_name]) for name, of_name in ordered.items()},
        )

    def check(self, shape: Family, origin: str, from_start: bool = False) -> set[str]:
        """Raise DetourError unless every parameter exists with its size. Return the names of those that do not.

        A start model may lack all of the prediction head, as sentence encoders do.
        """
        head = shape.names_of(("head",)) if from_start else set()
        missing = head if self.sizes.keys().isdisjoint(head) else set()
        for name, size in shape.sizes.items():
            stored = self.sizes.get(name)
            if name in missing:
                continue
            if stored is None:
                raise DetourError(f"{origin}: the weights have no {name}; {self._why_missing(shape)}")
            if stored != size:
                raise DetourError(f"{origin}: {name} has size {stored}, but config.json implies {size}")
        return missing

    def _why_missing(self, shape: Family) -> str:
        if not shape.sizes.keys().isdisjoint(self.sizes):
            return "use a model with a masked-LM head, as saved by AutoModelForMaskedLM"
        names = ", ".join(sorted(self.sizes)[:2]) or "nothing"
        return f"their names differ ({names}, ...); save the model with AutoModelForMaskedLM's save_pretrained"


def _joined(sizes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the size of parts stacked along their first dimension."""
    return sizes[0] if len(sizes) == 1 else (sum(size[0] for size in sizes), *sizes[0][1:])


def _sizes_in(path: Path) -> dict[str, tuple[int, ...]]:
    if path.suffix not in PICKLES:
        return _header(path)
    from megatron_detour.checkpoint.pickled import read_pickle

    return {name: tuple(tensor.shape) for name, tensor in read_pickle(path).items()}


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
