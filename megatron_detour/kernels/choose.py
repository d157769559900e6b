"""Which kernels a run uses. Those that are not plain are compared with the plain ones on this device before use."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from megatron_detour.errors import DetourError
from megatron_detour.kernels import plain
from megatron_detour.kernels.check import check, device_is_dead, first_line

NAMES = ("auto", "triton", "plain")


@dataclass(frozen=True)
class Kernels:
    """One implementation of each; kernels/plain.py has their signatures and what they compute."""

    layer_norm: Callable = plain.layer_norm
    add_layer_norm: Callable = plain.add_layer_norm
    geglu: Callable = plain.geglu
    rotate_: Callable = plain.rotate_
    softmax_: Callable = plain.softmax_

    def by_name(self) -> dict[str, Callable]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


PLAIN = Kernels()


def choose_kernels(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, Kernels, str | None]:
    """The name and the kernels for `auto`, `triton` or `plain`, and why `auto` did not take the faster ones.

    Raises DetourError when the kernels that were asked for are not there or do not compute what they should.
    """
    if name == "plain" or (name == "auto" and device.type != "cuda"):
        return "plain", PLAIN, None
    try:
        kernels = triton_kernels(device)
        check(kernels.by_name(), device, dtype)
    except DetourError as fault:
        if name != "auto" or device_is_dead(device):
            raise
        return "plain", PLAIN, str(fault)
    return "triton", kernels, None


def triton_kernels(device: torch.device) -> Kernels:
    """Raises DetourError where Triton cannot run."""
    if device.type != "cuda":
        raise DetourError("compute.kernels: triton needs a GPU; use auto or plain")
    if importlib.util.find_spec("triton") is None:
        raise DetourError("compute.kernels: triton is not installed; it comes with torch's CUDA builds")
    try:
        return load_triton()
    except Exception as error:  # a library that is there and broken
        raise DetourError(f"compute.kernels: triton cannot be loaded: {first_line(error)}") from error


def load_triton() -> Kernels:
    from megatron_detour.kernels.fused import geglu, norm, rotary, softmax

    return Kernels(norm.layer_norm, norm.add_layer_norm, geglu.geglu, rotary.rotate_, softmax.softmax_)
