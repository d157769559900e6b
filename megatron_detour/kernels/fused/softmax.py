"""In-place softmax of very long rows: one pass for maximum and sum, one to write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _softmax(logits, bias, log_sums, maxima, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * columns
    lane = tl.arange(0, BLOCK)
    greatest = tl.full([BLOCK], float("-inf"), tl.float32)  # one per lane, combined after the pass
    total = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, columns, BLOCK):
        column = offset + lane
        value = tl.load(start + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        higher = tl.maximum(greatest, value)
        # A lane without values so far would compute inf - inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(greatest - base) + tl.exp(value - base)
        greatest = higher
    maximum = tl.max(greatest, 0)
    log_sum = maximum + tl.log(tl.sum(total * tl.exp(greatest - maximum), 0))
    for offset in range(0, columns, BLOCK):
        column = offset + lane
        value = tl.load(start + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        value += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
        tl.store(start + column, tl.exp(value - log_sum).to(logits.dtype.element_ty), mask=column < columns)
    tl.store(log_sums + row, log_sum)
    tl.store(maxima + row, maximum)


def softmax_(logits: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if not logits.is_contiguous():
        raise ValueError("logits must be contiguous")
    rows, columns = logits.shape
    log_sum, greatest = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    block = min(triton.next_power_of_2(columns), 4096)
    _softmax[(rows,)](logits, bias, log_sum, greatest, columns, BLOCK=block, num_warps=max(min(block // 512, 8), 1))
    return log_sum, greatest
