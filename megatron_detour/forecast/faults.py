"""What a start would refuse, and what it would do though it makes little sense, each in a sentence."""

from __future__ import annotations

import importlib.util

from megatron_detour.config import Corpus, RunConfig
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.forecast.storage import Disk, Reading, validation_tokens
from megatron_detour.model.flops import Frozen
from megatron_detour.model.shape import Shape
from megatron_detour.model_parts import layers_of
from megatron_detour.plan import Plan, PlannedPhase
from megatron_detour.tokenizer.vocabulary import Vocabulary

MANY_EPOCHS = 4  # from which repeated text teaches clearly less (Muennighoff et al., 2023)
SHORT_OF_WARMUP = 2  # a phase is short when it is less than this many warm-ups long


def of_packages(config: RunConfig) -> list[str]:
    """Of libraries that nothing but a setting needs."""
    wanted = {"tensorboard": config.tensorboard, "wandb": config.wandb is not None}
    return [
        f"{package}: the package {package} is not installed: pip install {package}, or set {package}: {off}"
        for package, off in (("tensorboard", "false"), ("wandb", "null"))
        if wanted[package] and importlib.util.find_spec(package) is None
    ]


def of_ranks(config: RunConfig, ranks: int) -> list[str]:
    """Of ranks and tensor-parallel groups."""
    tensor = config.parallel.tensor
    if ranks % tensor:
        return [f"parallel.tensor: {tensor} does not divide the {ranks} GPUs; start a multiple of {tensor}"]
    return []


def of_shape(config: RunConfig, plan: Plan, shape: Shape) -> list[str]:
    """Of the model's width, positions and layers."""
    tensor, faults = config.parallel.tensor, []
    for what, count in (("attention heads", shape.heads), ("intermediate size", shape.intermediate)):
        if count % tensor:
            fitting = [n for n in range(1, shape.heads + 1) if shape.heads % n == 0 == shape.intermediate % n]
            faults.append(
                f"parallel.tensor: {tensor} does not divide the model's {what}, {count}; "
                f"{', '.join(map(str, fitting))} fit this model"
            )
    if shape.vocabulary < tensor**2:
        faults.append(f"parallel.tensor: {tensor} is too much for a vocabulary of {shape.vocabulary}; set 1")
    lengths = {"data.sequence_length": config.data.sequence_length}
    lengths |= {
        f"phases.{phase.name}.sequence_length": phase.sequence_length
        for phase in plan.phases
        if phase.settings.sequence_length
    }
    for key, length in lengths.items():
        if length > shape.max_positions:
            faults.append(
                f"{key}: {length:,} is more than the model's {shape.max_positions:,} positions; set it to "
                f"{shape.max_positions} or less"
            )
    for phase in config.phases:
        for name in phase.freeze:
            if layers_of(name).stop > shape.layers:
                faults.append(
                    f"phases.{phase.name}.freeze: {name!r}: the model has {shape.layers} layers, 0 to "
                    f"{shape.layers - 1}"
                )
    for phase in plan.phases:
        frozen = Frozen.of(phase.settings.freeze)
        ends = frozen.embeddings and frozen.head and "final_norm" in phase.settings.freeze
        if ends and frozen.layers >= set(range(shape.layers)):
            faults.append(f"phases.{phase.name}.freeze: the whole model is frozen; leave something to train")
    return faults


def of_corpora(config: RunConfig, plan: Plan, vocabulary: Vocabulary | None) -> list[str]:
    """Of corpora that are not there, not whole, or of another tokenizer; each is told once."""
    uses = [(phase_key(phase), phase.corpora) for phase in plan.phases]
    uses.append(("validation.corpora", config.validation.corpora))
    faults, told = [], set()
    for key, corpora in uses:
        for corpus in corpora:
            fault = None if corpus.prefix in told else _of_corpus(corpus, vocabulary)
            told.add(corpus.prefix)
            if fault:
                faults.append(f"{key}: {fault}")
    return faults


def phase_key(phase: PlannedPhase) -> str:
    return f"phases.{phase.name}.corpora" if phase.settings.corpora else "data.corpora"


def _of_corpus(corpus: Corpus, vocabulary: Vocabulary | None) -> str | None:
    try:
        manifest = read_manifest(corpus.prefix)
    except DetourError as fault:
        return str(fault)
    except OSError as error:
        return f"{corpus.prefix}: cannot be read: {error.strerror}"
    if vocabulary and manifest.tokenizer["sha256"] != vocabulary.sha256:
        return (
            f"{corpus.prefix}: built with another tokenizer (sha256 {manifest.tokenizer['sha256'][:12]}) than the "
            f"run's ({vocabulary.sha256[:12]}); build it again with the run's"
        )
    return None


def warnings(config: RunConfig, plan: Plan, readings: list[Reading], disk: Disk | None) -> list[str]:
    """What a run does without a word, and what is seldom meant."""
    found = [_of_end(plan), *_of_phases(plan), _of_validation(config)]
    for reading in readings:
        if reading.epochs and reading.epochs > MANY_EPOCHS:
            found.append(
                f"{reading.prefix}: is read {reading.epochs:.1f} times; above {MANY_EPOCHS} epochs repeated text "
                "teaches less and less: lower its weight or the phases' tokens, or add text"
            )
    if disk and disk.free is not None and disk.needed > disk.free:
        found.append(
            f"folder: {config.folder}: {disk.checkpoints} checkpoints of {disk.checkpoint / 1e9:.2f} GB do not fit "
            f"into the {disk.free / 1e9:.1f} GB that are free; lower checkpoint.keep or set another folder"
        )
    return [warning for warning in found if warning]


def _of_end(plan: Plan) -> str | None:
    last = plan.phases[-1]
    if last.objective.detour:
        return (
            f"phases: the last one, {last.name}, trains {last.objective.label}; an encoder needs an mlm phase at the "
            "end (a tenth of the tokens in the paper)"
        )
    if plan.has_detour and last.learning_rate.shape == "constant":
        return (
            f"phases.{last.name}.learning_rate: stays at {last.learning_rate.peak:g}; a return to mlm wants a decay: "
            "shape: 1-sqrt with an end"
        )
    return None


def _of_phases(plan: Plan) -> list[str]:
    found = []
    for phase in plan.phases:
        key, warmup = f"phases.{phase.name}", phase.learning_rate.warmup
        if warmup and phase.tokens < SHORT_OF_WARMUP * warmup:
            found.append(
                f"{key}.learning_rate.warmup: {warmup:,} tokens are {warmup / phase.tokens:.0%} of the phase's "
                f"{phase.tokens:,}; shorten the warm-up"
            )
        found += [f"{key}.{name}: {text}" for name, text in phase.objective.warnings()]
        if phase.settings.optimizer_state == "reset" and not warmup:
            found.append(f"{key}.optimizer_state: a reset optimiser starts at the full rate; give learning_rate.warmup")
    return found


def _of_validation(config: RunConfig) -> str | None:
    settings = config.validation
    if not settings.corpora:
        return (
            "validation.corpora: none, so nothing tells how the model does on text it has not seen; hold out a share "
            "with megatron-detour preprocess --held-out 0.01"
        )
    tokens, wanted = validation_tokens(settings.corpora), settings.sequences * config.data.sequence_length
    if tokens is not None and tokens < wanted:
        return (
            f"validation.sequences: {settings.sequences} x {config.data.sequence_length:,} tokens are more than the "
            f"{tokens:,} of the held-out corpora, which are read more than once; "
            f"{tokens // config.data.sequence_length} sequences are there"
        )
    return None
