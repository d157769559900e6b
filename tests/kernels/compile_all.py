"""Compiles every Triton kernel for GPUs that are not there and prints as JSON what came of it.

The launch code itself runs, on CPU tensors, with a driver that names a GPU: what is compiled has the types, constants
and warps that a run on that GPU would ask for. Triton must not have been told to interpret.
"""

from __future__ import annotations

import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from megatron_detour.kernels.choose import triton_kernels

CAPABILITIES = (80, 90)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Driver:
    """Of a GPU of this compute capability."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Takes the place of a launch and keeps what was compiled: the kernel's name, the size of its machine code and
    the bytes of its widest load and store."""

    def __init__(self) -> None:
        self.run, self.compiled = JITFunction.run, []

    def __call__(self, function: JITFunction, *arguments, grid, warmup: bool, **options) -> None:
        kernel = self.run(function, *arguments, grid=grid, warmup=True, **options)
        ptx = kernel.asm["ptx"]
        self.compiled.append([function.__name__, len(kernel.asm["cubin"]), widest("ld", ptx), widest("st", ptx)])


def widest(access: str, ptx: str) -> int:
    """Bytes that a thread moves at once."""
    found = re.findall(rf"{access}\.global\S*?(?:\.v(\d))?\.b(\d+)\s", ptx)
    return max(int(values or 1) * int(bits) // 8 for values, bits in found)


def launch_all(rows: int, hidden: int, intermediate: int, heads: int, vocabulary: int, dtype: torch.dtype) -> None:
    """Forward and backward once, with the sizes of a model."""
    kernels = triton_kernels()
    x, change, weight, ab, qkv = (
        torch.zeros(size, dtype=dtype, requires_grad=True)
        for size in ((rows, hidden), (rows, hidden), (hidden,), (rows, 2 * intermediate), (rows, 3 * hidden))
    )
    tables = torch.zeros(2, rows, hidden // heads // 2).unbind()
    kernels.layer_norm(x, weight, 1e-5).sum().backward()
    sum(kernels.add_layer_norm(x, change, weight, 1e-5)).sum().backward()
    kernels.geglu(ab).sum().backward()
    for down in (qkv.view(rows, 3, heads, -1).unbind(1), qkv.view(3, rows, heads, -1).unbind()):  # in place, or not
        torch.autograd.grad(kernels.rotate_(qkv.clone(), *tables), qkv, [part.detach() for part in down])
    kernels.softmax_(torch.zeros(rows, vocabulary, dtype=dtype), torch.zeros(vocabulary, dtype=dtype))


def main(*sizes: int) -> None:
    compiler = Compiler()
    JITFunction.run = lambda function, *arguments, **options: compiler(function, *arguments, **options)
    found = {}
    for capability in CAPABILITIES:
        triton.runtime.driver.set_active(Driver(capability))
        for name, dtype in TYPES.items():
            compiler.compiled = found[f"sm_{capability} {name}"] = []
            launch_all(*sizes, dtype)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
