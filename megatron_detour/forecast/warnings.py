"""Warnings about settings that are valid but rarely intended."""

from __future__ import annotations

from megatron_detour.config import RunConfig
from megatron_detour.forecast.storage import Disk, Reading, validation_tokens
from megatron_detour.plan import Plan

MANY_EPOCHS = 4  # above which repeated text is clearly less useful (Muennighoff et al., 2023)
SHORT_OF_WARMUP = 2  # warm-ups; a shorter phase is short


def warnings(config: RunConfig, plan: Plan, readings: list[Reading], disk: Disk | None, new_rows: int = 0) -> list[str]:
    """Return one sentence per warning, which names the key and what to do instead.

    new_rows: pieces that model.tokenizer adds to the start model's
    """
    sentences = [_last_phase(plan), *_phases(plan), _validation(config)]
    if new_rows and all("embeddings" in phase.settings.freeze for phase in plan.phases):
        sentences.append(
            f"phases: all of them freeze embeddings, so the {new_rows:,} pieces that model.tokenizer adds are never "
            "trained; leave embeddings free in one"
        )
    for reading in readings:
        if reading.epochs and reading.epochs > MANY_EPOCHS:
            sentences.append(
                f"{reading.prefix}: read {reading.epochs:.1f} times; above {MANY_EPOCHS} epochs repeated text is less "
                "useful: lower its weight or the phases' tokens, or add text"
            )
    if disk and disk.free is not None and disk.needed > disk.free:
        sentences.append(
            f"folder: {config.folder}: {disk.checkpoints} checkpoints of {disk.checkpoint / 1e9:.2f} GB do not fit "
            f"into {disk.free / 1e9:.1f} GB of free space; lower checkpoint.keep or choose another folder"
        )
    return [sentence for sentence in sentences if sentence]


def _last_phase(plan: Plan) -> str | None:
    last = plan.phases[-1]
    if last.objective.detour:
        return (
            f"phases: the last one, {last.name}, trains {last.objective.label}; an encoder needs an mlm phase at the "
            "end (a tenth of the tokens in the paper)"
        )
    if plan.has_detour and last.learning_rate.shape == "constant":
        return (
            f"phases.{last.name}.learning_rate: stays at {last.learning_rate.peak:g}; let it decay after the detour: "
            "set shape: 1-sqrt and an end"
        )
    return None


def _phases(plan: Plan) -> list[str]:
    sentences = []
    for phase in plan.phases:
        key, warmup = f"phases.{phase.name}", phase.learning_rate.warmup
        if warmup and phase.tokens < SHORT_OF_WARMUP * warmup:
            sentences.append(
                f"{key}.learning_rate.warmup: {warmup:,} tokens are {warmup / phase.tokens:.0%} of the phase's "
                f"{phase.tokens:,}; shorten the warm-up"
            )
        sentences += [f"{key}.{name}: {text}" for name, text in phase.objective.warnings()]
        if phase.settings.optimizer_state == "reset" and not warmup:
            sentences.append(
                f"{key}.optimizer_state: a reset optimizer starts at the full learning rate; set learning_rate.warmup"
            )
    return sentences


def _validation(config: RunConfig) -> str | None:
    settings = config.validation
    if not settings.corpora:
        return (
            "validation.corpora: none, so there is no validation loss; hold out documents with "
            "megatron-detour preprocess --held-out 0.01"
        )
    tokens, wanted = validation_tokens(settings.corpora), settings.sequences * config.data.sequence_length
    if tokens is not None and tokens < wanted:
        return (
            f"validation.sequences: {settings.sequences} x {config.data.sequence_length:,} tokens exceed the "
            f"{tokens:,} of the held-out corpora, which are read more than once; "
            f"they have {tokens // config.data.sequence_length} sequences"
        )
    return None
