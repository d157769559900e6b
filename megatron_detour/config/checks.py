"""Faults of a run file that involve several keys; schema.py holds the rules of single keys."""

from __future__ import annotations

from megatron_detour.config.schema import Corpus, Phase, RunConfig
from megatron_detour.settings import Faults


def check(config: RunConfig, faults: Faults) -> None:
    """Add the faults of a config, whose unusable keys hold placeholder values of their type."""
    _check_model(config, faults)
    _check_corpora(config.data.corpora, "data.corpora", faults)
    _check_corpora(config.validation.corpora, "validation.corpora", faults)
    steps = list(config.profile.steps) if config.profile else []
    if steps != sorted(steps):
        faults.add("profile.steps", f"the first step, {steps[0]}, comes after the last one, {steps[1]}")
    names = [phase.name for phase in config.phases]
    for number, phase in enumerate(config.phases):
        key = f"phases.{number}"
        _check_corpora(phase.corpora or (), f"{key}.corpora", faults)
        _check_batch_warmup(phase, phase.sequences or config.batch.sequences, key, faults)
        _check_rate(phase, key, faults)
        for name, text in phase.objective.faults(phase.tokens):
            faults.add(f"{key}.{name}", text, [f"{key}.tokens"])
        if phase.name in names[:number]:
            faults.add(f"{key}.name", f"the name {phase.name!r} is used twice")


def _check_model(config: RunConfig, faults: Faults) -> None:
    model = config.model
    if model.start is None and model.config is None:
        faults.add("model", "set start (a folder or hub id) or config (a shape to initialize)")
    elif model.start is None and model.tokenizer is None:
        faults.add("model.tokenizer", "required with model.config: set it to a folder or a tokenizer.json")


def _check_corpora(corpora: tuple[Corpus, ...], key: str, faults: Faults) -> None:
    prefixes = [corpus.prefix for corpus in corpora]
    for prefix in sorted({prefix for prefix in prefixes if prefixes.count(prefix) > 1}):
        faults.add(key, f"the corpus {prefix!r} is listed twice; list it once, with the sum of its weights")


def _check_batch_warmup(phase: Phase, size: int, key: str, faults: Faults) -> None:
    warmup, tokens, key = phase.batch_warmup, f"{key}.tokens", f"{key}.batch_warmup"
    if warmup is None:
        return
    if warmup.start >= size or (size - warmup.start) % warmup.increment:
        faults.add(
            key,
            f"increment {warmup.increment} does not divide {size} - {warmup.start}, the phase's sequences less start",
            ["batch"],
        )
    if warmup.tokens > phase.tokens:
        faults.add(f"{key}.tokens", f"{warmup.tokens} tokens exceed the phase's {phase.tokens}", [tokens])


def _check_rate(phase: Phase, key: str, faults: Faults) -> None:
    rate, tokens, key = phase.learning_rate, f"{key}.tokens", f"{key}.learning_rate"
    if rate.warmup > phase.tokens:
        faults.add(f"{key}.warmup", f"{rate.warmup} tokens exceed the phase's {phase.tokens}", [tokens])
    ends = [name for name in ("end", "end_ratio") if getattr(rate, name) is not None]
    related = [f"{key}.{name}" for name in ("shape", "peak", "end", "end_ratio")]
    if rate.shape == "constant":
        for name in ends:
            faults.add(
                f"{key}.{name}", "a constant rate has no end; remove the key or set shape: 1-sqrt", [f"{key}.shape"]
            )
    elif len(ends) == 2:
        faults.add(f"{key}.end_ratio", "set either end or end_ratio", related)
    elif not ends or (rate.end is not None and rate.end > rate.peak):
        faults.add(
            f"{key}.end", f"{rate.shape} needs an end between 0 and the peak (or end_ratio), not {rate.end}", related
        )
