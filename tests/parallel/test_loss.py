"""The fused loss against torch's cross-entropy, its memory, and its independence of chunks."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from megatron_detour.kernels.plain import softmax_
from megatron_detour.parallel import loss as module
from megatron_detour.parallel.loss import linear_cross_entropy
from megatron_detour.parallel.state import ParallelState
from tests.harness import ROOT, environment

VOCABULARY, FEATURES, LABELS = 101, 16, 45


def operands(dtype: torch.dtype, labels: int = LABELS):
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden": (labels, FEATURES), "weight": (VOCABULARY, FEATURES), "bias": (VOCABULARY,)}
    leaves = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes.values()]
    return *leaves, torch.randint(VOCABULARY, (labels,), generator=generator)


def ours(*operands, z_loss: float = 0.0):
    return linear_cross_entropy(*operands, VOCABULARY, ParallelState(), softmax_, z_loss)


def reference(hidden, weight, bias, labels, z_loss: float = 0.0) -> torch.Tensor:
    logits = functional.linear(hidden, weight, bias)
    return functional.cross_entropy(logits, labels, reduction="sum") + z_loss * logits.logsumexp(1).square().sum()


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("chunk_rows", [1, 7, LABELS, 1000])
def test_loss_and_gradients_in_any_chunks(monkeypatch, chunk_rows, z_loss):
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", chunk_rows * VOCABULARY)
    *leaves, labels = operands(torch.float64)
    out = ours(*leaves, labels, z_loss=z_loss)
    expected = reference(*leaves, labels, z_loss=z_loss)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.cross_entropy, reference(*leaves, labels))
    assert int(out.right) == int((functional.linear(*leaves).argmax(1) == labels).sum())
    mine = torch.autograd.grad(out.loss * 0.7, leaves)
    for found, wanted in zip(mine, torch.autograd.grad(expected * 0.7, leaves), strict=True):
        torch.testing.assert_close(found, wanted)


def test_bf16_is_as_near_as_its_rounding():
    *leaves, labels = operands(torch.bfloat16)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, expected = ours(*leaves, labels), reference(*exact, labels)
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), expected, rtol=3e-3, atol=0)
    for found, wanted in zip(torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("chunk_rows", [7, LABELS])
def test_the_scale_is_not_rounded_to_bf16(monkeypatch, chunk_rows):
    monkeypatch.setitem(module.CHUNK_ELEMENTS, "cpu", chunk_rows * VOCABULARY)
    scale = 0.7  # 0.69921875 in bf16
    *leaves, labels = operands(torch.bfloat16)
    whole, scaled = (torch.autograd.grad(ours(*leaves, labels).loss * by, leaves) for by in (1.0, scale))
    for grad, expected in zip(scaled, whole, strict=True):
        torch.testing.assert_close(
            grad.float(), expected.float() * scale, rtol=2**-7 if chunk_rows == 7 else 2**-8, atol=0
        )


def test_a_sure_and_right_prediction_keeps_its_small_gradient_in_bf16():
    """1 - p is 0.001 here, less than bf16 can tell from 1."""
    weight = torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16)
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    out = linear_cross_entropy(
        hidden, weight, torch.zeros(2, dtype=torch.bfloat16), torch.tensor([0]), 2, ParallelState(), softmax_
    )
    out.loss.backward()
    assert hidden.grad.item() == pytest.approx(7 * (1 / (1 + math.exp(-7)) - 1), rel=1e-2)


def test_no_label_means_no_loss_and_no_gradient():
    *leaves, labels = operands(torch.float32, labels=0)
    out = ours(*leaves, labels)
    out.loss.backward()
    assert (out.loss.detach().item(), int(out.right), out.labeled) == (0.0, 0, 0)
    assert all(torch.equal(leaf.grad, torch.zeros_like(leaf)) for leaf in leaves)


def test_a_second_backward_pass_is_refused():
    *leaves, labels = operands(torch.float32)
    out = ours(*leaves, labels)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        out.loss.backward()


def test_without_gradients_none_are_computed():
    *leaves, labels = operands(torch.float32)
    with torch.no_grad():
        assert ours(*leaves, labels).loss.grad_fn is None


HEAD = """
import torch
from pathlib import Path
from megatron_detour.kernels.plain import softmax_
from megatron_detour.parallel.loss import linear_cross_entropy
from megatron_detour.parallel.state import ParallelState

def status(key):
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key))

tokens, vocabulary, width = 24576, 50368, 16
hidden = torch.randn(tokens, width, requires_grad=True)
weight = torch.randn(vocabulary, width, requires_grad=True)
bias = torch.zeros(vocabulary, requires_grad=True)
labels = torch.randint(vocabulary, (tokens,))
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
linear_cross_entropy(hidden, weight, bias, labels, vocabulary, ParallelState(), softmax_).loss.backward()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of a process's memory from /proc")
def test_the_head_never_holds_its_logits():
    """24,576 tokens x 50,368 ids in fp32 would be 4.6 GiB, three times that with gradients; the bound is 1 GiB."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD], env=environment(), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 0 < int(done.stdout) < 1 << 20  # KiB
