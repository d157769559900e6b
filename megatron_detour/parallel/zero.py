"""DeepSpeed's ZeRO-2, of which this module alone reads private fields; written for DeepSpeed 0.19.8 (setup.py).

ZeRO-2 keeps, for each parameter group, the fp32 weights and optimizer states of all its parameters in one flat vector,
cut into equal parts over the data-parallel ranks. Gradients are summed by this project (gradients.py): DeepSpeed would
round each micro-batch's to bf16 and all-reduce it.

Of DeepSpeedZeroOptimizer (runtime/zero/stage_1_and_2.py) are used:

| field | here |
|---|---|
| `optimizer` | the optimizer that it was given, whose groups hold this rank's part of the flat vectors |
| `round_robin_bit16_groups`, `round_robin_bit16_offsets` | a group's parameters, and where each lies in the vector |
| `single_partition_of_fp32_groups` | this rank's part of the fp32 weights: the keys of the optimizer's state |
| `_grad_acc_hooks` | its hooks on gradients, removed |
| `averaged_gradients` | set to this rank's gradients before a step |
| `check_grad_overflow` | set to False, as the caller decides which steps are skipped |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_detour.parallel.gradients import GradientSum
from megatron_detour.parallel.parameter_rms import ParameterRms
from megatron_detour.parallel.state import ParallelState

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

EMA = "ema"  # the state that is an exponential moving average of the fp32 weights


def deepspeed_settings(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a DeepSpeed file as `Zero` needs it.

    Norm, clipping and the decision to skip a step are made in `Zero`: DeepSpeed would wait for the device five times
    and more to make them, and twice for its own figure of throughput.
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
    gradient: GradientSum
    options: dict[str, Any]  # the optimizer's: lr, weight_decay, frozen, ...


class Zero:
    """A model under ZeRO-2: gradients over micro-batches, their norm, and the clipped step."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        parallel: ParallelState,
        clip: float,
        states: tuple[str, ...],
        ema: float | None = None,
    ) -> None:
        """`clip` is the maximum norm of a gradient, `states` the names of what the optimizer keeps of each element.

        `ema` is the decay rate of a moving average of the weights, which is one more state.
        """
        self.engine, self.parallel, self.clip, self.ema = engine, parallel, clip, ema
        self.states = (*states, EMA) if ema else states
        self._zero = zero = engine.optimizer
        zero.check_grad_overflow = False
        for hook in zero._grad_acc_hooks:
            hook.remove()
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        self.groups = [
            ZeroGroup(
                [(names[id(p)], p, offset) for p, offset in zip(parameters, offsets, strict=True)],
                partition,
                GradientSum(zip(parameters, offsets, strict=True), partition.data, parallel),
                options,
            )
            for parameters, offsets, partition, options in zip(
                zero.round_robin_bit16_groups,
                zero.round_robin_bit16_offsets,
                zero.single_partition_of_fp32_groups,
                zero.optimizer.param_groups,
                strict=True,
            )
        ]
        zero.optimizer.rms = {
            group.partition: ParameterRms(((p, offset) for _, p, offset in group.parameters), group.partition, parallel)
            for group in self.groups
        }

    @property
    def module(self) -> Any:
        """The model itself."""
        return self.engine.module

    def optimizer_state(self, group: ZeroGroup) -> dict[str, torch.Tensor]:
        """This rank's states (of the partition's size), and `step` if the optimizer counts; empty before step 1."""
        return self._zero.optimizer.state.get(group.partition, {})

    def set_optimizer_state(self, group: ZeroGroup, states: dict[str, torch.Tensor], steps: int) -> None:
        """An optimizer that does not count leaves `step` alone."""
        step = torch.tensor(float(steps), device=group.partition.device if group.options.get("fused") else "cpu")
        self._zero.optimizer.state[group.partition] = {"step": step, **states}

    def set_learning_rate(self, rate: float) -> None:
        for group in self.groups:
            group.options["lr"] = rate

    def accumulate(self, arguments: tuple, scale: torch.Tensor) -> Any:
        """Add the gradient of `scale` times a micro-batch's loss to this rank's; return what the model returned."""
        out = self.module(*arguments)
        (out.loss * scale.to(out.loss.dtype)).backward()
        return out

    def sum_gradients(self) -> torch.Tensor:
        """Sum the gradients over data-parallel ranks.

        Return the norm of the whole gradient before clipping: an fp32 scalar on the device, the same on every rank.
        """
        for group in self.groups:
            group.gradient.reduce()
        squares = sum(group.gradient.sum_of_squares() for group in self.groups)
        dist.all_reduce(squares, group=self.parallel.data_group)
        if self.parallel.tensor_size > 1:
            dist.all_reduce(squares, group=self.parallel.tensor_group)
        return squares.sqrt().float()

    def step(self, norm: torch.Tensor, skip: bool = False) -> None:
        """Clip the gradient, of norm `norm`, and update what is not frozen; with `skip`, discard the gradient."""
        if not skip:
            # As DeepSpeed clips: the factor is 1 where the norm is less than `clip`.
            self._zero.optimizer.gradient_factor = 1.0 / torch.clamp((norm + 1e-6) / self.clip, min=1.0)
            self._zero.averaged_gradients = {i: [group.gradient.partition] for i, group in enumerate(self.groups)}
            self._step()
        for group in self.groups:
            group.gradient.clear()

    @torch.no_grad()
    def _step(self) -> None:
        """Step the optimizer and move the average, frozen parts included.

        The average begins at the weights before the first update: a group without states is its own average.
        """
        averaged = self.groups if self.ema else []
        new = [group for group in averaged if not (group.options["frozen"] or self.optimizer_state(group))]
        before = [group.partition.detach().clone() for group in new]
        self._zero.step()
        for group, weights in zip(new, before, strict=True):
            self.optimizer_state(group)[EMA] = weights
        for group in averaged:
            if held := self.optimizer_state(group):
                held[EMA].lerp_(group.partition, 1 - self.ema)
