"""The run file as frozen dataclasses, with amounts of tokens as integers and times in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from megatron_detour.amounts import Seconds, Tokens
from megatron_detour.model_parts import Part
from megatron_detour.objectives import KINDS as OBJECTIVES
from megatron_detour.objectives import Objective
from megatron_detour.optimizers import DEFAULT as DEFAULT_OPTIMIZER
from megatron_detour.optimizers import KINDS as OPTIMIZERS
from megatron_detour.optimizers import Optimizer
from megatron_detour.optimizers.base import FP32
from megatron_detour.settings import Choice, Enclosing, Entries, Parsed, Pattern, Range, Tagged, join_key, to_plain

SHAPES = ("constant", "linear", "cosine", "1-sqrt")
OPTIMIZER_STATES = ("keep", "reset")
ATTENTION = ("auto", "flash4", "flash3", "flash2", "varlen", "sdpa")
KERNELS = ("auto", "triton", "apex", "plain")
RECOMPUTE = ("none", "selective", "full")
SPIKES = ("report", "skip", "ignore")
WANDB_MODES = ("online", "offline")
AUTO = "auto"

ABOVE_ZERO = Range(above=0)
SIZE = Range(above=0, most=2**20)
SHARE = Range(above=0, below=1)
SEED = Range(least=0, below=2**31)
STEP = Range(least=1)


def _micro_sequences(value: Any, _: Enclosing) -> int | str:
    if value != AUTO and type(value) is not int:
        raise ValueError("an integer or auto")
    if value != AUTO and (must := SIZE.fault(value)):
        raise ValueError(must)
    return value


MicroSequences = Annotated[
    int | str,
    Parsed(_micro_sequences, {"type": ["integer", "string"], "pattern": f"^{AUTO}$"} | SIZE.schema(), (AUTO,)),
]
# Restricted to what key=value can address.
PHASE_NAME = Pattern(r"(?!\d+$)[\w -]+", "a name of letters, digits, spaces, - and _ that is not a number")


@dataclass(frozen=True)
class LearningRate:
    """A segment of the schedule: linear warm-up to `peak`, then `shape` over the rest of the phase to its end."""

    peak: Annotated[float, ABOVE_ZERO, "largest learning rate"]
    warmup: Annotated[Tokens, Range(least=0), "tokens of the linear warm-up from 0"] = 0
    shape: Annotated[str, Choice(SHAPES), "decay from the peak to the end of the phase"] = "constant"
    end: Annotated[
        float | None, Range(least=0), "learning rate at the end of the phase; for all shapes but constant"
    ] = None
    end_ratio: Annotated[float | None, Range(least=0, most=1), "the same as a fraction of the peak"] = None

    @property
    def last(self) -> float:
        """The learning rate at the end of the phase."""
        if self.shape == "constant":
            return self.peak
        return self.end if self.end is not None else self.end_ratio * self.peak


@dataclass(frozen=True)
class BatchWarmup:
    """The batch grows from `start` sequences by `increment` to the phase's size, in stages of equal tokens."""

    start: Annotated[int, SIZE, "sequences of the first steps"]
    increment: Annotated[int, SIZE, "sequences by which steps grow"]
    tokens: Annotated[Tokens, ABOVE_ZERO, "tokens over which they grow, in stages of equal tokens"]


@dataclass(frozen=True)
class Corpus:
    prefix: Annotated[str, "path of the corpus, without .bin, .idx or .manifest.json"]
    weight: Annotated[float, ABOVE_ZERO, "sampling weight, relative to the other corpora"] = 1.0


Corpora = Annotated[tuple[Corpus, ...], Entries(least=1)]


@dataclass(frozen=True)
class Phase:
    name: Annotated[str, PHASE_NAME, "name of the phase"]
    objective: Annotated[Objective, Tagged(OBJECTIVES), "training objective, with its own keys beside it"]
    tokens: Annotated[Tokens, ABOVE_ZERO, "length of the phase"]
    learning_rate: LearningRate
    freeze: Annotated[
        tuple[Part, ...],
        "parts whose weights and optimizer states stay as they are: `embeddings` (also the output layer's weight, if "
        "it is tied to them; else it is the `head`), `layers.N`, `layers.N-M`, `final_norm`, `head`",
    ] = ()
    optimizer_state: Annotated[
        str, Choice(OPTIMIZER_STATES), "the optimizer's states at the start of the phase; `reset` sets them to zero"
    ] = "keep"
    sequences: Annotated[int | None, SIZE, "replaces `batch.sequences`"] = None
    micro_sequences: Annotated[MicroSequences | None, "replaces `batch.micro_sequences`"] = None
    batch_warmup: Annotated[BatchWarmup | None, "growing batch at the start of the phase"] = None
    sequence_length: Annotated[int | None, SIZE, "replaces `data.sequence_length` (see below)"] = None
    corpora: Annotated[
        Corpora | None, "replaces `data.corpora`; each corpus continues where earlier phases stopped reading it"
    ] = None


@dataclass(frozen=True)
class Model:
    """Where the encoder comes from: `start`, a Hugging Face folder or hub id, or `config`, a shape to initialize.

    With both, `config` changes how the start model's positions are read.
    """

    start: Annotated[str | None, "Hugging Face folder or hub id to start from"] = None
    config: Annotated[
        dict[str, Any] | None,
        "or the shape of a model to initialize: keys of its config.json, of a ModernBERT unless `model_type` says "
        "otherwise; the vocabulary comes from `model.tokenizer`. With `model.start`: keys that change its positions, "
        "such as `max_position_embeddings` and `global_rope_theta`",
    ] = None
    tokenizer: Annotated[str | None, "folder or file; by default the start model's, which it may extend"] = None
    download: Annotated[bool, "download a hub id; otherwise only the local cache is read"] = False


@dataclass(frozen=True)
class Data:
    corpora: Annotated[Corpora, "training corpora"]
    sequence_length: Annotated[int, SIZE, "tokens per sequence"]
    order_seed: Annotated[int, SEED, "seed of the order of documents"] = 42


@dataclass(frozen=True)
class Batch:
    sequences: Annotated[int, SIZE, "sequences per step over all ranks; any number of ranks divides any batch"]
    micro_sequences: Annotated[
        MicroSequences,
        "approximate sequences per forward pass of a rank (documents stay whole); `auto`: what fills the GPU, and "
        "fits (section 4)",
    ] = AUTO


@dataclass(frozen=True)
class Optimization:
    """The optimizer and what holds for any: a step multiplies a decayed weight by 1 - lr * weight_decay."""

    kind: Annotated[Optimizer, Tagged(OPTIMIZERS, "name"), "optimizer, with its own keys beside it"] = field(
        default_factory=DEFAULT_OPTIMIZER
    )
    weight_decay: Annotated[float, Range(least=0), "decoupled weight decay"] = 0.05
    clip: Annotated[float, ABOVE_ZERO, "largest gradient norm"] = 1.0
    ema: Annotated[
        float | None,
        SHARE,
        "decay rate of an exponential moving average of the fp32 weights, which training keeps beside them; none "
        "unless set (section 7)",
    ] = None

    @property
    def bytes_per_parameter(self) -> int:
        """The bytes of an element's fp32 weight, states and moving average, among ranks or in a checkpoint."""
        return self.kind.bytes_per_parameter() + (FP32 if self.ema else 0)


@dataclass(frozen=True)
class Parallel:
    tensor: Annotated[int, SIZE, "tensor-parallel size: ranks that split each layer"] = 1
    sequence: Annotated[bool, "sequence parallelism: these ranks also split the positions between their layers"] = False


@dataclass(frozen=True)
class Compute:
    """Backends and recomputation; results differ by rounding only."""

    attention: Annotated[str, Choice(ATTENTION), "attention backend"] = "auto"
    kernels: Annotated[str, Choice(KERNELS), "fused or plain kernels"] = "auto"
    recompute: Annotated[str, Choice(RECOMPUTE), "activations that the backward pass recomputes"] = "none"
    compile: Annotated[bool, "compile the layers with torch.compile, instead of their fused kernels"] = False


@dataclass(frozen=True)
class Validation:
    """Held-out sequences under fixed masks, so that metrics are comparable across phases and runs."""

    corpora: Annotated[tuple[Corpus, ...], "held-out corpora; no validation without them"] = ()
    every: Annotated[Tokens | None, ABOVE_ZERO, "tokens between validations; at phase boundaries only unless set"] = (
        None
    )
    sequences: Annotated[int, SIZE, "held-out sequences"] = 64
    mask_rate: Annotated[float, SHARE, "fraction of their tokens that is masked"] = 0.15
    seed: Annotated[int, SEED, "seed of their masks"] = 0


@dataclass(frozen=True)
class Checkpoint:
    every: Annotated[Tokens | None, ABOVE_ZERO, "tokens between checkpoints; at phase boundaries only unless set"] = (
        None
    )
    keep: Annotated[int, SIZE, "newest checkpoints to keep; those at phase boundaries are always kept"] = 2
    keep_every: Annotated[Tokens | None, ABOVE_ZERO, "also keep checkpoints at multiples of these tokens"] = None


@dataclass(frozen=True)
class Guards:
    """What to do about a step whose loss or gradient norm is NaN, or far above those of previous steps.

    A skipped step changes neither weights nor optimizer; its tokens count as consumed.
    """

    spikes: Annotated[str, Choice(SPIKES), "action on a spike of loss or gradient norm (section 5)"] = "report"
    sigma: Annotated[float, ABOVE_ZERO, "standard deviations above the mean that count as a spike"] = 6.0
    window: Annotated[int, Range(least=16, most=2**20), "steps over which mean and deviation are computed"] = 128
    patience: Annotated[int, ABOVE_ZERO, "skipped steps in a row that end the run"] = 10


@dataclass(frozen=True)
class Profile:
    """torch's profiler over a few steps."""

    steps: Annotated[
        tuple[Annotated[int, STEP], Annotated[int, STEP]],
        "first and last step to record; one trace per rank is written to `profile/` in the run directory",
    ]


@dataclass(frozen=True)
class Wandb:
    project: Annotated[str, "project in Weights & Biases"]
    entity: Annotated[str | None, "team or user"] = None
    group: Annotated[str | None, "group of runs"] = None
    mode: Annotated[str, Choice(WANDB_MODES), "upload metrics immediately, or store them for `wandb sync`"] = "online"


@dataclass(frozen=True)
class RunConfig:
    name: Annotated[str, "name of the run"]
    folder: Annotated[str, "run directory"]
    model: Model
    data: Data
    batch: Batch
    phases: Annotated[tuple[Phase, ...], Entries(least=1), "phases of the run, in order"]
    deepspeed: Annotated[str, "a file of `ds_configs/`: ZeRO-2 in bf16 or fp32"]
    seed: Annotated[int, SEED, "seed of masks and of newly initialized weights"] = 17
    optimizer: Optimization = field(default_factory=Optimization)
    z_loss: Annotated[float, Range(least=0), "weight of the squared log-sum-exp of the logits in the loss"] = 0.0
    parallel: Parallel = field(default_factory=Parallel)
    compute: Compute = field(default_factory=Compute)
    validation: Validation = field(default_factory=Validation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    guards: Guards = field(default_factory=Guards)
    time_limit: Annotated[
        Seconds | None, ABOVE_ZERO, "time limit of a session, such as `23h30m`: it saves and exits in time"
    ] = None
    restart: Annotated[
        bool, "start from scratch if all checkpoints are missing or damaged, instead of refusing; else resume"
    ] = False
    tensorboard: Annotated[bool, "write TensorBoard files"] = True
    wandb: Annotated[Wandb | None, "log to Weights & Biases"] = None
    profile: Annotated[Profile | None, "record a few steps with torch's profiler"] = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain mappings and lists from which `from_dict` builds an equal RunConfig."""
        return to_plain(self)

    def trajectory(self) -> dict[str, Any]:
        """Return the settings that determine the weights, flat: runs that differ here are different runs."""
        whole = self.to_dict()
        chosen = {key: whole[key] for key in ("seed", "model", "data", "phases", "optimizer", "z_loss")}
        chosen["model"].pop("download")
        if self.optimizer.ema is None:  # as in records from before the key existed
            chosen["optimizer"].pop("ema")
        chosen["batch"] = {"sequences": self.batch.sequences}
        for phase in chosen["phases"]:
            phase.pop("micro_sequences")
        if self.guards.spikes == "skip":
            chosen["guards"] = {key: value for key, value in whole["guards"].items() if key != "patience"}
        return dict(flatten(chosen))


def flatten(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """Return plain mappings and lists as pairs of a dotted key and a scalar."""
    if isinstance(value, dict):
        return [pair for name, item in value.items() for pair in flatten(item, join_key(key, name))]
    if isinstance(value, list):
        return [pair for i, item in enumerate(value) for pair in flatten(item, f"{key}.{i}")]
    return [(key, value)]
