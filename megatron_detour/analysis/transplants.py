"""Copy parameter blocks of one model into its twin, to find where a difference between the two resides."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from megatron_detour.analysis.drift import REGIONS, thirds
from megatron_detour.checkpoint.huggingface import TOKENIZER_FILES, save_tensors
from megatron_detour.checkpoint.source import WEIGHTS, Source, StoredWeights
from megatron_detour.checkpoint.store import TOKENIZER, publish
from megatron_detour.errors import DetourError
from megatron_detour.evaluation.models import check_model
from megatron_detour.model.families import Family, read_shape
from megatron_detour.model_parts import SINGLE_PARTS, layers_of

BLOCKS = ("attention", "mlp")
RECORD = "transplant.json"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Transplant:
    """A written transplant: `parameters` of the donor, of `total`, in these `weights`."""

    donor: str
    recipient: str
    parts: tuple[str, ...]
    weights: tuple[str, ...]
    parameters: int
    total: int


def transplant(donor: Path, recipient: Path, parts: Sequence[str], output: Path) -> Transplant:
    """Write the recipient with these parts of the donor as the Hugging Face folder `output`, atomically.

    A part is `layers.N`, `layers.N-M`, a third of the depth (`low`, `mid`, `deep`), `attention` or `mlp` (these modules
    of all layers, without the norms before them), `embeddings`, `final_norm`, `head` or `all`. Tensors keep their names
    and bits; configuration and tokenizer are the recipient's. `transplant.json` beside them records the result.

    Raises DetourError for unknown parts, an existing `output`, and models that are not twins: of one shape, one dtype
    and one tokenizer.
    """
    for folder in (donor, recipient):
        check_model(folder, flag="")
    if os.path.lexists(output):
        raise DetourError(f"{output}: already exists; choose another --output or remove it")
    shape = _common_shape(donor, recipient)
    given, kept = _read(donor), _read(recipient)
    _refuse_differences(given, kept, donor, recipient)
    chosen = names_of(shape, parts)
    # A weight outside the family's, such as a separate copy of the tied decoder, moves with all or not at all.
    moved = {name for name in kept if name in chosen or ("all" in parts and name not in shape.weights)}
    weights = {name: (given if name in moved else kept)[name] for name in kept}
    sizes = {name: tensor.numel() for name, tensor in weights.items()}
    moved_size = sum(sizes[name] for name in moved)
    result = Transplant(str(donor), str(recipient), tuple(parts), tuple(sorted(moved)), moved_size, sum(sizes.values()))

    def write(aside: Path) -> None:
        for name in ("config.json", *TOKENIZER_FILES):
            if (recipient / name).is_file():
                shutil.copyfile(recipient / name, aside / name)
        save_tensors(weights, aside / WEIGHTS)
        (aside / RECORD).write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")

    publish(output, write)
    return result


def names_of(shape: Family, parts: Sequence[str]) -> set[str]:
    """Return the names of the weights of parts. Raises DetourError for a part that the model does not have."""
    names: set[str] = set()
    for part in parts:
        names |= _names_of(shape, part)
    return names


def _names_of(shape: Family, part: str) -> set[str]:
    if part == "all":
        return set(shape.weights)
    if part in BLOCKS:
        prefixes = shape.block_prefixes.get(part)
        if not prefixes:
            raise DetourError(f"{part}: {shape.label} does not say which of its weights these are; name layers instead")
        layers = [f"{shape.layer_prefix}{number}." for number in range(shape.layers)]
        return {name for name in shape.weights if name.startswith(tuple(a + b for a in layers for b in prefixes))}
    if part in REGIONS:
        third = thirds(shape.layers)[part]
        if not third:
            raise DetourError(f"{part}: the model has no such third, but {shape.layers} layers; name layers instead")
        return shape.names_of(tuple(f"layers.{number}" for number in third))
    if part not in SINGLE_PARTS and not layers_of(part):
        known = ", ".join((*BLOCKS, *REGIONS, *SINGLE_PARTS, "all"))
        raise DetourError(f"{part}: no part of a model; give layers.N, layers.N-M, {known}")
    if fault := shape.part_fault(part):
        raise DetourError(f"{part}: {fault}")
    return shape.names_of((part,))


def _common_shape(donor: Path, recipient: Path) -> Family:
    first, second = (read_shape(Source(str(folder)).config(), str(folder)) for folder in (donor, recipient))
    if first != second:
        names = [name for name in vars(second) if vars(first).get(name) != vars(second)[name]] or ["model_type"]
        raise DetourError(f"{donor} and {recipient} differ in {names[0]}: only models of one shape can be transplanted")
    if (donor / TOKENIZER).read_bytes() != (recipient / TOKENIZER).read_bytes():
        raise DetourError(f"{donor} and {recipient} have other tokenizers: the same id is another token in each")
    return second


def _read(folder: Path) -> Tensors:
    """Return all tensors as they are stored."""
    stored = StoredWeights.from_source(Source(str(folder)))
    tensors: Tensors = {}
    for path in sorted({path for ((path, _),) in stored.where.values()}):
        try:
            with safe_open(path, "pt") as file:
                names = {name: there for name, ((where, there),) in stored.where.items() if where == path}
                tensors |= {name: file.get_tensor(there) for name, there in names.items()}
        except SafetensorError as error:
            raise DetourError(f"{path}: not a safetensors file: {error}") from None
    return tensors


def _refuse_differences(given: Tensors, kept: Tensors, donor: Path, recipient: Path) -> None:
    if given.keys() != kept.keys():
        name = sorted(given.keys() ^ kept.keys())[0]
        raise DetourError(f"{donor} and {recipient} are not twins: only one of them has {name}")
    for name, tensor in kept.items():
        if given[name].shape != tensor.shape:
            raise DetourError(f"{donor} and {recipient} are not twins: {name} has another size in each")
        if given[name].dtype != tensor.dtype:
            kinds = " and ".join(str(each.dtype).removeprefix("torch.") for each in (given[name], tensor))
            raise DetourError(f"{donor} and {recipient} are stored as {kinds}; export both with the same --dtype")
