"""Fused linear layer and cross-entropy, sharded by vocabulary, which never materializes all [positions, vocabulary]
logits.

The gradient is computed together with the loss, chunk by chunk, as a chunk's logits exist only then.
L labeled positions, E features, V rows of the vocabulary on this tensor rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_detour.parallel.collectives import copy_to_tensor_parallel
from megatron_detour.parallel.shard_spec import CHUNK_ELEMENTS
from megatron_detour.parallel.state import ParallelState

# logits [n, V], overwritten by softmax(logits + bias [V]) -> log-sum-exp [n] and maximum [n] of logits + bias
Softmax = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class LossSum:
    """Sums over the labeled positions; scalars in fp32 (fp64 for fp64 inputs), except for the counts.

    `loss` is the objective: the cross-entropy in nats, plus the z-loss if any.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    right: torch.Tensor  # int64: labels with the highest logit
    labeled: int


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    vocabulary: int,
    state: ParallelState,
    softmax_: Softmax,
    z_loss: float = 0.0,
) -> LossSum:
    """Return the cross-entropy of softmax(hidden @ weight.T + bias), plus z_loss * log-sum-exp^2 (PaLM, 2022).

    hidden: [L, E], the same on every tensor rank; weight: [V, E] and bias: [V], this rank's shard, where rows beyond
    `vocabulary` are padding; labels: int64 [L], in [0, vocabulary). Positions without a label are not passed in.
    """
    hidden = copy_to_tensor_parallel(hidden, state)
    figures = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, vocabulary, state, softmax_, z_loss, torch.is_grad_enabled()
    )
    return LossSum(*figures, len(labels))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, vocabulary, state, softmax_, z_loss, needs_grad):
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        first_id = state.tensor_rank * weight.shape[0]
        rows = min(weight.shape[0], vocabulary - first_id)  # without padding
        weight_real, bias_real = weight[:rows], bias[:rows]
        chunk = max(min(CHUNK_ELEMENTS[hidden.device.type] // weight.shape[0], len(labels)), 1)
        # Gradients of several chunks are accumulated in `exact`; those of a single chunk need no accumulation.
        summed_in = exact if len(labels) > chunk else None
        grads = _Gradients(hidden, weight, bias, rows, summed_in, ctx.needs_input_grad[1:3]) if needs_grad else None
        buffer = hidden.new_empty(chunk, rows)  # reused: on a CPU new memory pages cost as much as filling them
        cross_entropy = torch.zeros((), dtype=exact, device=hidden.device)
        penalty = torch.zeros_like(cross_entropy)
        right = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            target = labels[part] - first_id
            logits = torch.mm(hidden[part], weight_real.T, out=buffer[: len(target)])
            here = (target >= 0) & (target < rows)
            index = torch.arange(len(target), device=target.device), target.clamp(0, rows - 1)
            at_label = logits[index].to(exact) + bias_real[index[1]].to(exact)
            at_label.masked_fill_(~here, float("-inf"))
            log_sum, greatest = softmax_(logits, bias_real)
            full_log_sum, at_label, greatest = _reduce_over_ranks(log_sum, at_label, greatest, state)
            cross_entropy += (full_log_sum - at_label).sum()
            penalty += z_loss * full_log_sum.square().sum()
            right += (at_label == greatest).sum()
            if grads:
                # d loss / d logit = p (1 + 2 z log_sum) - [label]; the softmax covers only this rank's rows.
                factor = 1 + 2 * z_loss * full_log_sum
                p_label = torch.exp(at_label - full_log_sum)
                if state.tensor_size > 1 or z_loss:
                    logits *= (factor * torch.exp(log_sum - full_log_sum))[:, None]
                # From the fp32 values: bf16 rounds a probability near 1 so that p - 1 would be lost.
                logits[index] = torch.where(here, (p_label * factor - 1).to(logits.dtype), logits[index])
                grads.add(part, logits)
        ctx.grads = grads
        ctx.mark_non_differentiable(cross_entropy, right)
        return cross_entropy + penalty, cross_entropy, right

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError(
                "backward can be called only once: the gradients of this loss were freed by the first call"
            )
        grads, ctx.grads = ctx.grads, None
        return (*grads.scaled(grad_loss), None, None, None, None, None, None)


class _Gradients:
    """Gradients of hidden in its dtype, and of weight and bias accumulated in `exact`, or in their dtype if it is None.

    `trained` says whether weight and bias are trained; the gradient of a frozen one is None.
    """

    def __init__(self, hidden, weight, bias, rows: int, exact: torch.dtype | None, trained: tuple[bool, bool]) -> None:
        self.hidden, self.weight, self.rows = hidden, weight, rows
        self.types = (hidden.dtype, weight.dtype, bias.dtype)
        self.grad_hidden = torch.empty_like(hidden)
        # The first chunk writes the gradients of real rows and later ones add to them; padding has none.
        self.grad_weight, self.grad_bias = (
            torch.empty(value.shape, dtype=exact or value.dtype, device=value.device) if needed else None
            for value, needed in zip((weight, bias), trained, strict=True)
        )
        for grad in (self.grad_weight, self.grad_bias):
            if grad is not None:
                grad[rows if len(hidden) else 0 :].zero_()

    def add(self, part: slice, slope: torch.Tensor) -> None:
        torch.mm(slope, self.weight[: self.rows], out=self.grad_hidden[part])
        kept = 0 if part.start == 0 else 1
        if self.grad_weight is not None:
            real = self.grad_weight[: self.rows]
            if slope.dtype == real.dtype:
                real.addmm_(slope.T, self.hidden[part], beta=kept)
            else:
                _accumulate(real, slope.T @ self.hidden[part], kept)
        if self.grad_bias is not None:
            # As a matrix product: a sum in another dtype would first copy `slope` to that dtype.
            _accumulate(self.grad_bias[: self.rows], (slope.new_ones(1, len(slope)) @ slope)[0], kept)

    def scaled(self, scale: torch.Tensor) -> list[torch.Tensor | None]:
        """Scale in one pass, in place if dtypes allow it. The scale stays in fp32, as rounding it would make the result
        depend on how a batch is split."""
        grads = (self.grad_hidden, self.grad_weight, self.grad_bias)
        return [_scaled(grad, scale, dtype) for grad, dtype in zip(grads, self.types, strict=True)]


def _scaled(grad: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    if grad is None:
        return None
    if grad.dtype == dtype and grad.device.type == "cpu":
        return grad.mul_(scale)  # a CPU's scalar is not rounded to the tensor's dtype
    return torch.mul(grad, scale[None], out=grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype))


def _accumulate(total: torch.Tensor, part: torch.Tensor, kept: int) -> None:
    if kept:
        total += part
    else:
        total.copy_(part)


def _reduce_over_ranks(log_sum, at_label, greatest, state):
    """Combine log-sum-exp, label logit and maximum [n] of the ranks' shards of the vocabulary."""
    if state.tensor_size == 1:
        return log_sum, at_label, greatest
    both = torch.stack([greatest, at_label])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=state.tensor_group)
    greatest, at_label = both
    total = torch.exp(log_sum - greatest)
    dist.all_reduce(total, group=state.tensor_group)
    return total.log() + greatest, at_label, greatest
