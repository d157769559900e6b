"""The run file as frozen dataclasses. Amounts of tokens are integers here, times seconds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

from megatron_detour.objectives import Objective

Tokens = Annotated[int, "tokens"]  # written as 50B, 100M, 3_145_728 or "3 steps"
Seconds = Annotated[int, "seconds"]  # written as 23h30m, 90s or 3600

SHAPES = ("constant", "linear", "cosine", "1-sqrt")
OPTIMIZER_STATES = ("keep", "reset")
ATTENTION = ("auto", "flash4", "flash3", "flash2", "varlen", "sdpa")
KERNELS = ("auto", "triton", "plain")
RECOMPUTE = ("none", "selective", "full")
SPIKES = ("report", "skip", "ignore")
WANDB_MODES = ("online", "offline")


@dataclass(frozen=True)
class LearningRate:
    """A segment of the schedule: linear warm-up to `peak`, then `shape` over the rest of the phase to its end."""

    peak: float
    warmup: Tokens = 0
    shape: str = "constant"
    end: float | None = None  # absolute; for all shapes but constant
    end_ratio: float | None = None  # the same as a share of the peak

    @property
    def last(self) -> float:
        """The rate at the end of the phase."""
        if self.shape == "constant":
            return self.peak
        return self.end if self.end is not None else self.end_ratio * self.peak


@dataclass(frozen=True)
class BatchWarmup:
    """Steps grow from `start` sequences by `increment` at a time to the phase's batch, in equal shares of `tokens`."""

    start: int
    increment: int
    tokens: Tokens


@dataclass(frozen=True)
class Corpus:
    prefix: str  # of .bin, .idx and .manifest.json
    weight: float = 1.0  # share of sequences, relative to the other corpora


@dataclass(frozen=True)
class Phase:
    name: str
    objective: Objective  # by its name, with its own keys beside it
    tokens: Tokens
    learning_rate: LearningRate
    freeze: tuple[str, ...] = ()  # embeddings, layers.0, layers.0-7, final_norm, head
    optimizer_state: str = "keep"  # Adam's moments at the start of the phase: keep or reset
    sequences: int | None = None  # a step; default: batch.sequences
    micro_sequences: int | None = None  # default: batch.micro_sequences
    batch_warmup: BatchWarmup | None = None
    sequence_length: int | None = None  # default: data.sequence_length
    corpora: tuple[Corpus, ...] | None = None  # default: data.corpora


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
class Data:
    corpora: tuple[Corpus, ...]
    sequence_length: int
    order_seed: int = 42


@dataclass(frozen=True)
class Batch:
    sequences: int  # a step, over all ranks
    micro_sequences: int = 1  # in a forward pass of a rank, about: documents stay whole


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
    keep_every: Tokens | None = None  # those that pass a multiple of this are kept as well


@dataclass(frozen=True)
class Guards:
    """What happens to a step whose loss or gradient is NaN, or stands far above those before it.

    A step that is skipped changes neither weights nor optimiser; its tokens count as consumed.
    """

    spikes: str = "report"  # or skip, or ignore
    sigma: float = 6.0  # standard deviations above the mean that make a spike
    window: int = 128  # steps that mean and deviation are taken of
    patience: int = 10  # skipped steps in a row that end the run


@dataclass(frozen=True)
class Wandb:
    project: str
    entity: str | None = None
    group: str | None = None
    mode: str = "online"


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
    guards: Guards = field(default_factory=Guards)
    time_limit: Seconds | None = None  # of a session: it saves and ends in time
    restart: bool = False  # whether a run whose checkpoints are gone or damaged begins anew; a whole one is resumed
    tensorboard: bool = True
    wandb: Wandb | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings and lists that `from_dict` reads back to an equal RunConfig."""
        whole = dataclasses.asdict(self)
        for phase, own in zip(whole["phases"], self.phases, strict=True):
            phase |= own.objective.to_dict()
        return _plain(whole)

    @property
    def needs_word_boundaries(self) -> bool:
        """Whether a phase asks the tokenizer where words begin."""
        return any(phase.objective.needs_word_boundaries for phase in self.phases)

    def trajectory(self) -> dict[str, Any]:
        """The part of the run file that the weights depend on, flat: two runs that differ here are different runs."""
        whole = self.to_dict()
        chosen = {key: whole[key] for key in ("seed", "model", "data", "phases", "optimizer", "z_loss")}
        chosen["model"].pop("download")
        chosen["batch"] = {"sequences": self.batch.sequences}
        for phase in chosen["phases"]:
            phase.pop("micro_sequences")
        if self.guards.spikes == "skip":
            chosen["guards"] = {key: value for key, value in whole["guards"].items() if key != "patience"}
        return dict(flatten(chosen))


def flatten(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """Plain mappings and lists as pairs of a dotted key and a scalar."""
    if isinstance(value, dict):
        return [pair for name, item in value.items() for pair in flatten(item, join_key(key, name))]
    if isinstance(value, list):
        return [pair for i, item in enumerate(value) for pair in flatten(item, f"{key}.{i}")]
    return [(key, value)]


def join_key(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
