"""Averages of a run's weights instead of a checkpoint's own: of several checkpoints, or kept in training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_detour.checkpoint import huggingface, store
from megatron_detour.checkpoint.huggingface import Source, Weights
from megatron_detour.checkpoint.state import EMA
from megatron_detour.config import RunConfig
from megatron_detour.errors import DetourError, nearest
from megatron_detour.model.families import Family, read_shape
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.objectives import REFERENCE
from megatron_detour.plan import Plan
from megatron_detour.release.checkpoint_info import CheckpointInfo
from megatron_detour.tokenizer.vocabulary import load_vocabulary
from megatron_detour.ui.format import counted


@dataclass(frozen=True)
class Averaged:
    """What was averaged, and the loss under fixed masks of the last checkpoint and of the average, if measured."""

    what: str
    losses: tuple[float, float] | None

    def text(self) -> str:
        """Return, for instance, the mean of the weights after steps 4 and 6 (MLM loss ...), for a card or a line."""
        if self.losses is None:
            return self.what
        before, after = self.losses
        label = REFERENCE.label
        return f"{self.what} ({label} loss on held-out text {after:.4f}; with the last step's own weights {before:.4f})"


def checkpoints_to_average(path: Path, which: str) -> list[Path]:
    """Return the last N checkpoints of a run directory, or those named in `which`, by commas; oldest first.

    Those N are of the last phase: the last checkpoint of each earlier one is always kept, and may be of another
    objective. Raise DetourError if there are fewer, or none of a name.
    """
    there = {folder.name: folder for folder in store.find_checkpoints(path / "checkpoints") if store.step_of(folder)}
    if not there:
        raise DetourError(f"--average {which}: {path} has no checkpoints after step 0; give a run directory")
    if which.isdecimal():
        if int(which) < 2:
            raise DetourError(f"--average {which}: give the number of checkpoints to average, 2 or more")
        folders = list(there.values())
        plan = CheckpointInfo.read(folders[-1]).plan
        last = phase_of(folders[-1], plan)
        folders = [folder for folder in folders if phase_of(folder, plan) == last]
        if int(which) > len(folders):
            raise DetourError(
                f"--average {which}: {path} has {counted(len(folders), 'checkpoint')} of its last phase, {last!r}; set "
                "checkpoint.every, checkpoint.keep or checkpoint.keep_every of the run file to keep more, or name the "
                "checkpoints to average"
            )
        return folders[-int(which) :]
    names = which.split(",")
    for name in names:
        if name not in there or names.count(name) > 1:
            hint = nearest(name, there) or f"; it has {', '.join(there)}"
            fault = "is named twice" if name in there else f"is not a checkpoint of {path}{hint}"
            raise DetourError(f"--average {which}: {name!r} {fault}")
    return sorted((there[name] for name in names), key=store.step_of)


def phase_of(checkpoint: Path, plan: Plan) -> str:
    return plan.step(store.step_of(checkpoint)).phase.name


def mixed_phases(checkpoints: list[Path], plan: Plan) -> list[str]:
    """Return a warning if several checkpoints are not of one phase."""
    phases = dict.fromkeys(phase_of(folder, plan) for folder in checkpoints) if len(checkpoints) > 1 else {}
    return [f"the average mixes phases: {', '.join(phases)}"] if len(phases) > 1 else []


@torch.no_grad()
def take_average(
    model: LanguageModel,
    checkpoints: list[Path],
    which: str,
    config: RunConfig,
    loss: Callable[[LanguageModel], float] | None,
) -> Averaged:
    """Replace a model's weights, those of the last checkpoint, by the average; measure the `loss` of both."""
    device = next(model.parameters()).device
    with ExitStack() as stack:
        if which == EMA:
            weights, words = _moving(checkpoints[-1], config, model.shape, stack)
        else:
            weights, words = _mean(checkpoints, stack)
        before = loss(model) if loss else None
        for name, weight in model.state_dict().items():
            weight.copy_(weights(name))
    losses = (before, loss(model)) if loss else None
    model.to(device)
    return Averaged(words, losses)


def _mean(checkpoints: list[Path], stack: ExitStack):
    """Return a reader of means by name, of one tensor at a time in fp64, and their description."""
    *others, last = checkpoints
    shape, vocabulary = read_shape(Source(str(last)).config(), str(last)), load_vocabulary(last)
    for other in others:
        same = load_vocabulary(other).sha256 == vocabulary.sha256
        if not same or read_shape(Source(str(other)).config(), str(other)) != shape:
            raise DetourError(f"--average: {other} is a checkpoint of another model than {last}")
    readers = [stack.enter_context(Weights(Source(str(folder)))) for folder in checkpoints]
    for reader in readers:
        reader.check(shape)

    def mean(name: str) -> torch.Tensor:
        return (sum(reader(name).double() for reader in readers) / len(readers)).float()

    *steps, final = (f"{store.step_of(folder):,}" for folder in checkpoints)
    steps = f"steps {', '.join(steps)} and {final}" if steps else f"step {final}"
    return mean, f"the mean of the weights after {steps}"


def _moving(checkpoint: Path, config: RunConfig, shape: Family, stack: ExitStack):
    """Return a reader of moving averages by name, and their description. A part never updated is its own average."""
    if config.optimizer.ema is None:
        raise DetourError(f"--average {EMA}: the run of {checkpoint} keeps no moving average; optimizer.ema is not set")
    weights = stack.enter_context(Weights(Source(str(checkpoint))))
    weights.check(shape)
    state, steps = huggingface.open_optimizer(checkpoint, (*config.optimizer.kind.states, EMA), stack)
    words = f"the exponential moving average of the weights, with a decay of {config.optimizer.ema} per step"
    return lambda name: state(EMA, name) if name in steps else weights(name), words
