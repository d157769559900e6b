"""What a run would do though it is seldom meant, a sentence each."""

from __future__ import annotations

from megatron_detour.config import RunConfig
from megatron_detour.forecast.storage import Disk, Reading, validation_tokens
from megatron_detour.plan import Plan

MANY_EPOCHS = 4  # from which repeated text teaches clearly less (Muennighoff et al., 2023)
SHORT_OF_WARMUP = 2  # a phase is short when it is less than this many warm-ups long


def warnings(config: RunConfig, plan: Plan, readings: list[Reading], disk: Disk | None) -> list[str]:
    """Each names its key and what to do instead; none stops a run."""
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
