"""Which layers the detour needs and which could be frozen during it, proposed from a pilot's drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_detour.errors import DetourError
from megatron_detour.model_parts import name_layers

THRESHOLD = 2.0  # of the drift ratio; the paper's layers have 5 to 44 below layer 8 and 1.1 to 1.25 above


@dataclass(frozen=True)
class Proposal:
    """The layers that the detour needs, from `first` to `last`, none if both are None, and `freeze` for the others.

    `gradients` are each layer's shares of the gradient, by objective, if they were measured.
    """

    first: int | None
    last: int | None
    freeze: tuple[str, ...]
    reason: str
    ratio: tuple[float, ...]
    threshold: float
    gradients: dict[str, tuple[float, ...]] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def propose(
    ratio: np.ndarray | None, gradients: Mapping[str, Sequence[float]] | None = None, threshold: float = THRESHOLD
) -> Proposal:
    """Propose the contiguous layers with the largest sum of log(ratio / threshold), and to freeze all others.

    `ratio` is that of the drift to the noise of seeds, [layers]. A layer whose drift is the noise of seeds was moved by
    training as such, not by the detour. The sum lets a range cross a layer that is just below the threshold and end
    before a lone one far above. The gradients do not decide: the reason tells what part of them the proposal would
    leave out. Raises DetourError without a noise control.
    """
    if ratio is None:
        raise DetourError("the drift has no noise control; measure it with --second-control, trained with another seed")
    if not np.isfinite(ratio).all() or not (ratio > 0).all():
        raise DetourError("the drift ratio of some layers is undefined: two of the models are the same")
    if gradients and any(len(shares) != len(ratio) for shares in gradients.values()):
        raise DetourError(f"the gradients are not those of a model with {len(ratio)} layers; give the pilot's start")
    needed = _largest_sum(np.log(ratio / threshold))
    freeze = _others(needed, len(ratio))
    shares = {name: tuple(map(float, each)) for name, each in gradients.items()} if gradients else None
    first, last = (needed[0], needed[-1]) if needed else (None, None)
    reason = _reason(needed, ratio, threshold) + _gradient_words(needed, shares)
    return Proposal(first, last, freeze, reason, tuple(ratio.tolist()), threshold, shares)


def as_arm(phase: str, freeze: Sequence[str]) -> str:
    """Return the line of a study file for an arm that freezes these parts in a phase."""
    return f"proposed: {{set: {{phases.{phase}.freeze: [{', '.join(freeze)}]}}}}"


def _largest_sum(values: np.ndarray) -> range:
    """Return the contiguous range with the largest positive sum, the first of equals; an empty one without any."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    best, found, low = 0.0, range(0), 0
    for end in range(1, len(sums)):
        if sums[end] - sums[low] > best:
            best, found = sums[end] - sums[low], range(low, end)
        if sums[end] < sums[low]:
            low = end
    return found


def _others(needed: range, layers: int) -> tuple[str, ...]:
    """Return `freeze` for all layers but those needed; nothing if none or all are."""
    if not needed:
        return ()
    rest = (range(needed[0]), range(needed[-1] + 1, layers))
    return tuple(name_layers(layers) for layers in rest if layers)


def _reason(needed: range, ratio: np.ndarray, threshold: float) -> str:
    if not needed:
        return (
            f"no layer drifts {threshold:g} times as far as two seeds of the control do (at most {ratio.max():.2f} "
            "times), so that this pilot proposes nothing to freeze; it may be too short"
        )
    inside, rest = ratio[list(needed)], np.delete(ratio, list(needed))
    words = (
        f"layers {needed[0]} to {needed[-1]} drift {inside.min():.2g} to {inside.max():.2g} times as far as two seeds "
        "of the control do"
    )
    if not len(rest):
        return f"{words}, which are all layers: freeze none"
    return f"{words}, the others {rest.min():.2g} to {rest.max():.2g} times"


def _gradient_words(needed: range, shares: dict[str, tuple[float, ...]] | None) -> str:
    if not shares or not needed:
        return ""
    inside = [f"{sum(each[i] for i in needed):.0%} of the {name.upper()} gradient" for name, each in shares.items()]
    return f"; they receive {' and '.join(inside)} of all layers (squared norm)"
