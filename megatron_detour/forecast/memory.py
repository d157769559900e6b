"""Peak memory of a rank in bytes, counted from the model's shape.

Symbols: E hidden size, G width of the gated unit, L labeled positions of a micro-batch, t tensor-parallel ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from megatron_detour.model.shape import FULL, Shape
from megatron_detour.optimizers import DEFAULT

GB, GIB = 10**9, 1 << 30
CONTEXT = 1 * GB  # CUDA's context, NCCL's and cuBLAS's buffers: outside torch's allocator
SPARE = 0.10  # of the counted bytes: fragmentation, and what the count misses
CARDS = (24, 40, 48, 80, 96, 141)  # GB
CHUNK_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}  # of logits, as in parallel/loss.py
FP32 = 4  # bytes
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


def parameters(shape: Shape, tensor: int = 1) -> tuple[int, int]:
    """Return the elements of matrices and of vectors on a rank; with `tensor` 1, of the whole model."""
    E, G = shape.hidden, shape.intermediate
    vocabulary = math.ceil(shape.vocabulary / tensor)
    matrices = vocabulary * E + E * E + shape.layers * (4 * E * E + 3 * G * E) // tensor
    norms = 2 * shape.layers + 2  # embedding; two per layer, one in the first; final; head
    return matrices, norms * E + vocabulary


def partition(groups: tuple[int, ...], data_size: int) -> int:
    """Return the elements of a rank's ZeRO partition of parameter groups, each padded and split evenly."""
    unit = ALIGNMENT * data_size
    return sum(math.ceil(group / unit) * unit // data_size for group in groups)


def peak_memory(shape: Shape, setting: Setting, load: Load) -> Memory:
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


def activations(shape: Shape, setting: Setting, load: Load) -> int:
    """Return the bytes stored for the backward pass between the embedding and the head."""
    kept = sum(
        _layer_kept(shape, setting, load, kind, setting.recompute) for kind in shape.layer_types[load.frozen_below :]
    )
    E, shared = shape.hidden, setting.tensor if setting.sequence_parallel else 1
    # Input and output (not sharded) of the last norm; selective also stores the embedding's output.
    ends = E // shared + E + (E // shared if setting.recompute == "selective" else 0)
    tables = 2 * 2 * FP32 * (shape.head_dim // 2)  # cos and sin, global and local
    inputs = 8 * 3  # ids and positions in int64, and the next micro-batch's ids
    return kept + load.positions * (ends * setting.item_bytes + tables + inputs)


def _layer_kept(shape: Shape, setting: Setting, load: Load, kind: str, recompute: str) -> int:
    """Return the bytes that one layer stores for the backward pass."""
    E, G, t = shape.hidden, shape.intermediate, setting.tensor
    shared = t if setting.sequence_parallel else 1
    sums, normed = 2 * E / shared, 2 * E / shared
    if recompute == "full":
        return round(load.positions * sums * setting.item_bytes)
    inside = (4 * E + 2 * G) / t  # q, k, v and the output of attention; the output of Wi
    if recompute == "none":
        inside += G / t  # the gated unit's product
        inside += 0 if setting.fused else G / t  # its gelu(a)
    else:
        normed = 0
    if not setting.flash and kind == FULL:
        inside += E / t  # outputs per document, and concatenated
    elif not setting.flash:
        blocks = 2 if load.causal else 3  # of keys and values for each block of queries, and their mask
        inside += 2 * blocks * E / t + blocks * shape.window
    statistics = (2 if recompute == "none" else 0) * 2 * FP32 + FP32 * shape.heads / t  # norms; log-sum-exps
    return round(load.positions * ((sums + normed + inside) * setting.item_bytes + statistics))


def _layer_work(shape: Shape, setting: Setting, load: Load) -> int:
    """Return the bytes of one layer's backward pass: gradients of the gated unit, and recomputed activations."""
    E, G = shape.hidden, shape.intermediate
    work = load.positions * (3 * G // setting.tensor + 3 * E) * setting.item_bytes
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


def _head(shape: Shape, setting: Setting, load: Load) -> _Head:
    E, item, L = shape.hidden, setting.item_bytes, load.labeled
    rows = math.ceil(shape.vocabulary / setting.tensor)
    chunk = max(min(CHUNK_ELEMENTS["cuda" if setting.on_gpu else "cpu"] // rows, L), 1)
    several = chunk < L
    # Labeled rows, dense, gelu, norm, and the gradient of the last; labels and their positions in int64.
    kept = L * (5 * E * item + 16)
    logits = chunk * rows * item
    if setting.on_gpu and not setting.fused:
        logits += 2 * chunk * rows * FP32  # the plain softmax's sums and probabilities
    weight = rows * E
    summed = weight * (FP32 if several else item)
    loss = logits + summed + (weight * item if several and item != FP32 else 0)
    scaled = 0 if item == FP32 else weight * FP32 + weight * item
    return _Head(kept, loss, summed + scaled, weight * item)
