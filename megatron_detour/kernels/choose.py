"""Choice of kernels. Triton kernels are compared with the plain ones on the device before they are used."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from megatron_detour.errors import DetourError
from megatron_detour.kernels import plain
from megatron_detour.kernels.apex import load_norms
from megatron_detour.kernels.check import Sizes, check, device_is_dead, first_line
from megatron_detour.kernels.requirements import kernels_fault


@dataclass(frozen=True)
class Kernels:
    """One implementation of each kernel; kernels/plain.py defines their signatures and results."""

    layer_norm: Callable = plain.layer_norm
    add_layer_norm: Callable = plain.add_layer_norm
    geglu: Callable = plain.geglu
    rotate_: Callable = plain.rotate_
    softmax_: Callable = plain.softmax_

    def by_name(self) -> dict[str, Callable]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


PLAIN = Kernels()
TRACEABLE = Kernels(rotate_=plain.rotate)  # without storage of tensors, for torch.compile


def choose_kernels(
    name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> tuple[str, Kernels, str | None]:
    """Return name and kernels for `auto`, `triton`, `apex` or `plain`, and why `auto` did not choose the faster ones.

    Raises DetourError if the requested kernels are unavailable or wrong.
    """
    if name == "plain" or (name == "auto" and device.type != "cuda"):
        return "plain", PLAIN, None
    if fault := kernels_fault(name, device.type == "cuda"):
        raise DetourError(fault)
    try:
        kernels = {"apex": apex_kernels}.get(name, triton_kernels)()
        check(kernels.by_name(), device, dtype, sizes)
    except DetourError as fault:
        if name != "auto" or device_is_dead(device):
            raise
        return "plain", PLAIN, str(fault)
    return "apex" if name == "apex" else "triton", kernels, None


def triton_kernels() -> Kernels:
    """Return the Triton kernels. Raises DetourError if Triton cannot run."""
    if importlib.util.find_spec("triton") is None:
        raise DetourError("compute.kernels: triton is not installed; it comes with torch's CUDA builds")
    try:
        from megatron_detour.kernels.fused import geglu, norm, rotary, softmax
    except Exception as error:  # installed, but broken
        raise DetourError(f"compute.kernels: cannot load triton: {first_line(error)}") from error
    return Kernels(norm.layer_norm, norm.add_layer_norm, geglu.geglu, rotary.rotate_, softmax.softmax_)


def apex_kernels() -> Kernels:
    """Return the Triton kernels with apex's norms. Raises DetourError if either cannot run."""
    others = triton_kernels()
    try:
        layer_norm, add_layer_norm = load_norms()
    except Exception as error:  # missing, PyPI's package of the same name, or broken
        raise DetourError(
            "compute.kernels: apex needs NVIDIA's, built with fast_layer_norm (docs/parallelism.md): "
            f"{first_line(error)}"
        ) from error
    return replace(others, layer_norm=layer_norm, add_layer_norm=add_layer_norm)
