"""Comparison of kernels with their plain reference on the CPU, at the sizes of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from megatron_detour.errors import DetourError
from megatron_detour.kernels import plain

CPU = torch.device("cpu")
MOST_ROWS = 1 << 14  # judged: kernels work row by row, and the judge takes a few passes over all of them
SOFTMAX_ROWS = 64  # enough, as each row is a program, and at most 2^28 logits exist at a time
TOLERANCE = {torch.bfloat16: 2e-2}  # relative to the largest absolute value
DEFAULT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Sizes:
    """What a rank computes: its shard of the layers, its largest micro-batch. By default some of ModernBERT-base."""

    tokens: int = 1200  # more than the norm's backward pass has programs
    longest: int = 400  # tokens of a document
    hidden: int = 768
    intermediate: int = 1152
    heads: int = 12
    head_dim: int = 64
    vocabulary: int = 5003
    window: int | None = 64  # of local layers; None without them
    directions: tuple[bool, ...] = (False, True)  # of attention: whether it is causal


@dataclass(frozen=True)
class Case:
    """Arguments of a kernel: `leaves` require gradients, `constants` do not."""

    name: str
    leaves: tuple[torch.Tensor, ...]
    constants: tuple = ()
    in_place: bool = False
    joined: bool = False  # whether the incoming gradients are parts of one tensor


def check(kernels: dict[str, Callable], device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
    """Compare outputs and gradients with the plain kernels in fp32 on the CPU: a faulty device is no judge of itself.

    Raises DetourError with the kernel's name.
    """
    for case in _cases(dtype, sizes):
        name, results = case.name, _softmax_results if case.name == "softmax_" else _results
        try:
            outputs = [output.cpu() for output in results(kernels[name], case, device, dtype)]
        except Exception as error:  # of a compiler or driver: whatever it is, these kernels cannot be used
            raise DetourError(f"compute.kernels: {name} fails on this device: {first_line(error)}") from error
        for output, expected in zip(outputs, results(getattr(plain, name), case, CPU, torch.float32), strict=True):
            difference = relative_difference(output, expected)
            if not difference <= TOLERANCE.get(dtype, DEFAULT_TOLERANCE):
                raise DetourError(
                    f"compute.kernels: {name} differs from the plain kernel by {difference:.1e} of its largest value"
                )


def relative_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference, relative to the largest absolute expected value."""
    return float((output.float() - expected).abs().max() / expected.abs().max())


def device_is_dead(device: torch.device) -> bool:
    """Return whether an earlier error has left the device unusable for the rest of the process."""
    try:
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.synchronize(device)  # raises the errors of launched kernels
    except Exception:
        return True
    return False


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _cases(dtype: torch.dtype, sizes: Sizes) -> Iterator[Case]:
    """Yield the inputs of every kernel, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    rows, hidden, part = min(sizes.tokens, MOST_ROWS), sizes.hidden, sizes.heads * sizes.head_dim
    yield Case("layer_norm", (random(rows, hidden), random(hidden)), (1e-5,))
    yield Case("add_layer_norm", (random(rows, hidden), random(rows, hidden), random(hidden)), (1e-5,))
    yield Case("geglu", (random(rows, 2 * sizes.intermediate),))
    angles = torch.rand(rows, sizes.head_dim // 2, generator=generator) * 6
    for joined in (False, True):
        yield Case("rotate_", (random(rows, 3 * part),), (angles.cos(), angles.sin()), in_place=True, joined=joined)
    yield Case("softmax_", (random(SOFTMAX_ROWS, sizes.vocabulary) * 4, random(sizes.vocabulary)))


def _results(kernel: Callable, case: Case, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return outputs and gradients, for random incoming gradients."""
    leaves = [leaf.to(device, dtype, copy=True).requires_grad_() for leaf in case.leaves]
    constants = [x.to(device) if isinstance(x, torch.Tensor) else x for x in case.constants]
    inputs = [leaf.clone() for leaf in leaves] if case.in_place else leaves
    outputs = kernel(*inputs, *constants)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs]
    if case.joined:
        incoming = torch.stack(incoming, 1).unbind(1)
    gradients = torch.autograd.grad(outputs, leaves, incoming)
    written = inputs if case.in_place else []
    _require_dtype([*outputs, *gradients], dtype)
    return [x.detach() for x in (*outputs, *written, *gradients)]


def _softmax_results(kernel: Callable, case: Case, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    logits, bias = (leaf.to(device, dtype, copy=True) for leaf in case.leaves)
    outputs = kernel(logits, bias)
    _require_dtype(outputs, torch.float32)
    return [*outputs, logits]


def _require_dtype(tensors, dtype: torch.dtype) -> None:
    for tensor in tensors:
        if tensor.dtype != dtype:
            raise TypeError(f"expected an output of {dtype}, not {tensor.dtype}")
