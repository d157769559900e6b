"""Which kernels a run uses. Those that are not plain are compared with the plain ones on this device before use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from megatron_detour.errors import DetourError
from megatron_detour.kernels import plain

NAMES = ("auto", "triton", "plain")


@dataclass(frozen=True)
class Kernels:
    """One implementation of each; kernels/plain.py has their signatures and what they compute."""

    layer_norm: Callable = plain.layer_norm
    add_layer_norm: Callable = plain.add_layer_norm
    geglu: Callable = plain.geglu
    rotate_: Callable = plain.rotate_
    softmax_: Callable = plain.softmax_


PLAIN = Kernels()


def choose_kernels(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Kernels, str | None]:
    """The name and the kernels for `auto`, `triton` or `plain`, and why `auto` did not take the faster ones.

    Raises DetourError when the kernels that were asked for are not there or do not compute what they should.
    """
    if name == "plain" or (name == "auto" and device.type != "cuda"):
        return "plain", PLAIN, None
    try:
        kernels = triton_kernels(device)
        check(kernels, device, dtype)
    except DetourError as fault:
        if name == "auto":
            return "plain", PLAIN, str(fault)
        raise
    return "triton", kernels, None


def triton_kernels(device: torch.device) -> Kernels:
    """Raises DetourError where Triton cannot run."""
    if device.type != "cuda":
        raise DetourError("compute.kernels: triton needs a GPU; use auto or plain")
    if importlib.util.find_spec("triton") is None:
        raise DetourError("compute.kernels: triton is not installed; it comes with torch's CUDA builds")
    return load_triton()


def load_triton() -> Kernels:
    from megatron_detour.kernels.fused import geglu, norm, rotary, softmax

    return Kernels(norm.layer_norm, norm.add_layer_norm, geglu.geglu, rotary.rotate_, softmax.softmax_)


def check(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> None:
    """Compares outputs and gradients with the plain kernels' in fp32. Raises DetourError with the kernel's name."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    angles = torch.rand(37, 32, generator=generator).to(device) * 6
    norm_weight = random(96)
    cases = {
        "layer_norm": (random(37, 96), norm_weight, 1e-5),
        "add_layer_norm": (random(37, 96), random(37, 96), norm_weight, 1e-5),
        "geglu": (random(37, 192),),
        "rotate_": (random(37, 3 * 3 * 64), angles.cos(), angles.sin()),
        "softmax_": (random(5, 5003) * 4, random(5003)),
    }
    allowed = {torch.bfloat16: 2e-2}.get(dtype, 1e-4)
    for field in fields(Kernels):
        try:
            found = _results(getattr(kernels, field.name), cases[field.name], dtype)
        except Exception as error:  # a compiler's, a driver's: whatever it is, these kernels cannot be used
            raise DetourError(f"compute.kernels: {field.name} fails on this device: {error}") from error
        for mine, reference in zip(found, _results(getattr(PLAIN, field.name), cases[field.name]), strict=True):
            difference = float((mine.detach().float() - reference).abs().max() / reference.detach().abs().max())
            if not difference <= allowed:
                raise DetourError(
                    f"compute.kernels: {field.name} is {difference:.1e} of the greatest value away from its plain form"
                )


def _results(kernel: Callable, arguments: tuple, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Outputs, and gradients by every tensor of the arguments; a kernel that works in place gets a copy."""
    if kernel.__name__ == "softmax_":
        logits, bias = (x.to(dtype, copy=True) for x in arguments)
        return [*kernel(logits, bias), logits]
    tables = arguments[1:] if kernel.__name__ == "rotate_" else ()
    leaves = [x for x in arguments if isinstance(x, torch.Tensor) and not any(x is t for t in tables)]
    leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
    others = tables or tuple(x for x in arguments if not isinstance(x, torch.Tensor))
    inputs = [leaves[0].clone()] if tables else leaves
    out = kernel(*inputs, *others)
    outputs = list(out) if isinstance(out, tuple) else [out]
    weighted = sum((o.float() * torch.linspace(-1, 1, o.shape[-1], device=o.device)).sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(weighted, leaves)]
