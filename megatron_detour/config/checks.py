"""Faults of a run file that no single key shows."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_detour.config.schema import (
    ATTENTION,
    KERNELS,
    OPTIMIZER_STATES,
    RECOMPUTE,
    SHAPES,
    SPIKES,
    WANDB_MODES,
    Phase,
    RunConfig,
)
from megatron_detour.errors import nearest

NAME = re.compile(r"(?!\d+$)[\w -]+")  # what key=value can address
MODULES = re.compile(r"embeddings|final_norm|head|layers\.(\d+)(?:-(\d+))?")
SIZES, LARGEST = ("sequence_length", "sequences", "micro_sequences", "tensor", "keep", "window"), 2**20


@dataclass
class Faults:
    """Sentences with the key that each is about. `unread` are keys without a usable value: nothing is said of them,
    nor of what follows from them."""

    unread: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)

    def unreadable(self, key: str, text: str) -> None:
        """The value of `key` is of the wrong kind or missing."""
        self.unread.append(key)
        self.found.append(f"{key or 'run file'}: {text}")

    def add(self, key: str, text: str, also: Iterable[str] = ()) -> None:
        """`also` are the other keys that the fault follows from."""
        if not any(_related(a, b) for a in (key, *also) for b in self.unread):
            self.found.append(f"{key}: {text}")

    def refuse_unless(self, good: bool, key: str, text: str, also: Iterable[str] = ()) -> None:
        if not good:
            self.add(key, text, also)


def check(config: RunConfig, faults: Faults) -> None:
    """Adds the faults of a config, whose unread keys hold some value of their type."""
    _check_model(config, faults)
    _check_corpora(config, faults)
    _check_numbers(config, faults)
    _check_batches(config, faults)
    _check_choices(config, faults)
    for number, phase in enumerate(config.phases):
        key = f"phases.{number}"
        _check_objective(phase, key, faults)
        _check_rate(phase, key, faults)
        _check_freezing(phase, key, faults)
    _check_names(config, faults)


def _related(a: str, b: str) -> bool:
    return a == b or not b or a.startswith(f"{b}.") or b.startswith(f"{a}.")


def _check_model(config: RunConfig, faults: Faults) -> None:
    model = config.model
    if (model.start is None) == (model.config is None):
        faults.add("model", "give either start (a folder or hub id) or config (a shape to initialise), and not both")
    elif model.config is not None and model.tokenizer is None:
        faults.add("model.tokenizer", "a model made from model.config needs a tokenizer (a folder or a tokenizer.json)")


def _check_corpora(config: RunConfig, faults: Faults) -> None:
    lists = {"data.corpora": config.data.corpora, "validation.corpora": config.validation.corpora}
    lists |= {f"phases.{i}.corpora": p.corpora for i, p in enumerate(config.phases) if p.corpora is not None}
    for key, corpora in lists.items():
        if not corpora and key != "validation.corpora":
            faults.add(key, "at least one corpus is needed")
        for number, corpus in enumerate(corpora):
            faults.refuse_unless(
                corpus.weight > 0,
                f"{key}.{number}.weight",
                f"must be above 0, it is {corpus.weight:g}; leave the corpus out instead",
            )
        prefixes = [corpus.prefix for corpus in corpora]
        for prefix in sorted({prefix for prefix in prefixes if prefixes.count(prefix) > 1}):
            faults.add(key, f"the corpus {prefix!r} is there twice; give it the sum of its weights once")


def _check_numbers(config: RunConfig, faults: Faults) -> None:
    above_zero: dict[str, Any] = {
        "data.sequence_length": config.data.sequence_length,
        "batch.sequences": config.batch.sequences,
        "batch.micro_sequences": config.batch.micro_sequences,
        "parallel.tensor": config.parallel.tensor,
        "checkpoint.keep": config.checkpoint.keep,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "validation.every": config.validation.every,
        "validation.sequences": config.validation.sequences,
        "optimizer.clip": config.optimizer.clip,
        "optimizer.eps": config.optimizer.eps,
        "guards.sigma": config.guards.sigma,
        "guards.patience": config.guards.patience,
        "time_limit": config.time_limit,
    }
    for number, phase in enumerate(config.phases):
        for name in ("sequences", "micro_sequences", "sequence_length"):
            above_zero[f"phases.{number}.{name}"] = getattr(phase, name)
    for key, value in above_zero.items():
        faults.refuse_unless(value is None or value > 0, key, f"must be above 0, it is {value}")
        if key.rpartition(".")[2] in SIZES and value is not None:
            faults.refuse_unless(value <= LARGEST, key, f"must be {LARGEST:,} or less, it is {value:,}")
    seeds = {
        "seed": config.seed,
        "data.order_seed": config.data.order_seed,
        "validation.seed": config.validation.seed,
    }
    for key, seed in seeds.items():
        faults.refuse_unless(0 <= seed < 2**31, key, f"must lie in [0, 2**31), it is {seed}")
    for key, value in (("optimizer.weight_decay", config.optimizer.weight_decay), ("z_loss", config.z_loss)):
        faults.refuse_unless(value >= 0, key, f"must not be negative, it is {value:g}")
    rate, betas, window = config.validation.mask_rate, config.optimizer.betas, config.guards.window
    faults.refuse_unless(0 < rate < 1, "validation.mask_rate", f"must lie between 0 and 1, it is {rate:g}")
    faults.refuse_unless(
        all(0 <= beta < 1 for beta in betas), "optimizer.betas", f"both must lie in [0, 1), they are {list(betas)}"
    )
    faults.refuse_unless(window >= 16, "guards.window", f"must be 16 or more, it is {window}")


def _check_batches(config: RunConfig, faults: Faults) -> None:
    for number, phase in enumerate(config.phases):
        _check_batch_warmup(config, phase, f"phases.{number}.batch_warmup", faults)


def _check_batch_warmup(config: RunConfig, phase: Phase, key: str, faults: Faults) -> None:
    warmup, size = phase.batch_warmup, phase.sequences or config.batch.sequences
    if warmup is None:
        return
    for name in ("start", "increment", "tokens"):
        value = getattr(warmup, name)
        faults.refuse_unless(value > 0, f"{key}.{name}", f"must be above 0, it is {value}")
    if min(warmup.start, warmup.increment, size) <= 0:
        return
    if warmup.start >= size or (size - warmup.start) % warmup.increment:
        faults.add(
            key,
            f"increment {warmup.increment} does not divide {size} - {warmup.start}, the phase's sequences less start",
            ["batch"],
        )
    if warmup.tokens > phase.tokens > 0:
        faults.add(
            f"{key}.tokens",
            f"{warmup.tokens} tokens do not fit into the phase's {phase.tokens}",
            [key.replace("batch_warmup", "tokens")],
        )


def _check_choices(config: RunConfig, faults: Faults) -> None:
    choices = {
        "compute.attention": (config.compute.attention, ATTENTION),
        "compute.kernels": (config.compute.kernels, KERNELS),
        "compute.recompute": (config.compute.recompute, RECOMPUTE),
        "guards.spikes": (config.guards.spikes, SPIKES),
    }
    if config.wandb:
        choices["wandb.mode"] = (config.wandb.mode, WANDB_MODES)
    for number, phase in enumerate(config.phases):
        choices[f"phases.{number}.optimizer_state"] = (phase.optimizer_state, OPTIMIZER_STATES)
        choices[f"phases.{number}.learning_rate.shape"] = (phase.learning_rate.shape, SHAPES)
    for key, (value, known) in choices.items():
        if value not in known:
            faults.add(key, f"{value!r} is not one of {', '.join(known)}{nearest(value, list(known))}")


def _check_objective(phase: Phase, key: str, faults: Faults) -> None:
    if phase.tokens <= 0:
        faults.add(f"{key}.tokens", f"phase {phase.name!r} has {phase.tokens} tokens; give it some or remove it")
    for name, text in phase.objective.faults():
        faults.add(f"{key}.{name}", text, [f"{key}.objective"])


def _check_rate(phase: Phase, key: str, faults: Faults) -> None:
    rate, tokens, key = phase.learning_rate, f"{key}.tokens", f"{key}.learning_rate"
    if not rate.peak > 0:
        faults.add(f"{key}.peak", f"must be above 0, it is {rate.peak:g}")
    if not 0 <= rate.warmup <= max(phase.tokens, 0):
        faults.add(f"{key}.warmup", f"{rate.warmup} tokens do not fit into the phase's {phase.tokens}", [tokens])
    ends = [name for name in ("end", "end_ratio") if getattr(rate, name) is not None]
    related = [f"{key}.{name}" for name in ("shape", "peak", "end", "end_ratio")]
    if rate.shape == "constant":
        for name in ends:
            faults.add(
                f"{key}.{name}", "a constant rate has no end; remove the key or set shape: 1-sqrt", [f"{key}.shape"]
            )
    elif rate.shape in SHAPES:
        if len(ends) == 2:
            faults.add(f"{key}.end_ratio", "set either end or end_ratio", related)
        elif rate.end_ratio is not None and not 0 <= rate.end_ratio <= 1:
            faults.add(f"{key}.end_ratio", f"must lie in [0, 1], it is {rate.end_ratio:g}", related)
        elif not ends or (rate.end is not None and not 0 <= rate.end <= rate.peak):
            faults.add(
                f"{key}.end",
                f"{rate.shape} needs an end between 0 and the peak (or end_ratio), it is {rate.end}",
                related,
            )


def _check_freezing(phase: Phase, key: str, faults: Faults) -> None:
    for number, name in enumerate(phase.freeze):
        match = MODULES.fullmatch(name)
        if not match or (match[2] and int(match[1]) > int(match[2])):
            faults.add(
                f"{key}.freeze.{number}",
                f"{name!r} is none of embeddings, layers.N, layers.N-M, final_norm, head"
                f"{nearest(name, ['embeddings', 'layers.0-7', 'final_norm', 'head'])}",
            )


def _check_names(config: RunConfig, faults: Faults) -> None:
    if not config.phases:
        faults.add("phases", "at least one phase is needed")
    names = [phase.name for phase in config.phases]
    for number, name in enumerate(names):
        key = f"phases.{number}.name"
        if name in names[:number]:
            faults.add(key, f"the name {name!r} is used twice")
        if not NAME.fullmatch(name):
            faults.add(key, f"invalid name {name!r}; use letters, digits, spaces, - and _")
