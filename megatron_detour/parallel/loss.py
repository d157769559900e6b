"""Linear layer and cross-entropy in one, cut by vocabulary: a (positions x vocabulary) matrix never exists whole.

The gradient is computed chunk by chunk together with the loss, as the logits of a chunk are at hand only then.
L labelled positions, E features, V rows of the vocabulary on this tensor rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_detour.parallel.collectives import copy_to_tensor_parallel
from megatron_detour.parallel.state import ParallelState

# Logits at a time. Much of a small chunk's time goes into adding to the weight's gradient, [V, E] of fp32.
CHUNK_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}

# products [n, V], written over by softmax(products + bias [V]) -> log of the sum of exponentials [n], greatest sum [n]
Softmax = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class LossSum:
    """Sums over the labelled positions, scalars in fp32 (fp64 for fp64 input) but for the counts.

    `loss` is what is minimised: the cross-entropy in nats, and the z-loss where there is one.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    right: torch.Tensor  # int64: labels that are the arg-max
    labelled: int


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
    """Cross-entropies of softmax(hidden @ weight.T + bias), plus z_loss * log(sum of exponentials)^2 (PaLM, 2022).

    hidden: [L, E], the same on every tensor rank; weight: [V, E] and bias: [V], this rank's shard, rows beyond
    `vocabulary` being padding; labels: int64 [L], in [0, vocabulary): positions without a label are left out before.
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
        # The products of chunks are added up in `exact`; a single one needs no sum.
        summed_in = exact if len(labels) > chunk else None
        grads = _Gradients(hidden, weight, bias, rows, summed_in, ctx.needs_input_grad[1:3]) if needs_grad else None
        room = hidden.new_empty(chunk, rows)  # used again: on a CPU new pages cost as much as what is written to them
        cross_entropy = torch.zeros((), dtype=exact, device=hidden.device)
        penalty = torch.zeros_like(cross_entropy)
        right = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            target = labels[part] - first_id
            logits = torch.mm(hidden[part], weight_real.T, out=room[: len(target)])
            here = (target >= 0) & (target < rows)
            at_target = torch.arange(len(target), device=target.device), target.clamp(0, rows - 1)
            of_target = logits[at_target].to(exact) + bias_real[at_target[1]].to(exact)
            of_target.masked_fill_(~here, float("-inf"))
            log_sum, greatest = softmax_(logits, bias_real)
            whole_log_sum, of_target, greatest = _over_ranks(log_sum, of_target, greatest, state)
            cross_entropy += (whole_log_sum - of_target).sum()
            penalty += z_loss * whole_log_sum.square().sum()
            right += (of_target == greatest).sum()
            if grads:
                # d loss / d logit = p (1 + 2 z log_sum) - [label]; the softmax was over this rank's rows alone.
                factor = 1 + 2 * z_loss * whole_log_sum
                p_of_target = torch.exp(of_target - whole_log_sum)
                if state.tensor_size > 1 or z_loss:
                    logits *= (factor * torch.exp(log_sum - whole_log_sum))[:, None]
                # From the fp32 figures: a probability near 1 in bf16 would lose what is missing to 1.
                logits[at_target] = torch.where(here, (p_of_target * factor - 1).to(logits.dtype), logits[at_target])
                grads.add(part, logits)
        ctx.grads = grads
        ctx.mark_non_differentiable(cross_entropy, right)
        return cross_entropy + penalty, cross_entropy, right

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if ctx.grads is None:
            raise RuntimeError("the gradients of this loss were used up by its first backward pass")
        grads, ctx.grads = ctx.grads, None
        return (*grads.scaled(grad_loss), None, None, None, None, None, None)


class _Gradients:
    """Of hidden, in its own type; of weight and bias, summed over chunks in `exact`, or of one chunk in their own.

    None where weight or bias is frozen: `trained` are the two's flags.
    """

    def __init__(self, hidden, weight, bias, rows: int, exact: torch.dtype | None, trained: tuple[bool, bool]) -> None:
        self.hidden, self.weight, self.rows = hidden, weight, rows
        self.types = (hidden.dtype, weight.dtype, bias.dtype)
        self.grad_hidden = torch.zeros_like(hidden)
        self.grad_weight, self.grad_bias = (
            torch.zeros(value.shape, dtype=exact or value.dtype, device=value.device) if needed else None
            for value, needed in zip((weight, bias), trained, strict=True)
        )

    def add(self, part: slice, slope: torch.Tensor) -> None:
        torch.mm(slope, self.weight[: self.rows], out=self.grad_hidden[part])
        if self.grad_weight is not None:
            real = self.grad_weight[: self.rows]
            if slope.dtype == real.dtype:
                real.addmm_(slope.T, self.hidden[part])
            else:
                real += slope.T @ self.hidden[part]
        if self.grad_bias is not None:
            # As a product: a sum in another type would first make a copy in that type.
            self.grad_bias[: self.rows] += (slope.new_ones(1, len(slope)) @ slope)[0]

    def scaled(self, scale: torch.Tensor) -> list[torch.Tensor | None]:
        """In place where the type allows it; the scale stays in fp32, as a rounded one would change with the split of
        a batch."""
        grads = (self.grad_hidden, self.grad_weight, self.grad_bias)
        return [_scaled(grad, scale, dtype) for grad, dtype in zip(grads, self.types, strict=True)]


def _scaled(grad: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    if grad is None:
        return None
    return grad.mul_(scale) if grad.dtype == dtype == scale.dtype else (grad.to(scale.dtype) * scale).to(dtype)


def _over_ranks(log_sum, of_target, greatest, state):
    """The same figures for the whole vocabulary."""
    if state.tensor_size == 1:
        return log_sum, of_target, greatest
    both = torch.stack([greatest, of_target])
    dist.all_reduce(both, dist.ReduceOp.MAX, group=state.tensor_group)
    greatest, of_target = both
    total = torch.exp(log_sum - greatest)
    dist.all_reduce(total, group=state.tensor_group)
    return total.log() + greatest, of_target, greatest
