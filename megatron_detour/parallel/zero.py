"""DeepSpeed's ZeRO-2, of which this module alone reads private fields; written for DeepSpeed 0.19.8 (setup.py).

ZeRO-2 keeps, for each parameter group, the fp32 weights and AdamW's moments of all its parameters in one flat vector,
cut into equal parts over the data-parallel ranks. Of DeepSpeedZeroOptimizer (runtime/zero/stage_1_and_2.py) are read:

| field | here |
|---|---|
| `optimizer` | the AdamW that it was given, whose groups hold this rank's part of the flat vectors |
| `round_robin_bit16_groups`, `round_robin_bit16_offsets` | a group's parameters, and where each lies in the vector |
| `single_partition_of_fp32_groups` | this rank's part of the fp32 weights: the keys of AdamW's state |
| `averaged_gradients`, `params_in_partition` | this rank's gradients after the last micro-batch, their parameters |
| `check_grad_overflow`, `has_overflow` | set, whatever its file says, to let it throw the gradients of a step away |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_detour.parallel.shard import spec_of
from megatron_detour.parallel.state import ParallelState

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def deepspeed_settings(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a DeepSpeed file as `Zero` needs it.

    Norm, clipping and the verdict on a step are made there: DeepSpeed would wait for the device five times and more to
    make them, and twice for its own figure of throughput.
    """
    return content | {
        "gradient_clipping": 0.0,
        "zero_optimization": content["zero_optimization"] | {"compute_grad_norm": False},
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
    }


@dataclass(frozen=True)
class ZeroGroup:
    """Parameters that are updated together."""

    parameters: list[tuple[str, torch.nn.Parameter, int]]  # name, parameter, offset in the group's flat vector
    partition: torch.Tensor  # fp32 [elements / data-parallel ranks]: this rank's part of the flat vector
    options: dict[str, Any]  # AdamW's: lr, weight_decay, frozen, ...


class Zero:
    """A model under ZeRO-2 and AdamW: gradients over micro-batches, their norm, and the clipped step."""

    def __init__(self, engine: DeepSpeedEngine, parallel: ParallelState, clip: float) -> None:
        """`clip` is the greatest norm of a gradient."""
        self.engine, self.parallel, self.clip = engine, parallel, clip
        self._zero = zero = engine.optimizer
        zero.has_overflow = lambda partition_gradients: True  # asked where check_grad_overflow is set: see `step`
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.groups = [
            ZeroGroup([(names[id(p)], p, offset) for p, offset in zip(parameters, offsets, strict=True)], part, options)
            for parameters, offsets, part, options in zip(
                zero.round_robin_bit16_groups,
                zero.round_robin_bit16_offsets,
                zero.single_partition_of_fp32_groups,
                zero.optimizer.param_groups,
                strict=True,
            )
        ]

    @property
    def module(self) -> Any:
        """The model itself."""
        return self.engine.module

    def adam_state(self, group: ZeroGroup) -> dict[str, torch.Tensor]:
        """This rank's moments (of the partition's size) and `step`; empty before the first step."""
        return self._zero.optimizer.state.get(group.partition, {})

    def set_adam_state(self, group: ZeroGroup, moments: dict[str, torch.Tensor], steps: int) -> None:
        step = torch.tensor(float(steps), device=group.partition.device if group.options.get("fused") else "cpu")
        self._zero.optimizer.state[group.partition] = {"step": step, **moments}

    def set_learning_rate(self, rate: float) -> None:
        for group in self.groups:
            group.options["lr"] = rate

    def accumulate(self, arguments: tuple, scale: torch.Tensor, is_last: bool) -> Any:
        """Adds the gradient of `scale` times a micro-batch's loss; returns what the model returned.

        Ranks sum and average when `is_last`, of a step's micro-batches.
        """
        self.engine.set_gradient_accumulation_boundary(is_last)
        out = self.engine(*arguments)
        self.engine.backward(out.loss * scale.to(out.loss.dtype))
        return out

    def gradient_norm(self) -> torch.Tensor:
        """The norm of the whole gradient before clipping, fp32 scalar on the device; the same on every rank."""
        squares = torch.stack([self._sum_of_squares(number) for number in range(len(self.groups))])
        dist.all_reduce(squares, group=self.parallel.data_group)
        if self.parallel.tensor_size > 1:
            dist.all_reduce(squares, group=self.parallel.tensor_group)
        return torch.linalg.vector_norm(squares.sqrt())

    def _sum_of_squares(self, number: int) -> torch.Tensor:
        """Of this rank's part of a group's gradient; what every tensor rank holds whole counts once."""
        zero, first = self._zero, self.parallel.tensor_rank == 0
        gradients = [g for g in zero.averaged_gradients[number] if not getattr(g, "_zero_padding", False)]
        norms = [
            torch.linalg.vector_norm(gradient, dtype=torch.float64)
            for gradient, parameter in zip(gradients, zero.params_in_partition[number], strict=False)
            if first or spec_of(parameter) is not None
        ]
        if not norms:
            return torch.zeros((), dtype=torch.float32, device=self.groups[number].partition.device)
        return torch.stack(norms).square().sum().float()

    def step(self, norm: torch.Tensor, skip: bool = False) -> None:
        """Clips the gradient, whose `norm` is, and updates what is not frozen; `skip` throws the gradient away."""
        # As DeepSpeed clips: the factor is 1 where the norm is less than `clip`.
        self._zero.optimizer.gradient_factor = 1.0 / torch.clamp((norm + 1e-6) / self.clip, min=1.0)
        self._zero.check_grad_overflow = skip
        self.engine.step()
