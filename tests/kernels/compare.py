"""Compares each Triton kernel with its plain form in fp64, element by element, on the same inputs.

`python -m tests.kernels.compare` does so on the CPU, in Triton's interpreter, and prints what it found as JSON. Triton
reads TRITON_INTERPRET when it is imported, so that this needs a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from megatron_detour.kernels import plain
from megatron_detour.kernels.check import Sizes, check
from megatron_detour.kernels.choose import triton_kernels

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EPS = 0.1  # large enough to tell beside a variance of 4
PROGRAMS = 8  # of the norm's backward pass in the interpreter, so that few rows suffice to give a program several
# T and E; T and I; T, H and D; n and V. No rows at all is what the head gets of a microbatch without labels.
SHAPES = {
    "layer_norm": [(19, 768), (1, 96), (37, 96), (5, 1024), (0, 96)],
    "add_layer_norm": [(19, 768), (1, 96), (37, 96), (5, 1024), (0, 96)],
    "geglu": [(19, 48), (1, 1152), (3, 2624), (5, 1024), (2, 1), (0, 48)],
    "rotate_": [(13, 12, 64), (1, 3, 64), (29, 3, 8), (7, 12, 8), (5, 1, 64)],
    "softmax_": [(7, 5003), (1, 50_368), (2, 50_368), (3, 301), (2, 1), (0, 301)],
}
SMALL = Sizes(tokens=50, hidden=192, intermediate=288, heads=3)  # for the check, which is not its test
LAYOUTS = ("contiguous", "transposed", "strided", "expanded")  # of incoming gradients


class Comparison:
    """Of one kernel, for tensors of one type on one device.

    `rounding` is the greatest relative error of one rounding to bf16: the interpreter cuts off what a GPU rounds.
    """

    def __init__(self, kernel: Callable, dtype: torch.dtype, device: str = "cpu", rounding: float = 2**-7) -> None:
        self.kernel, self.dtype, self.device = kernel, dtype, device
        self.rtol = rounding if dtype == torch.bfloat16 else 1e-5
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator).to(self.device, self.dtype)

    def gradient(self, like: torch.Tensor, layout: str) -> torch.Tensor:
        rows, columns = like.shape
        gradient = {
            "contiguous": lambda: self.random(rows, columns),
            "transposed": lambda: self.random(columns, rows).T,
            "strided": lambda: self.random(rows, 2 * columns)[:, ::2],
            "expanded": lambda: self.random(1, 1).expand(rows, columns),
        }[layout]()
        assert gradient.is_contiguous() == (layout == "contiguous") or gradient.numel() <= max(rows, columns)
        return gradient

    def close(self, what: str, found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-5, rtol=None) -> None:
        assert found.dtype == self.dtype, f"{what} is {found.dtype}"
        self.near(what, found, expected, atol, self.rtol if rtol is None else rtol)

    def near(self, what: str, found: torch.Tensor, expected: torch.Tensor, atol: float, rtol: float) -> None:
        message = lambda text: f"{what}: {text}"  # noqa: E731
        torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol, msg=message)

    def layer_norm(self, rows: int, features: int) -> None:
        for layout in LAYOUTS:
            x, weight = self.random(rows, features) * 2 + 1, self.random(features)
            mine, reference = leaves(x, weight), leaves(x.double(), weight.double())
            found, expected = self.kernel(*mine, EPS), plain.layer_norm(*reference, EPS)
            down = self.gradient(x, layout)
            gradients = torch.autograd.grad(found, mine, down), torch.autograd.grad(expected, reference, down.double())
            self.close("output", found, expected)
            self.close("gradient of x", gradients[0][0], gradients[1][0])
            self.close("gradient of the weight", gradients[0][1], gradients[1][1], atol=of_sum(rows))
            assert torch.equal(mine[0], x), "x was written over"

    def add_layer_norm(self, rows: int, features: int) -> None:
        for layout in LAYOUTS:
            self._add_layer_norm(rows, features, layout, ("total", "normed"))
        for alone in ("total", "normed"):
            self._add_layer_norm(rows, features, "transposed", (alone,))

    def _add_layer_norm(self, rows: int, features: int, layout: str, used: tuple[str, ...]) -> None:
        x, change, weight = self.random(rows, features) * 2 + 1, self.random(rows, features), self.random(features)
        mine, reference = leaves(x, change, weight), leaves(x.double(), change.double(), weight.double())
        found = dict(zip(("total", "normed"), self.kernel(*mine, EPS), strict=True))
        self.close("total", found["total"], x.double() + change.double(), atol=0)
        # What is normalized is the sum as it was rounded, and the rounding has the gradient of an identity.
        exact = reference[0] + reference[1]
        total = exact + (found["total"].double() - exact).detach()
        expected = {"total": total, "normed": plain.layer_norm(total, reference[2], EPS)}
        self.close("normed", found["normed"], expected["normed"])
        down = [self.gradient(x, layout) for _ in used]
        gradients = [
            torch.autograd.grad([out[n] for n in used], at, [d.to(t) for d in down], materialize_grads=True)
            for out, at, t in ((found, mine, self.dtype), (expected, reference, torch.float64))
        ]
        for what, atol, left, right in zip(
            ("x", "change", "the weight"), (1e-5, 1e-5, of_sum(rows)), *gradients, strict=True
        ):
            self.close(f"gradient of {what} by {used}", left, right, atol)
        assert torch.equal(mine[0], x) and torch.equal(mine[1], change), "an input was written over"

    def geglu(self, rows: int, width: int) -> None:
        for layout in LAYOUTS:
            ab = self.random(rows, 2 * width) * 2
            (mine,), (reference,) = leaves(ab), leaves(ab.double())
            found, expected = self.kernel(mine), plain.geglu(reference)
            down = self.gradient(found, layout)
            self.close("output", found, expected)
            (left,), (right,) = (
                torch.autograd.grad(found, mine, down),
                torch.autograd.grad(expected, reference, down.double()),
            )
            self.close("gradient", left, right)
            assert torch.equal(mine, ab), "the input was written over"

    def rotate_(self, tokens: int, heads: int, head_dim: int) -> None:
        size = (tokens, 3, heads, head_dim)
        downs = {
            "of one tensor": lambda: self.random(*size).unbind(1),
            "apart": lambda: tuple(self.random(tokens, heads, head_dim) for _ in range(3)),
            "of two tensors": lambda: (self.random(*size)[:, 2], *self.random(*size).unbind(1)[:2]),
            "head-first": lambda: tuple(self.random(heads, tokens, head_dim).transpose(0, 1) for _ in range(3)),
            "expanded": lambda: (self.random(1, 1, 1).expand(tokens, heads, head_dim),) * 3,
        }
        for layout, draw in downs.items():
            given = self.random(tokens, 3 * heads * head_dim)
            angles = torch.rand(tokens, head_dim // 2, generator=self.generator).to(self.device) * 6
            tables = angles.cos(), angles.sin()
            (mine,), (reference,) = leaves(given), leaves(given.double())
            qkv = mine.clone()
            found, expected = self.kernel(qkv, *tables), rotated(reference, *tables)
            assert torch.equal(torch.stack(found, 1), qkv.view(size)) and plain.joined(*found) is not None, "a copy"
            self.close("output", torch.stack(found, 1), expected)
            down = draw()
            before = torch.stack(down, 1)
            (left,), (right,) = (
                torch.autograd.grad(found, mine, down),
                torch.autograd.grad(expected, reference, before.double()),
            )
            self.close(f"gradient {layout}", left, right)
            assert torch.equal(found[2], given.view(size)[:, 2]), "v was turned"
            assert torch.equal(left.view(size)[:, 2], before[:, 2]), "the gradient of v was turned"
            in_place = layout == "of one tensor"
            assert (left.data_ptr() == down[0].data_ptr()) == in_place, f"gradient {layout}: in place or not"
            assert in_place or torch.equal(torch.stack(down, 1), before), "the incoming gradient was written over"

    def softmax_(self, rows: int, columns: int) -> None:
        self._softmax_(self.random(rows, columns) * 4, self.random(columns))

    def extreme_softmax_(self, columns: int) -> None:
        """Logits of 80 and -80, all the same, and one that leaves nothing to the others."""
        rows = torch.zeros(5, columns)
        rows[0] = torch.where(torch.arange(columns) % 2 == 0, 80.0, -80.0)
        rows[1] = torch.where(torch.arange(columns) == columns - 1, 80.0, -80.0)
        rows[3], rows[4, 17] = -80.0, 3e4
        logits = rows.to(self.device, self.dtype)
        bias = torch.zeros(columns, device=self.device, dtype=self.dtype)
        found = self._softmax_(logits, bias)
        assert all(torch.isfinite(x).all() for x in found), "not finite"
        sums = found[0].double().sum(1)
        self.near("sums of probabilities", sums, torch.ones_like(sums), 0, self.rtol)

    def _softmax_(self, logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found, expected = logits.clone(), logits.double()
        kept = bias.clone()
        log_sum, greatest = self.kernel(found, bias)
        reference_log_sum, _ = plain.softmax_(expected, bias.double())
        # The smallest underflow in fp32.
        self.close("probabilities", found, expected, atol=1e-37)
        for x in (log_sum, greatest):
            assert x.dtype == torch.float32, f"{x.dtype} for a log-sum-exp or maximum"
        self.near("log-sum-exp", log_sum, reference_log_sum, 1e-5, 1e-6)
        # Compared for equality by who counts right predictions.
        assert torch.equal(greatest, (logits.float() + bias.float()).amax(1)), "another maximum"
        assert torch.equal(bias, kept), "the bias was written over"
        return found, log_sum, greatest


def rotated(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """q, k and v [T, 3, H, D]: pairs of q and k as complex numbers, times those on the unit circle."""
    qkv = qkv.view(len(qkv), 3, -1, 2 * cos.shape[1])
    pairs = torch.complex(*qkv[:, :2].chunk(2, -1)) * torch.complex(cos, sin)[:, None, None]
    return torch.cat([torch.cat([pairs.real, pairs.imag], -1), qkv[:, 2:]], 1)


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.clone().requires_grad_() for x in tensors]


def of_sum(rows: int) -> float:
    """What fp32 may lose in a sum over so many rows."""
    return max(1e-5, 1e-7 * rows)


def found_by_the_interpreter() -> dict[str, list[str]]:
    """By kernel and type: a line for every comparison, which ends in "equal" or says the difference."""
    from megatron_detour.kernels.fused import norm

    kernels = triton_kernels()
    norm.PROGRAMS = PROGRAMS
    found = {}
    for name, shapes in SHAPES.items():
        for type_name, dtype in TYPES.items():
            comparison = Comparison(getattr(kernels, name), dtype)
            cases = {str(shape): lambda c=comparison, n=name, s=shape: getattr(c, n)(*s) for shape in shapes}
            if name == "softmax_":
                cases |= {f"extremes {n}": lambda c=comparison, n=n: c.extreme_softmax_(n) for n in (301, 5003)}
            found[f"{name} {type_name}"] = [f"{case}: {outcome(compare)}" for case, compare in cases.items()]
    for type_name, dtype in TYPES.items():
        found[f"check {type_name}"] = [outcome(lambda d=dtype: check(kernels.by_name(), torch.device("cpu"), d, SMALL))]
    return found


def outcome(compare: Callable[[], None]) -> str:
    try:
        compare()
    except Exception as fault:  # of one kernel: the others are compared all the same
        return f"{type(fault).__name__}: {fault}"
    return "equal"


if __name__ == "__main__":
    print(json.dumps(found_by_the_interpreter()))
