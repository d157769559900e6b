"""All checks of a run that are possible before it starts.

`plan`, `doctor` and the check before the launcher print the faults; training raises them. Ranks check the rest:
devices, kernels, each other, the checkpoint to resume. This module does not import torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_detour.checkpoint.source import WEIGHT_FILES, Source, StoredWeights, adjusted_config
from megatron_detour.config import Model, Phase, RunConfig
from megatron_detour.config.deepspeed import check_deepspeed_config, is_bf16
from megatron_detour.data.integrity import open_corpus
from megatron_detour.errors import DetourError, format_faults
from megatron_detour.kernels.requirements import attention_fault, kernels_fault
from megatron_detour.model.families import PUBLISHED, Family, family_to_initialize, read_shape
from megatron_detour.objectives import REFERENCE, Objective
from megatron_detour.plan import Plan, PlannedPhase
from megatron_detour.run_directory import refuse_another_run, refuse_full_disk, stand_in
from megatron_detour.tokenizer.entities import Entities
from megatron_detour.tokenizer.extension import new_pieces
from megatron_detour.tokenizer.vocabulary import Vocabulary, find_tokenizer, load_tokenizer, load_vocabulary
from megatron_detour.tokenizer.word_boundaries import Words


@dataclass(frozen=True)
class Preflight:
    """The inputs of a run, None if they could not be read, and one sentence per fault."""

    model: Model | None = None  # the run file's, or a checkpoint that replaces it if it is missing
    shape: Family | None = None
    vocabulary: Vocabulary | None = None
    words: Words | None = None  # None also if no phase needs word boundaries
    deepspeed: dict[str, Any] | None = None  # the content of the DeepSpeed file
    faults: tuple[str, ...] = ()
    note: str = ""  # the origin of the shape, if not the model itself alone
    new_head: bool = False  # whether the start model has none for masked language modeling
    new_rows: dict[int, list[int]] = field(default_factory=dict)  # ids that model.tokenizer adds: old ids of their text

    def refuse(self) -> Preflight:
        """Return self, or raise DetourError with all faults."""
        if self.faults:
            raise DetourError(format_faults(list(self.faults)))
        return self


def preflight(
    config: RunConfig, plan: Plan, ranks: int | None = None, owns_folder: bool = True, gpu: bool | None = None
) -> Preflight:
    """Check a run file against everything that it names.

    ranks: None if not known yet; owns_folder: whether this process checks the run directory, as the first rank does;
    gpu: whether ranks have GPUs, None if not known yet. Nothing is downloaded unless model.download allows it.
    """
    model = check_model(config, plan)
    deepspeed, faults = check_deepspeed_config(config.deepspeed)
    faults += _backends(config, deepspeed, gpu)
    faults += _packages(config)
    faults += _ranks(config, ranks) if ranks else []
    faults += _corpora(config, plan, model.vocabulary)
    if owns_folder and deepspeed:
        faults += _raised(lambda: refuse_another_run(Path(config.folder), config))
    if owns_folder and model.shape:
        size = config.optimizer.bytes_per_parameter * model.shape.parameters
        faults += _raised(lambda: refuse_full_disk(Path(config.folder), plan, size))
    return replace(model, deepspeed=deepspeed, faults=(*model.faults, *faults))


def check_model(config: RunConfig, plan: Plan) -> Preflight:
    """Check model and tokenizer, and whether the run file fits them."""
    checked = look(config.model, config.phases)
    substitute = stand_in(Path(config.folder), config.model) if checked.faults else None
    checked = look(substitute, config.phases) if substitute else checked
    if checked.shape is None:
        return checked
    fit = [*checked.shape.tensor_parallel_faults(config.parallel.tensor), *_lengths(config, plan, checked.shape)]
    fit += _freezing(config, checked.shape)
    if checked.new_head and all("head" in phase.freeze for phase in config.phases):
        fit.append(
            "phases: `head` is frozen in all of them, and the start model has none: train the new one in a phase"
        )
    return replace(checked, faults=(*checked.faults, *fit))


def look(model: Model, phases: Sequence[Phase] = ()) -> Preflight:
    """Check model and tokenizer on their own, and what the objectives of `phases` need of them."""
    faults: list[str] = []
    vocabulary = _vocabulary(model, {REFERENCE, *(type(phase.objective) for phase in phases)}, faults)
    words = _words(model, vocabulary, phases, faults) if vocabulary else None
    new_rows = _new_rows(model, vocabulary, faults) if vocabulary and model.start and model.tokenizer else {}
    shape, note, new_head = _stored(model, faults) if model.start else (_fresh(model, vocabulary, faults), "", False)
    if new_head:
        note = "without a head for masked language modeling: a new one is trained"
    if shape and new_rows:
        shape = replace(shape, vocabulary=max(shape.vocabulary, vocabulary.size))
        note = "; ".join(filter(None, [note, f"{len(new_rows):,} pieces added"]))
    if shape and vocabulary and vocabulary.size > shape.vocabulary:
        faults.append(
            f"model.tokenizer: {model.tokenizer or model.start}: the tokenizer has {vocabulary.size:,} ids, the "
            f"model's embedding only {shape.vocabulary:,}; use the model's own tokenizer"
        )
    if shape and vocabulary and vocabulary.pad is not None and (fault := shape.padding_fault(vocabulary.pad)):
        faults.append(f"model.{'start' if model.start else 'config'}: {fault}")
    return Preflight(model, shape, vocabulary, words, None, tuple(faults), note, new_head, new_rows)


def _stored(model: Model, faults: list[str]) -> tuple[Family | None, str, bool]:
    """Return the start model's shape, its origin if not the model itself, and whether a new head is needed."""
    source = Source(model.start, model.download)
    try:
        stored = read_shape(source.config(), model.start)
    except DetourError as fault:
        faults.append(f"model.start: {fault}")
        known = PUBLISHED.get(model.start)
        if known is None:
            return None, "", False
        return read_shape(known, model.start), "as published; the model is not available here", False
    try:
        shape = read_shape(adjusted_config(source, model.config), "model.config")
    except DetourError as fault:
        faults.append(str(fault))
        return stored, "", False
    here = Source(model.start)  # a plan does not download the weights, as they are large
    if not model.download or Path(model.start).is_dir() or any(here.has(name) for name in WEIGHT_FILES):
        try:
            missing = StoredWeights.from_source(here, type(shape)).check(stored, model.start, from_start=True)
            return shape, "", bool(missing)
        except DetourError as fault:
            faults.append(f"model.start: {fault}")
    return shape, "", False


def _fresh(model: Model, vocabulary: Vocabulary | None, faults: list[str]) -> Family | None:
    ids = {"vocab_size": vocabulary.size, "pad_token_id": vocabulary.pad} if vocabulary else {}
    try:
        family = family_to_initialize(model.config)
        family.refuse_unknown_keys(model.config)
        described = family.defaults | ids | model.config
        if vocabulary and not model.config.keys() <= family.checked_keys:
            # Only transformers can check these keys; importing it takes seconds, so it is avoided otherwise.
            from megatron_detour.checkpoint.huggingface import fresh_config

            described = fresh_config(model.config, vocabulary)
        return family.read(described, "model.config")
    except DetourError as fault:
        faults.append(str(fault))
        return None


def _vocabulary(model: Model, kinds: Iterable[type[Objective]], faults: list[str]) -> Vocabulary | None:
    name = model.tokenizer or model.start
    try:
        vocabulary = load_vocabulary(name, model.download)
    except DetourError as fault:
        if model.tokenizer:  # otherwise the model is missing, which is already a fault
            faults.append(f"model.tokenizer: {fault}")
        elif Path(name).is_dir():
            faults.append(f"model.start: {fault}")
        return None
    needed = dict.fromkeys([*(role for kind in kinds for role in kind.special_tokens), "pad"])
    missing = [role for role in needed if getattr(vocabulary, role) is None]
    if missing:
        key, tokens = "tokenizer" if model.tokenizer else "start", " and no ".join(f"{role} token" for role in missing)
        keys = " and ".join(f"{role}_token" for role in missing)
        faults.append(
            f"model.{key}: {name}: the tokenizer has no {tokens}, which training requires; name an added token in its "
            f"tokenizer_config.json ({keys}), or use another tokenizer"
        )
    return vocabulary


def _words(model: Model, vocabulary: Vocabulary, phases: Sequence[Phase], faults: list[str]) -> Words | None:
    """Return word boundaries and the entities of all phases, or None if no phase needs them or there are faults."""
    if not any(phase.objective.needs_word_boundaries for phase in phases):
        return None
    tokenizer = find_tokenizer(model.tokenizer or model.start, model.download)
    try:
        words = Words.from_file(tokenizer, vocabulary)
    except DetourError as fault:
        faults.append(str(fault))
        return None
    entities, before = {}, len(faults)
    for file, name in {phase.objective.entities: phase.name for phase in phases if phase.objective.entities}.items():
        try:
            entities[file] = Entities.from_file(file, tokenizer, vocabulary, words)
        except DetourError as fault:
            faults.append(f"phases.{name}.entities: {fault}")
    return replace(words, entities=entities) if len(faults) == before else None


def _new_rows(model: Model, vocabulary: Vocabulary, faults: list[str]) -> dict[int, list[int]]:
    """Return the ids that model.tokenizer adds to the start model's, each with the old ids of its text."""
    try:
        if load_vocabulary(model.start, model.download).sha256 == vocabulary.sha256:
            return {}
    except DetourError:
        return {}  # a missing model is already a fault
    try:
        return new_pieces(*(load_tokenizer(name, model.download) for name in (model.start, model.tokenizer)))
    except DetourError as reason:
        faults.append(
            f"model.tokenizer: {model.tokenizer} is not the tokenizer that {model.start} was trained with, nor an "
            f"extension of it: {reason}; remove the key to use the model's own, or extend that with megatron-detour "
            "extend-tokenizer"
        )
        return {}


def _backends(config: RunConfig, deepspeed: dict[str, Any] | None, gpu: bool | None) -> list[str]:
    half = None if deepspeed is None else is_bf16(deepspeed)
    faults = attention_fault(config.compute.attention, gpu, half), kernels_fault(config.compute.kernels, gpu)
    return [fault for fault in faults if fault]


def _packages(config: RunConfig) -> list[str]:
    """Check the optional packages that a setting requires."""
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb is not None}
    return [
        f"{package}: the package {package} is not installed: pip install {package}, or set {package}: {off}"
        for package, off in (("tensorboard", "false"), ("wandb", "null"))
        if wanted[package] and importlib.util.find_spec(package) is None
    ]


def _ranks(config: RunConfig, ranks: int) -> list[str]:
    tensor = config.parallel.tensor
    if ranks % tensor == 0:
        return []
    return [
        f"parallel.tensor: {tensor} does not divide the number of ranks, {ranks}; start a multiple of {tensor} ranks "
        f"(without GPUs: RANKS={tensor} before the command)"
    ]


def _lengths(config: RunConfig, plan: Plan, shape: Family) -> list[str]:
    lengths = {"data.sequence_length": config.data.sequence_length}
    lengths |= {
        f"phases.{phase.name}.sequence_length": phase.sequence_length
        for phase in plan.phases
        if phase.settings.sequence_length
    }
    return [
        f"{key}: {length:,} exceeds the model's {shape.max_positions:,} positions; set it to "
        f"{shape.max_positions} or less"
        for key, length in lengths.items()
        if length > shape.max_positions
    ]


def _freezing(config: RunConfig, shape: Family) -> Iterator[str]:
    """Yield faults for parts that the model does not have, and for phases that would train nothing."""
    for phase in config.phases:
        for name in phase.freeze:
            if fault := shape.part_fault(name):
                yield f"phases.{phase.name}.freeze: {name!r}: {fault}"
        if shape.names_of(phase.freeze) == shape.weights.keys():
            yield f"phases.{phase.name}.freeze: the whole model is frozen; train some part of it"


def _corpora(config: RunConfig, plan: Plan, vocabulary: Vocabulary | None) -> list[str]:
    """Return faults for corpora that are missing, damaged or of another tokenizer, one per corpus."""
    uses = [(_corpora_key(phase), phase.corpora) for phase in plan.phases]
    uses.append(("validation.corpora", config.validation.corpora))
    keys: dict[str, str] = {}
    for key, corpora in uses:
        for corpus in corpora:
            keys.setdefault(corpus.prefix, key)
    return [
        f"{key}: {fault}"
        for prefix, key in keys.items()
        for fault in _raised(lambda prefix=prefix: open_corpus(prefix, vocabulary))
    ]


def _corpora_key(phase: PlannedPhase) -> str:
    """Return the key of the run file that sets a phase's corpora."""
    return f"phases.{phase.name}.corpora" if phase.settings.corpora else "data.corpora"


def _raised(check: Callable[[], object]) -> list[str]:
    """Return the fault that a check raises, if any."""
    try:
        check()
    except DetourError as fault:
        return [str(fault)]
    except OSError as error:
        return [f"{error.filename}: cannot be read: {error.strerror}"]
    return []
