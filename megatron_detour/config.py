"""The run file: one YAML that says everything a run depends on, as frozen dataclasses, checked as a whole.

`load(path, overrides)` reads the file, applies `key=value` overrides and returns a RunConfig, or raises one
DetourError that lists every fault with the key to change. Amounts of tokens may be written as 50B, 100M, 3_145_728
or "3 steps".
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_detour.errors import DetourError, nearest

Tokens = Annotated[int, "tokens"]

OBJECTIVES = ("clm", "mlm")
SHAPES = ("constant", "1-sqrt")
ATTENTION = ("auto", "flash4", "flash3", "flash2", "varlen", "sdpa")
KERNELS = ("auto", "triton", "plain")
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class LearningRate:
    """A segment of the schedule: linear warm-up to `peak`, then `shape` over the rest of the phase."""

    peak: float
    warmup: Tokens = 0
    shape: str = "constant"
    end: float | None = None  # absolute; 1-sqrt only


@dataclass(frozen=True)
class Phase:
    name: str
    objective: str
    tokens: Tokens
    learning_rate: LearningRate
    mask_rate: float | None = None  # share of tokens; mlm only
    whole_word_masking: bool = False  # all tokens of a word or none, at the same share; mlm only


@dataclass(frozen=True)
class Model:
    """Where the encoder comes from: `start`, a Hugging Face folder or hub id, or `config`, a shape to initialise."""

    start: str | None = None
    config: dict[str, Any] | None = (
        None  # keys of transformers' ModernBertConfig; the vocabulary comes from `tokenizer`
    )
    tokenizer: str | None = None  # folder or tokenizer.json; default: the start model's own
    download: bool = False  # whether a hub id may be fetched; otherwise only the local cache is read


@dataclass(frozen=True)
class Corpus:
    prefix: str  # of .bin, .idx and .manifest.json
    weight: float = 1.0  # share of sequences, relative to the other corpora


@dataclass(frozen=True)
class Data:
    corpora: tuple[Corpus, ...]
    sequence_length: int
    order_seed: int = 42


@dataclass(frozen=True)
class Batch:
    sequences: int  # a step, over all ranks
    micro_sequences: int = 1  # a rank and a forward pass


@dataclass(frozen=True)
class Optimizer:
    """AdamW. Each step multiplies a decayed weight by 1 - lr * weight_decay."""

    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.05
    clip: float = 1.0


@dataclass(frozen=True)
class Parallel:
    tensor: int = 1  # ranks that hold a layer together
    sequence: bool = False  # whether they share out the positions between their layers


@dataclass(frozen=True)
class Compute:
    """How it is computed; what is computed does not depend on it, but for rounding."""

    attention: str = "auto"
    kernels: str = "auto"
    recompute: str = "none"  # what the backward pass computes again instead of keeping it


@dataclass(frozen=True)
class Validation:
    """Held-out sequences under masks that never change, so that figures compare across phases and runs."""

    corpora: tuple[Corpus, ...] = ()
    every: Tokens | None = None  # default: at phase boundaries only
    sequences: int = 64
    mask_rate: float = 0.15
    seed: int = 0


@dataclass(frozen=True)
class Checkpoint:
    every: Tokens | None = None  # default: at phase boundaries only
    keep: int = 2  # the newest ones; phase boundaries are always kept


@dataclass(frozen=True)
class RunConfig:
    name: str
    folder: str
    model: Model
    data: Data
    batch: Batch
    phases: tuple[Phase, ...]
    deepspeed: str  # a file of ds_configs/
    seed: int = 17  # corruption and initialisation
    optimizer: Optimizer = field(default_factory=Optimizer)
    z_loss: float = 0.0  # times the squared log-sum-exp of the logits, added to the loss; 0: none
    parallel: Parallel = field(default_factory=Parallel)
    compute: Compute = field(default_factory=Compute)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tensorboard: bool = True

    @property
    def tokens_per_step(self) -> int:
        return self.batch.sequences * self.data.sequence_length

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings and lists that `from_dict` reads back to an equal RunConfig."""
        return _plain(dataclasses.asdict(self))

    def trajectory(self) -> dict[str, Any]:
        """The part of the run file that the weights depend on, flat: two runs that differ here are different runs."""
        whole = self.to_dict()
        chosen = {key: whole[key] for key in ("seed", "model", "data", "phases", "optimizer", "z_loss")}
        chosen["model"].pop("download")
        chosen["batch"] = {"sequences": self.batch.sequences}
        return dict(_flatten(chosen))


def load(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Reads a run file and applies overrides such as ``phases.detour.tokens=1B``. Raises DetourError."""
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DetourError(f"{path}: there is no such run file") from None
    except OSError as error:
        raise DetourError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DetourError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise DetourError(f"{path}: a run file is a YAML mapping with keys such as name, model, data and phases")
    for override in overrides or []:
        _apply(raw, override)
    config = from_dict(raw, str(path))
    return dataclasses.replace(config, deepspeed=_beside(config.deepspeed, path))


def from_dict(raw: dict[str, Any], origin: str = "run file") -> RunConfig:
    """Builds and checks a RunConfig from plain mappings. Raises DetourError with all faults."""
    reader = _Reader(_tokens_per_step(raw))
    config = reader.build(RunConfig, raw, "")
    faults = reader.faults or check(config)
    if faults:
        listing = faults[0] if len(faults) == 1 else f"{len(faults)} faults:\n  - " + "\n  - ".join(faults)
        raise DetourError(f"{origin}: {listing}")
    return config


def check(config: RunConfig) -> list[str]:
    """Faults that no single key shows, one sentence each."""
    return [
        *_check_model(config.model),
        *_check_data(config),
        *_check_compute(config),
        *(fault for i, phase in enumerate(config.phases) for fault in _check_phase(phase, f"phases.{i}")),
        *_check_names(config.phases),
    ]


def as_control(config: RunConfig, mask_rate: float) -> RunConfig:
    """The equal-compute twin: every causal phase becomes MLM at `mask_rate`; data, order and schedule stay.

    It masks whole words where the run file's own mlm phases do.
    """
    if not 0 < mask_rate < 1:
        raise DetourError(f"--control: the mask rate must lie between 0 and 1, it is {mask_rate:g}")
    if not any(phase.objective == "clm" for phase in config.phases):
        raise DetourError("--control: the run file has no clm phase, so there is nothing to replace")
    whole_words = any(phase.whole_word_masking for phase in config.phases)
    masked = {"objective": "mlm", "mask_rate": mask_rate, "whole_word_masking": whole_words}
    phases = tuple(
        dataclasses.replace(phase, **masked) if phase.objective == "clm" else phase for phase in config.phases
    )
    return dataclasses.replace(
        config, name=f"{config.name}-control", folder=f"{config.folder.rstrip('/')}-control", phases=phases
    )


def parse_tokens(value: Any, tokens_per_step: int | None = None) -> int:
    """Reads an amount of tokens: an integer, "50B", "1.5M", "200k" or "3 steps". Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\s*([\d_,]*\.?\d+(?:[eE][+-]?\d+)?)\s*(k|M|B|T|steps?)?\s*", str(value))
    if not match or isinstance(value, bool):
        raise ValueError('an amount of tokens, such as 50B, 100M, 3145728 or "3 steps", is needed')
    number = Fraction(match[1].replace(",", "").replace("_", ""))
    unit = match[2] or ""
    if unit.startswith("step"):
        if tokens_per_step is None:
            raise ValueError("steps need batch.sequences and data.sequence_length, which are missing or wrong")
        scale = tokens_per_step
    else:
        scale = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}[unit]
    if (number * scale).denominator != 1:
        raise ValueError("an amount of tokens must be a whole number")
    return int(number * scale)


def _check_model(model: Model) -> list[str]:
    if (model.start is None) == (model.config is None):
        return ["model: give either start (a folder or hub id) or config (a shape to initialise), and not both"]
    if model.config is not None and model.tokenizer is None:
        return ["model.tokenizer: a model made from model.config needs a tokenizer (a folder or a tokenizer.json)"]
    return []


def _check_data(config: RunConfig) -> list[str]:
    faults = []
    if not config.data.corpora:
        faults.append("data.corpora: at least one corpus is needed")
    for key, corpora in (("data", config.data.corpora), ("validation", config.validation.corpora)):
        faults += [
            f"{key}.corpora.{i}.weight: must be above 0, it is {c.weight:g}; leave the corpus out instead"
            for i, c in enumerate(corpora)
            if not c.weight > 0
        ]
    positive = {
        "data.sequence_length": config.data.sequence_length,
        "batch.sequences": config.batch.sequences,
        "batch.micro_sequences": config.batch.micro_sequences,
        "parallel.tensor": config.parallel.tensor,
        "checkpoint.keep": config.checkpoint.keep,
        "validation.sequences": config.validation.sequences,
        "optimizer.clip": config.optimizer.clip,
        "optimizer.eps": config.optimizer.eps,
    } | {
        key: amount
        for key, amount in (
            ("checkpoint.every", config.checkpoint.every),
            ("validation.every", config.validation.every),
        )
        if amount is not None
    }
    faults += [f"{key}: must be above 0, it is {value}" for key, value in positive.items() if value <= 0]
    seeds = {
        "seed": config.seed,
        "data.order_seed": config.data.order_seed,
        "validation.seed": config.validation.seed,
    }
    faults += [f"{key}: must lie in [0, 2**31), it is {seed}" for key, seed in seeds.items() if not 0 <= seed < 2**31]
    if config.optimizer.weight_decay < 0:
        faults.append(f"optimizer.weight_decay: must not be negative, it is {config.optimizer.weight_decay:g}")
    if not 0 < config.validation.mask_rate < 1:
        faults.append(f"validation.mask_rate: must lie between 0 and 1, it is {config.validation.mask_rate:g}")
    micro, whole = config.batch.micro_sequences, config.batch.sequences
    if micro > 0 and whole % micro:
        faults.append(f"batch.micro_sequences: {micro} does not divide batch.sequences, {whole}")
    if not all(0 <= beta < 1 for beta in config.optimizer.betas):
        faults.append(f"optimizer.betas: both must lie in [0, 1), they are {list(config.optimizer.betas)}")
    return faults


def _check_compute(config: RunConfig) -> list[str]:
    compute, parallel, length = config.compute, config.parallel, config.data.sequence_length
    faults = _check_choice("compute.attention", compute.attention, ATTENTION)
    faults += _check_choice("compute.kernels", compute.kernels, KERNELS)
    faults += _check_choice("compute.recompute", compute.recompute, RECOMPUTE)
    if parallel.sequence and parallel.tensor > 0 and length % parallel.tensor:
        faults.append(
            f"parallel.sequence: data.sequence_length, {length}, is not divisible by parallel.tensor, {parallel.tensor}"
        )
    if config.z_loss < 0:
        faults.append(f"z_loss: must not be negative, it is {config.z_loss:g}")
    return faults


def _check_choice(key: str, value: str, known: tuple[str, ...]) -> list[str]:
    if value in known:
        return []
    return [f"{key}: {value!r} is not one of {', '.join(known)}{nearest(value, list(known))}"]


def _check_phase(phase: Phase, key: str) -> list[str]:
    faults = []
    rate = phase.learning_rate
    if phase.tokens <= 0:
        faults.append(f"{key}.tokens: phase {phase.name!r} has {phase.tokens} tokens; give it some or remove it")
    faults += _check_choice(f"{key}.objective", phase.objective, OBJECTIVES)
    if phase.objective == "mlm" and (phase.mask_rate is None or not 0 < phase.mask_rate < 1):
        faults.append(f"{key}.mask_rate: an mlm phase needs a rate between 0 and 1, it is {phase.mask_rate}")
    if phase.objective == "clm" and phase.mask_rate is not None:
        faults.append(f"{key}.mask_rate: a clm phase masks nothing; remove the key")
    if phase.objective == "clm" and phase.whole_word_masking:
        faults.append(f"{key}.whole_word_masking: a clm phase masks nothing; remove the key")
    if not rate.peak > 0:
        faults.append(f"{key}.learning_rate.peak: must be above 0, it is {rate.peak:g}")
    if not 0 <= rate.warmup <= max(phase.tokens, 0):
        faults.append(f"{key}.learning_rate.warmup: {rate.warmup} tokens do not fit into the phase's {phase.tokens}")
    faults += _check_choice(f"{key}.learning_rate.shape", rate.shape, SHAPES)
    if rate.shape == "1-sqrt" and (rate.end is None or not 0 <= rate.end <= rate.peak):
        faults.append(f"{key}.learning_rate.end: 1-sqrt needs an end between 0 and the peak, it is {rate.end}")
    if rate.shape == "constant" and rate.end is not None:
        faults.append(f"{key}.learning_rate.end: a constant rate has no end; remove the key or set shape: 1-sqrt")
    return faults


def _check_names(phases: tuple[Phase, ...]) -> list[str]:
    if not phases:
        return ["phases: at least one phase is needed"]
    names = [phase.name for phase in phases]
    return [f"phases: the name {name!r} is used twice" for name in sorted({n for n in names if names.count(n) > 1})]


class _Reader:
    """Turns plain mappings into dataclasses by their annotations and collects what does not fit."""

    def __init__(self, tokens_per_step: int | None) -> None:
        self.tokens_per_step = tokens_per_step
        self.faults: list[str] = []

    def build(self, cls: type, raw: Any, key: str) -> Any:
        if not isinstance(raw, dict):
            return self._fault(key, f"a mapping with {', '.join(_names(cls))} is needed, it is {raw!r}")
        hints = get_type_hints(cls, include_extras=True)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in raw:
            if name not in known:
                self._fault(_join(key, name), f"there is no such key{nearest(str(name), list(known))}")
        values = {}
        for name, declared in known.items():
            required = declared.default is dataclasses.MISSING and declared.default_factory is dataclasses.MISSING
            if name in raw:
                values[name] = self._value(hints[name], raw[name], _join(key, name))
            elif required:
                self._fault(_join(key, name), "this key is missing")
        return None if self.faults else cls(**values)

    def _value(self, hint: Any, raw: Any, key: str) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):  # always `X | None`
            return None if raw is None else self._value(arguments[0], raw, key)
        if origin is Annotated:
            try:
                return parse_tokens(raw, self.tokens_per_step)
            except ValueError as error:
                return self._fault(key, f"{error}; it is {raw!r}")
        if dataclasses.is_dataclass(hint):
            return self.build(hint, raw, key)
        if origin is tuple:
            return self._sequence(arguments, raw, key)
        if origin is dict:
            return raw if isinstance(raw, dict) else self._fault(key, f"a mapping is needed, it is {raw!r}")
        return self._scalar(hint, raw, key)

    def _sequence(self, arguments: tuple, raw: Any, key: str) -> Any:
        if not isinstance(raw, list):
            return self._fault(key, f"a list is needed, it is {raw!r}")
        if arguments[-1] is not Ellipsis and len(raw) != len(arguments):
            return self._fault(key, f"{len(arguments)} values are needed, there are {len(raw)}")
        return tuple(self._value(arguments[0], item, f"{key}.{i}") for i, item in enumerate(raw))

    def _scalar(self, hint: type, raw: Any, key: str) -> Any:
        if hint is float and not isinstance(raw, bool):
            try:  # YAML 1.1 reads 2e-4 as a string
                number = float(raw)
            except (TypeError, ValueError, OverflowError):
                return self._fault(key, f"a number is needed, it is {raw!r}")
            return number if math.isfinite(number) else self._fault(key, f"a finite number is needed, it is {raw!r}")
        if type(raw) is not hint:
            wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[hint]
            return self._fault(key, f"{wanted} is needed, it is {raw!r}")
        return raw

    def _fault(self, key: str, text: str) -> None:
        self.faults.append(f"{key or 'run file'}: {text}")


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise DetourError(f"override {override!r}: write it as key=value, for instance phases.detour.tokens=1B")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise DetourError(f"override {override!r}: the value is not YAML") from None
    here: Any = raw
    *way, last = key.split(".")
    for depth, part in enumerate(way):
        if isinstance(here, list):
            here = here[_position(here, part, override)]
        else:
            if here.get(part) is None:
                here[part] = {}
            here = here[part]
        if not isinstance(here, dict | list):
            raise DetourError(f"override {override!r}: {'.'.join(way[: depth + 1])} has no keys of its own")
    if isinstance(here, list):
        here[_position(here, last, override)] = value
    else:
        here[last] = value


def _position(items: list, part: str, override: str) -> int:
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    names = [str(item.get("name", item.get("prefix"))) if isinstance(item, dict) else str(item) for item in items]
    if part in names:
        return names.index(part)
    raise DetourError(f"override {override!r}: {part!r} is neither a number below {len(items)} nor one of {names}")


def _beside(file: str, run_file: Path) -> str:
    """A relative file is looked for from the current folder first, then from the run file's."""
    beside = run_file.parent / file
    return str(beside) if not Path(file).exists() and beside.exists() else file


def _tokens_per_step(raw: dict[str, Any]) -> int | None:
    try:
        product = raw["batch"]["sequences"] * raw["data"]["sequence_length"]
    except (KeyError, TypeError):
        return None
    return product if isinstance(product, int) else None


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _flatten(value: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [pair for name, item in value.items() for pair in _flatten(item, _join(key, name))]
    if isinstance(value, list):
        return [pair for i, item in enumerate(value) for pair in _flatten(item, f"{key}.{i}")]
    return [(key, value)]
