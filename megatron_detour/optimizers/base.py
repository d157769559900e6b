"""The interface of optimizers: their keys in the run file, the states that they keep, and an update.

ZeRO-2 cuts weights and states into flat parts without regard to parameters, so an update has to be elementwise, but for
root mean squares over parameters, which ranks sum up. Code outside this package never compares names of optimizers.
docs/extending.md shows how to add one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from megatron_detour.settings import Range

if TYPE_CHECKING:
    import torch

Beta = Annotated[float, Range(least=0, below=1)]
FP32 = 4  # bytes
PIECE = 1 << 22  # elements that are updated at once: what is computed on the way is as long, and a partition far longer


@dataclass(frozen=True)
class Optimizer:
    """An optimizer; the fields of its dataclass are its keys in the run file's `optimizer`.

    Weight decay and clipping are the run file's own. A frozen part is never updated: its states stay as they are.
    """

    name: ClassVar[str]  # in the run file
    label: ClassVar[str]  # in the model card
    states: ClassVar[tuple[str, ...]]  # fp32 values of each element, by their names in torch's state and in checkpoints

    @classmethod
    def bytes_per_parameter(cls) -> int:
        """Return the bytes of an element's fp32 weight and states, divided among ranks or in a checkpoint."""
        return FP32 * (1 + len(cls.states))

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Return torch's optimizer over parameter groups, which have a `weight_decay` each; `lr` is set at every step.

        Its state of a parameter holds `states`, and `step` if it counts. By default it calls `rates`, decays and calls
        `update`.
        """
        return _elementwise(self, groups)

    def rates(
        self,
        gradient: torch.Tensor,
        states: dict[str, torch.Tensor],
        rate: float,
        rms: Callable[[torch.Tensor], torch.Tensor],
    ) -> float | torch.Tensor:
        """Return the learning rate of decay and update: `rate`, or one of each element, fp32 [elements].

        `rms` turns [elements], in place, into the root mean square over all elements of the parameter that each belongs
        to. `gradient` may be overwritten if `update` does not read it: another vector may not fit into the memory.
        """
        return rate

    def update(self, weight: torch.Tensor, gradient: torch.Tensor, states: dict[str, torch.Tensor], rate: Any) -> None:
        """Update `weight` and `states`, which begin at zero, in place; all are fp32 [elements]; `rate` is of `rates`.

        Called for one piece of at most PIECE elements after the other. `states` also has `step`, the number of updates
        with this one, on the host. Needed unless `build` is overridden.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """Return the label and the keys, such as ``Lion with betas 0.9 and 0.99``."""
        keys = dataclasses.asdict(self).items()
        words = [f"{key.replace('_', ' ')} {_words(value)}" for key, value in keys]
        return f"{self.label} with {', '.join(words)}" if words else self.label


def _rms(values: torch.Tensor) -> torch.Tensor:
    """Of a whole parameter; the same for all of its elements."""
    return values.square().mean().sqrt()


def pieces(*values: Any) -> Iterator[tuple[Any, ...]]:
    """Yield views of PIECE elements of vectors of one length; a number is repeated."""
    vectors = [value.split(PIECE) if getattr(value, "ndim", 0) else None for value in values]
    for number in range(max(len(vector) for vector in vectors if vector)):
        yield tuple(vector[number] if vector else value for vector, value in zip(vectors, values, strict=True))


def _words(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _elementwise(optimizer: Optimizer, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    import torch  # the run file is read without it

    class Elementwise(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
            self.rms: dict[torch.Tensor, Callable] = {}  # by weight, of those that are not one whole parameter

        @torch.no_grad()
        def step(self, closure=None) -> None:
            for group in self.param_groups:
                for weight in group["params"]:
                    states = self.state[weight]
                    if not states:
                        states |= {name: torch.zeros_like(weight) for name in optimizer.states}
                        states["step"] = torch.zeros(())
                    states["step"] += 1
                    rate = optimizer.rates(weight.grad, states, group["lr"], self.rms.get(weight, _rms))
                    vectors = [states[name] for name in optimizer.states]
                    for part, gradient, of_part, *held in pieces(weight, weight.grad, rate, *vectors):
                        part.mul_(1 - of_part * group["weight_decay"])
                        named = dict(zip(optimizer.states, held, strict=True))
                        optimizer.update(part, gradient, named | {"step": states["step"]}, of_part)

    return Elementwise()
