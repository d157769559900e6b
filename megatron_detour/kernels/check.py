"""Comparison of kernels with their plain reference, on the device where they will run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_detour.errors import DetourError
from megatron_detour.kernels import plain

# More rows than the norm's backward pass has programs, and widths at which a row takes several warps or blocks.
ROWS, FEATURES, WIDTH, HEADS, HEAD_DIM, VOCABULARY = 600, 768, 1152, 12, 64, 5003
TOLERANCE = {torch.bfloat16: 2e-2}  # relative to the largest absolute value
DEFAULT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """Arguments of a kernel: `leaves` require gradients, `constants` do not."""

    leaves: tuple[torch.Tensor, ...]
    constants: tuple = ()
    in_place: bool = False


def check(kernels: dict[str, Callable], device: torch.device, dtype: torch.dtype) -> None:
    """Compare outputs and gradients with the plain reference in fp32. Raises DetourError with the kernel's name."""
    for name, case in _cases(device, dtype).items():
        results = _softmax_results if name == "softmax_" else _results
        try:
            outputs = results(kernels[name], case, dtype)
            synchronize(device)
        except Exception as error:  # of a compiler or driver: whatever it is, these kernels cannot be used
            raise DetourError(f"compute.kernels: {name} fails on this device: {first_line(error)}") from error
        for output, expected in zip(outputs, results(getattr(plain, name), case, torch.float32), strict=True):
            difference = relative_difference(output, expected)
            if not difference <= TOLERANCE.get(dtype, DEFAULT_TOLERANCE):
                raise DetourError(
                    f"compute.kernels: {name} differs from the plain kernel by {difference:.1e} of its largest value"
                )


def relative_difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference, relative to the largest absolute expected value."""
    return float((output.float() - expected).abs().max() / expected.abs().max())


def synchronize(device: torch.device) -> None:
    """Wait for launched kernels: their errors are not raised earlier."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(device)


def device_is_dead(device: torch.device) -> bool:
    """Return whether an earlier error has left the device unusable for the rest of the process."""
    try:
        synchronize(device)
    except Exception:
        return True
    return False


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _cases(device: torch.device, dtype: torch.dtype) -> dict[str, Case]:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    angles = torch.rand(ROWS, HEAD_DIM // 2, generator=generator).to(device) * 6
    return {
        "layer_norm": Case((random(ROWS, FEATURES), random(FEATURES)), (1e-5,)),
        "add_layer_norm": Case((random(ROWS, FEATURES), random(ROWS, FEATURES), random(FEATURES)), (1e-5,)),
        "geglu": Case((random(ROWS, 2 * WIDTH),)),
        "rotate_": Case((random(ROWS, 3 * HEADS * HEAD_DIM),), (angles.cos(), angles.sin()), in_place=True),
        "softmax_": Case((random(7, VOCABULARY) * 4, random(VOCABULARY))),
    }


def _results(kernel: Callable, case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return outputs and gradients, for random incoming gradients."""
    leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in case.leaves]
    inputs = [leaf.clone() for leaf in leaves] if case.in_place else leaves
    outputs = kernel(*inputs, *case.constants)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, incoming)
    written = inputs if case.in_place else []
    _require_dtype([*outputs, *gradients], dtype)
    return [x.detach() for x in (*outputs, *written, *gradients)]


def _softmax_results(kernel: Callable, case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    logits, bias = (leaf.to(dtype, copy=True) for leaf in case.leaves)
    outputs = kernel(logits, bias)
    _require_dtype(outputs, torch.float32)
    return [*outputs, logits]


def _require_dtype(tensors, dtype: torch.dtype) -> None:
    for tensor in tensors:
        if tensor.dtype != dtype:
            raise TypeError(f"expected an output of {dtype}, not {tensor.dtype}")
