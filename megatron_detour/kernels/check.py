"""Kernels against their plain forms on the device where they are to run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_detour.errors import DetourError
from megatron_detour.kernels import plain

# More rows than the norm's backward pass has programs, and widths for which a row takes several warps or blocks.
ROWS, FEATURES, WIDTH, HEADS, HEAD_DIM, VOCABULARY = 600, 768, 1152, 12, 64, 5003
ALLOWED = {torch.bfloat16: 2e-2}  # of the greatest value
ALLOWED_ELSEWHERE = 1e-4


@dataclass(frozen=True)
class Case:
    """Arguments of a kernel: `leaves` get gradients, `others` none."""

    leaves: tuple[torch.Tensor, ...]
    others: tuple = ()
    in_place: bool = False


def check(kernels: dict[str, Callable], device: torch.device, dtype: torch.dtype) -> None:
    """Compares outputs and gradients with the plain forms' in fp32. Raises DetourError with the kernel's name."""
    for name, case in _cases(device, dtype).items():
        results = _softmax_results if name == "softmax_" else _results
        try:
            found = results(kernels[name], case, dtype)
            synchronize(device)
        except Exception as error:  # a compiler's, a driver's: whatever it is, these kernels cannot be used
            raise DetourError(f"compute.kernels: {name} fails on this device: {first_line(error)}") from error
        for mine, reference in zip(found, results(getattr(plain, name), case, torch.float32), strict=True):
            difference = float((mine.float() - reference).abs().max() / reference.abs().max())
            if not difference <= ALLOWED.get(dtype, ALLOWED_ELSEWHERE):
                raise DetourError(
                    f"compute.kernels: {name} is {difference:.1e} of the greatest value away from its plain form"
                )


def synchronize(device: torch.device) -> None:
    """Waits for what was launched: a kernel's fault shows no earlier."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.synchronize(device)


def device_is_dead(device: torch.device) -> bool:
    """Whether a fault has left the device unusable for the rest of the process."""
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
    """Outputs and gradients, for incoming gradients that differ from row to row."""
    leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in case.leaves]
    inputs = [leaf.clone() for leaf in leaves] if case.in_place else leaves
    outputs = kernel(*inputs, *case.others)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    down = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, down)
    written = inputs if case.in_place else []
    _same_type([*outputs, *gradients], dtype)
    return [x.detach() for x in (*outputs, *written, *gradients)]


def _softmax_results(kernel: Callable, case: Case, dtype: torch.dtype) -> list[torch.Tensor]:
    logits, bias = (leaf.to(dtype, copy=True) for leaf in case.leaves)
    figures = kernel(logits, bias)
    _same_type(figures, torch.float32)
    return [*figures, logits]


def _same_type(tensors, dtype: torch.dtype) -> None:
    for tensor in tensors:
        if tensor.dtype != dtype:
            raise TypeError(f"a result is {tensor.dtype} and not {dtype}")
