"""Linear layer and cross-entropy in one, cut by vocabulary: a (positions x vocabulary) matrix never exists whole.

The gradient is computed chunk by chunk together with the loss, as the logits of a chunk are at hand only then.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_detour.parallel.collectives import copy_to_tensor_parallel
from megatron_detour.parallel.state import ParallelState

CHUNK_ELEMENTS = 1 << 24  # logits at a time: 64 MiB in fp32


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    labels: torch.Tensor,
    vocabulary: int,
    state: ParallelState,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross-entropies in nats of softmax(hidden @ weight.T + bias), and how many labels are its arg-max.

    hidden: [n, E], the same on every tensor rank; weight: [rows, E] and bias: [rows], this rank's shard;
    labels: int64 [n], all of them below `vocabulary`; returns two scalars, the first in fp32 (fp64 for fp64 input).
    """
    hidden = copy_to_tensor_parallel(hidden, state)
    return _LinearCrossEntropy.apply(hidden, weight, bias, labels, vocabulary, state, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, vocabulary, state, needs_grad):
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        first_id = state.tensor_rank * weight.shape[0]
        rows = max(min(weight.shape[0], vocabulary - first_id), 0)  # without padding
        weight_real, bias_real = weight[:rows], bias[:rows].to(exact)
        grad_hidden = torch.zeros_like(hidden) if needs_grad else None
        grad_weight = torch.zeros(weight.shape, dtype=exact, device=weight.device) if needs_grad else None
        grad_bias = torch.zeros(bias.shape, dtype=exact, device=bias.device) if needs_grad else None
        loss = torch.zeros((), dtype=exact, device=hidden.device)
        right = torch.zeros((), dtype=torch.int64, device=hidden.device)
        for start in range(0, len(labels), max(CHUNK_ELEMENTS // weight.shape[0], 1)):
            part = slice(start, start + max(CHUNK_ELEMENTS // weight.shape[0], 1))
            logits = (hidden[part] @ weight_real.T).to(exact).add_(bias_real)
            target = labels[part] - first_id
            chunk_loss, chunk_right, probabilities = _softmax_cross_entropy(logits, target, state)
            loss += chunk_loss
            right += chunk_right
            if needs_grad:
                here = (target >= 0) & (target < rows)
                probabilities[here.nonzero()[:, 0], target[here]] -= 1
                slope = probabilities.to(hidden.dtype)
                grad_hidden[part] = slope @ weight_real
                if slope.dtype == exact:
                    grad_weight[:rows].addmm_(slope.T, hidden[part])
                else:
                    grad_weight[:rows] += slope.T @ hidden[part]
                grad_bias[:rows] += probabilities.sum(0)
        if needs_grad:
            ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
            ctx.types = (hidden.dtype, weight.dtype, bias.dtype)
        ctx.mark_non_differentiable(right)
        return loss, right

    @staticmethod
    def backward(ctx, grad_loss, _):
        # In fp32 and rounded once: a scale rounded to bf16 would change with the split of a batch.
        pairs = zip(ctx.saved_tensors, ctx.types, strict=True)
        scaled = ((grad.to(grad_loss.dtype) * grad_loss).to(dtype) for grad, dtype in pairs)
        return (*scaled, None, None, None, None)


def _softmax_cross_entropy(logits, target, state):
    """Summed loss, number of right arg-maxes and probabilities (written over `logits`, [n, rows]) of a chunk."""
    rows = logits.shape[1]
    here = (target >= 0) & (target < rows)
    greatest = logits.amax(1) if rows else logits.new_full((len(logits),), float("-inf"))
    of_target = logits.gather(1, target.clamp(0, max(rows - 1, 0))[:, None])[:, 0] if rows else greatest
    of_target = of_target.masked_fill(~here, float("-inf"))
    if state.tensor_size > 1:
        both = torch.stack([greatest, of_target])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=state.tensor_group)
        greatest, of_target = both
    right = (of_target == greatest).sum()
    total = logits.sub_(greatest[:, None]).exp_().sum(1)
    if state.tensor_size > 1:
        dist.all_reduce(total, group=state.tensor_group)
    loss = (total.log() + greatest - of_target).sum()
    return loss, right, logits.div_(total[:, None])
