"""Peak memory of a rank in bytes, counted from the model's shape.

Symbols: E hidden size, L labeled positions of a micro-batch, t tensor-parallel ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_detour.model.families import Family
from megatron_detour.model.families.base import FULL
from megatron_detour.optimizers import DEFAULT
from megatron_detour.optimizers.base import FP32
from megatron_detour.parallel.shard_spec import CHUNK_ELEMENTS

GB, GIB = 10**9, 1 << 30
CONTEXT = 1 * GB  # CUDA's context, NCCL's and cuBLAS's buffers: outside torch's allocator
SPARE = 0.10  # of the counted bytes: fragmentation, and what the count misses
CARDS = (24, 40, 48, 80, 96, 141)  # GB
ALIGNMENT = 2  # elements; a partition starts at a multiple of it


@dataclass(frozen=True)
class Setting:
    """The settings of a run that determine memory."""

    bf16: bool  # weights and activations, else fp32
    tensor: int = 1
    data: int = 1  # data-parallel ranks
    sequence_parallel: bool = False
    recompute: str = "none"
    flash: bool = True  # FlashAttention, else SDPA
    fused: bool = True  # Triton kernels, else plain ones
    on_gpu: bool = True
    optimizer_bytes: int = DEFAULT.bytes_per_parameter()  # of an element: the fp32 weight and the optimizer's states

    @property
    def item_bytes(self) -> int:
        """Bytes per weight and per activation."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True)
class Load:
    """The fullest micro-batch of a phase."""

    positions: int
    labeled: int
    causal: bool
    frozen_below: int = 0  # layers at the bottom without trainable parameters in or below them


@dataclass(frozen=True)
class Memory:
    """Peak memory of a rank in a step, in bytes, by part; `moment` says when it occurs."""

    parts: dict[str, int]
    moment: str
    on_gpu: bool = True
    counted: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "counted", sum(self.parts.values()))

    @property
    def needed(self) -> int:
        """Bytes including the margin."""
        return round(self.counted * (1 + SPARE)) + (CONTEXT if self.on_gpu else 0)

    def fits(self, gigabytes: float) -> bool:
        return self.needed <= gigabytes * GB


def parameters(shape: Family, tensor: int = 1) -> tuple[int, int]:
    """Return the elements of matrices and of vectors on a rank; with `tensor` 1, of the whole model."""
    matrices = vectors = 0
    for weight in shape.weights.values():
        if weight.is_matrix:
            matrices += weight.elements(tensor)
        else:
            vectors += weight.elements(tensor)
    return matrices, vectors


def partition(groups: tuple[int, ...], data_size: int) -> int:
    """Return the elements of a rank's ZeRO partition of parameter groups, each padded and split evenly."""
    unit = ALIGNMENT * data_size
    return sum(math.ceil(group / unit) * unit // data_size for group in groups)


def peak_memory(shape: Family, setting: Setting, load: Load) -> Memory:
    """Return the peak memory of a rank during a step."""
    item = setting.item_bytes
    elements = parameters(shape, setting.tensor)
    share = partition(elements, setting.data)
    kept = activations(shape, setting, load)
    head = _head(shape, setting, load)
    # Gradients are summed over micro-batches in full, and over ranks into each rank's part.
    gradients = (share * setting.data + (share if setting.data > 1 else 0)) * FP32
    stays = {"weights": sum(elements) * item, "optimizer": share * setting.optimizer_bytes, "gradients": gradients}
    moments = {
        "loss": {"activations": kept, "head and loss": head.kept + head.loss},
        "start of the backward pass": {"activations": kept, "head and loss": head.kept + head.backward},
        "backward pass of a layer": {
            "activations": kept,
            "head and loss": head.gradient,
            "layer workspace": _layer_work(shape, setting, load),
        },
        "checkpoint": {"gathered weights": sum(elements) * FP32 if setting.data > 1 else 0},
    }
    moment, parts = max(moments.items(), key=lambda pair: sum(pair[1].values()))
    return Memory(stays | parts, moment, setting.on_gpu)


def activations(shape: Family, setting: Setting, load: Load) -> int:
    """Return the bytes stored for the backward pass between the embedding and the head."""
    kept = sum(
        _layer_kept(shape, setting, load, kind, setting.recompute) for kind in shape.layer_types[load.frozen_below :]
    )
    E, shared = shape.hidden, setting.tensor if setting.sequence_parallel else 1
    # Input and output (not sharded) of the last norm; selective also stores the embedding's output.
    ends = (
        shape.kept_by_last_norm(setting.fused) // shared + E + (E // shared if setting.recompute == "selective" else 0)
    )
    tables = FP32 * shape.position_values
    inputs = 8 * 3  # ids and positions in int64, and the next micro-batch's ids
    return kept + load.positions * (ends * setting.item_bytes + tables + inputs)


def _layer_kept(shape: Family, setting: Setting, load: Load, kind: str, recompute: str) -> int:
    """Return the bytes that one layer stores for the backward pass."""
    E, t = shape.hidden, setting.tensor
    between, inside = shape.kept_by_layer(recompute, setting.fused)
    between /= t if setting.sequence_parallel else 1
    if recompute == "full":
        return round(load.positions * between * setting.item_bytes)
    inside /= t
    if not setting.flash and kind == FULL:
        inside += E / t  # outputs per document, and concatenated
    elif not setting.flash:
        blocks = 2 if load.causal else 3  # of keys and values for each block of queries, and their mask
        inside += 2 * blocks * E / t + blocks * shape.window
    statistics = (2 if recompute == "none" else 0) * 2 * FP32 + FP32 * shape.heads / t  # norms; log-sum-exps
    return round(load.positions * ((between + inside) * setting.item_bytes + statistics))


def _layer_work(shape: Family, setting: Setting, load: Load) -> int:
    """Bytes of one layer's backward pass: gradients, and what is computed again."""
    between, inside = shape.at_work_in_layer()
    work = load.positions * (inside // setting.tensor + between) * setting.item_bytes
    if setting.recompute == "full":
        work += max(_layer_kept(shape, setting, load, kind, "none") for kind in set(shape.layer_types))
    return work


@dataclass(frozen=True)
class _Head:
    """Bytes of the head: stored for the backward pass, temporary in the loss and at the start of the backward pass, and
    the output weight's gradient, which is kept until the embedding's is added."""

    kept: int
    loss: int
    backward: int
    gradient: int


def _head(shape: Family, setting: Setting, load: Load) -> _Head:
    E, item, L = shape.hidden, setting.item_bytes, load.labeled
    rows = math.ceil(shape.vocabulary / setting.tensor)
    chunk = max(min(CHUNK_ELEMENTS["cuda" if setting.on_gpu else "cpu"] // rows, L), 1)
    several = chunk < L
    kept = L * (shape.kept_by_head() * item + 16)  # and labels and where they are, in int64
    logits = chunk * rows * item
    if setting.on_gpu and not setting.fused:
        logits += 2 * chunk * rows * FP32  # the plain softmax's sums and probabilities
    weight = rows * E
    summed = weight * (FP32 if several else item)
    loss = logits + summed + (weight * item if several and item != FP32 else 0)
    scaled = 0 if item == FP32 else weight * FP32 + weight * item
    return _Head(kept, loss, summed + scaled, weight * item)
