"""torch.compile of an encoder's layers, and their check before a run."""

from __future__ import annotations

from typing import Any

import torch

from megatron_detour.errors import DetourError
from megatron_detour.kernels.check import CPU, DEFAULT_TOLERANCE, Sizes, first_line
from megatron_detour.model.attention import AttentionPattern
from megatron_detour.model.compute import Compute
from megatron_detour.model.embeddings import rotary_tables
from megatron_detour.model.families import Family
from megatron_detour.model.modernbert import Layer
from megatron_detour.parallel.state import ParallelState

TOLERANCE = {torch.bfloat16: 5e-2}  # of the norm of an output or gradient: a dozen roundings in a row
JUDGED_ROWS = 1 << 11  # the judge's products take a second on a CPU; each row of a layer is computed by itself


def check_compiled(shape: Family, sizes: Sizes, recompute: str, device: torch.device, dtype: torch.dtype) -> None:
    """Compare a compiled layer with a plain one in fp32 on the CPU: outputs and gradients, without attention.

    The layer that a session compiles first is thus the same in all sessions of a run, as is the code that is compiled
    for it: a compiler chooses it by the number of positions. Raises DetourError if it cannot be compiled or is wrong.
    """
    judged = min(sizes.tokens, JUDGED_ROWS)
    if not shape.compiles:
        raise DetourError(f"compute.compile: layers of {shape.label} cannot be compiled; set false")
    expected = _results(shape, Compute(_sum), judged, judged, CPU, torch.float32, dtype)
    try:
        compute = Compute(_sum, recompute=recompute, compile=True)
        found = _results(shape, compute, sizes.tokens, judged, device, dtype, dtype)
    except Exception as error:  # of a compiler or driver: whatever it is, layers cannot be compiled
        raise DetourError(f"compute.compile: a layer cannot be compiled on this device: {first_line(error)}") from error
    for name, reference in expected.items():
        difference = float((found[name].cpu().float() - reference).norm() / reference.norm())
        if not difference <= TOLERANCE.get(dtype, DEFAULT_TOLERANCE):
            raise DetourError(f"compute.compile: {name} of a compiled layer differs by {difference:.1e}")


def _sum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
    """Instead of attention, which is not compiled: each position by itself."""
    return q * k + v


def _results(
    shape: Family,
    compute: Compute,
    rows: int,
    judged: int,
    device: torch.device,
    dtype: torch.dtype,
    given: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Return outputs and gradients of the first `judged` of `rows` positions, from values in the dtype `given`."""
    with torch.device(device):
        layer = Layer(shape, ParallelState(), compute, index=1).to(dtype)
    generator = torch.Generator().manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(size, generator=generator)).to(given).to(device, dtype)

    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(random(*parameter.shape, scale=parameter.shape[-1] ** -0.5))
    streams: dict[str, Any] = {name: random(judged, shape.hidden) for name in ("x", "change")}
    incoming = [torch.nn.functional.pad(random(judged, shape.hidden), (0, 0, 0, rows - judged)) for _ in range(2)]
    inputs = [torch.nn.functional.pad(x, (0, 0, 0, rows - judged)).requires_grad_() for x in streams.values()]
    rotary = rotary_tables(torch.arange(rows, device=device), shape.head_dim, 1e4)
    outputs = compute.checkpoint("full", layer, *inputs, rotary, None)
    torch.autograd.backward(outputs, incoming)
    results = dict(zip(("the residual stream", "the change"), outputs, strict=True))
    results |= {f"the gradient of {name}": x.grad for name, x in zip(streams, inputs, strict=True)}
    results = {name: value.detach()[:judged] for name, value in results.items()}
    return results | {f"the gradient of {name}": parameter.grad for name, parameter in layer.named_parameters()}
