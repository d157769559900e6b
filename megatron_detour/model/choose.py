"""Choice of attention backend and kernels for a run; the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_detour.errors import DetourError
from megatron_detour.kernels.check import Sizes
from megatron_detour.kernels.choose import choose_kernels
from megatron_detour.model.backends import choose_attention
from megatron_detour.model.compiled import check_compiled
from megatron_detour.model.compute import Compute
from megatron_detour.model.families import Family
from megatron_detour.parallel.state import gather_from_all_ranks

SDPA_ON_GPU = (
    "  sdpa makes one call per document, which is slow on a GPU: train in bf16 with compute.attention=varlen, or "
    "install flash-attn"
)


@dataclass(frozen=True)
class Choice:
    """The Compute of a run, the names of its parts, and why faster ones were skipped."""

    compute: Compute
    attention: str
    kernels: str
    skipped: list[str]
    on_gpu: bool

    def __str__(self) -> str:
        chosen = f"attention {self.attention}, kernels {self.kernels}, recompute {self.compute.recompute}"
        chosen += ", compiled layers" if self.compute.compile else ""
        slow = [SDPA_ON_GPU] if self.on_gpu and self.attention == "sdpa" else []
        return "\n".join([chosen, *(f"  skipped: {why}" for why in self.skipped), *slow])


def run_sizes(shape: Family, tensor: int, micro_batches: Iterable[tuple[int, int, bool]]) -> Sizes:
    """Return what one of `tensor` ranks computes, for every phase's sequence length, sequences and direction."""
    micro_batches = list(micro_batches)
    return Sizes(
        tokens=max(length * sequences for length, sequences, _ in micro_batches),
        longest=max(length for length, *_ in micro_batches),
        hidden=shape.hidden,
        intermediate=shape.intermediate // tensor,
        heads=max(shape.heads // tensor, 1),
        head_dim=shape.head_dim,
        vocabulary=-(-shape.vocabulary // tensor),
        window=shape.window,
        directions=tuple(sorted({False, *(causal for *_, causal in micro_batches)})),  # validation looks both ways
    )


def choose_compute(
    attention: str,
    kernels: str,
    recompute: str,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    compiled: Family | None = None,
) -> Choice:
    """Choose attention and kernels, checked at these sizes; layers of `compiled`, if given, are to be compiled.

    Collective over all ranks.

    Raises DetourError on every rank if a requested backend is unavailable or wrong on any rank, or if ranks would use
    different ones.
    """
    choice, fault = None, None
    try:
        chosen_attention, function, skipped = choose_attention(attention, device, dtype, sizes)
        chosen_kernels, implementations, slower = choose_kernels(kernels, device, dtype, sizes)
        skipped = [*skipped, *([slower] if slower else [])]
        if compiled:
            check_compiled(compiled, sizes, recompute, device, dtype)
        compute = Compute(function, implementations, recompute, compile=compiled is not None)
        choice = Choice(compute, chosen_attention, chosen_kernels, skipped, device.type == "cuda")
    except DetourError as error:
        fault = str(error)
    outcomes = gather_from_all_ranks((fault, choice and (choice.attention, choice.kernels)))
    faults = [message for message, _ in outcomes if message]
    if faults:
        raise DetourError(faults[0])
    selected = sorted({" and ".join(names) for _, names in outcomes})
    if len(selected) > 1:
        raise DetourError(
            f"compute: ranks selected different attention or kernel backends ({'; '.join(selected)}); set "
            "compute.attention and compute.kernels in the run file"
        )
    return choice
