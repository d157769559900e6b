"""The checkpoints of a run: where it begins or goes on, what is saved, and what is kept."""

from __future__ import annotations

import logging
import shutil
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_detour.checkpoint import huggingface, store
from megatron_detour.checkpoint.huggingface import Source
from megatron_detour.checkpoint.state import TrainingState, gather, scatter
from megatron_detour.errors import DetourError
from megatron_detour.files import flush, retry
from megatron_detour.forecast.storage import CHECKPOINT_BYTES
from megatron_detour.model.shape import Shape
from megatron_detour.observe import meter
from megatron_detour.plan import Step
from megatron_detour.run_directory import CHECKPOINTS, METRICS, newest_checkpoint, note, start_hash
from megatron_detour.training.guards import Guard, is_memory
from megatron_detour.training.run import Run

logger = logging.getLogger(__name__)

FORMAT = 3  # of run_state.json and optimizer.safetensors, and of the order of documents and masks
SPARE_BYTES = 64 << 20  # for tokenizer, metrics and report


class Checkpoints:
    """Every rank calls `restore`, `save` and `inspect`; the first one writes, beside training."""

    def __init__(self, run: Run, guard: Guard) -> None:
        self.run, self.guard = run, guard
        self.checkpoints, self.metrics = run.folder / CHECKPOINTS, run.folder / METRICS
        self._background = Background()
        self.check, self.wait = self._background.check, self._background.wait
        self.has_saved = False  # a step of this session
        self._start_hash: str | None = None
        self.seconds = 0.0  # that the last save took in all, gathering and writing
        self._gathered = TrainingState()

    @property
    def bytes(self) -> int:
        """The size of a checkpoint, roughly."""
        sizes = self.run.zero.module.full_sizes().values()
        return CHECKPOINT_BYTES * sum(torch.Size(size).numel() for size in sizes)

    def path(self, step: int) -> Path:
        return store.checkpoint_folder(self.checkpoints, step)

    def restore(self) -> int:
        """Sets weights and optimizer from the newest checkpoint or the start model; returns the tokens consumed."""
        found = [None]
        if self.run.parallel.is_first:
            store.remove_leftovers(self.checkpoints)
            found = [newest_checkpoint(self.run.folder, self.run.config)]
        dist.broadcast_object_list(found, src=0)
        checkpoint, model = found[0], self.run.zero.module
        if checkpoint is None and self.run.initial.weights is None:
            scatter(self.run.zero, lambda name: model.initial_weight(name, self.run.config.seed))
            return 0
        with ExitStack() as stack:
            source = self.run.initial.weights if checkpoint is None else Source(str(checkpoint))
            weights = stack.enter_context(huggingface.Weights(source))
            weights.check(model.full_sizes())
            if checkpoint is None:
                self._compare(source)
                scatter(self.run.zero, weights)
                return 0
            run_state = _read_state(checkpoint)
            if run_state["tokens"] < self.run.plan.total_tokens:
                self._check_corpora(run_state, checkpoint)
                refuse_another_shape(checkpoint, self.run.initial.shape)
            scatter(self.run.zero, weights, *huggingface.open_optimizer(checkpoint, stack))
            self.guard.restore(run_state["guard"])
            self._start_hash = run_state.get("start")
            model = self.run.config.model
            stand_in = self.run.initial.tokenizer.name
            if stand_in not in (model.tokenizer, model.start):
                logger.info("%s is gone; %s stands in for it", model.start or model.tokenizer, stand_in)
            logger.info("resuming from %s at %s tokens", checkpoint, f"{run_state['tokens']:,}")
            return run_state["tokens"]

    def prepare(self) -> None:
        """Makes room for what is saved, beside the first steps: the first save would wait for it."""
        if self.run.parallel.is_first:
            sizes, pinned = self.run.zero.module.full_sizes(), next(self.run.zero.module.parameters()).is_cuda
            self._background.submit(lambda: self._gathered.reserve(sizes, pinned))
            self._background.submit(self._hash_start)

    def _hash_start(self) -> None:
        self._start_hash = self._start_hash or start_hash(self.run.config.model.start)

    def save(self, done: Step | None) -> None:
        """Publishes a checkpoint after step `done`, or of the start, while training goes on.

        Raises DetourError when the disk has no room, and what the save before this one has raised.
        """
        target = self.path(done.number if done else 0)
        self._write(target, self._run_state(done), then=lambda: self._published(target))

    def inspect(self, step: Step, figures: dict[str, Any]) -> None:
        """Keeps the state of a run that cannot go on: weights, what went wrong, and which tokens were read."""
        target = self.run.folder / "inspect" / f"step-{step.number:08d}"
        numbers = {"read": [step.start, step.tokens], "figures": figures}  # tokens of the run
        self._write(target, self._run_state(step) | numbers, then=lambda: logger.info("kept %s", target))
        self._background.wait()
        dist.barrier()  # whoever ends now ends the others

    def _write(self, target: Path, run_state: dict[str, Any], then: Callable[[], None]) -> None:
        self._background.wait()  # it reads what is to be gathered again
        began = time.perf_counter()
        self.refuse_full_disk()
        gather(self.run.zero, self._gathered)
        if not self.run.parallel.is_first:
            return
        training, initial = self._gathered, self.run.initial

        def write(aside: Path) -> None:
            huggingface.write_model(aside, initial.config, initial.tokenizer, initial.vocabulary, training.weights)
            huggingface.write_checkpoint(aside, training, run_state | {"start": self._start_hash})

        def work() -> None:
            if self.metrics.exists():
                retry(lambda: flush(self.metrics))  # no checkpoint without the figures of the steps before it
            store.publish(target, write)
            then()
            self.seconds = time.perf_counter() - began

        self._background.submit(work)

    def _published(self, target: Path) -> None:
        step = store.step_of(target)
        self.has_saved = self.has_saved or step > 0
        note(self.run.folder, saved=step)
        logger.info("saved %s", target)
        try:
            store.prune(self.checkpoints, step, self.run.config.checkpoint.keep, self._is_kept)
        except OSError as error:  # somebody reads it, on a file system that minds
            logger.warning("%s: not removed yet: %s", error.filename or self.checkpoints, error.strerror or error)

    def _is_kept(self, number: int) -> bool:
        """Whether the checkpoint of this step stays for good: the start, phase boundaries, what `keep_every` asks."""
        stands_in = self.run.initial.tokenizer.name == str(self.path(number))  # for a start model that is gone
        if not number or stands_in:
            return True
        step = self.run.plan.step(number)
        return step.ends_phase or step.passes(self.run.config.checkpoint.keep_every)

    def refuse_full_disk(self) -> None:
        """Raises DetourError unless the disk has room for one more checkpoint; the first rank looks."""
        if not self.run.parallel.is_first:
            return
        try:
            free, needed = shutil.disk_usage(self.run.folder).free, self.bytes + SPARE_BYTES
        except (FileNotFoundError, NotADirectoryError):
            raise DetourError(f"{self.run.folder}: the run's folder was removed while the run wrote it") from None
        if free < needed:
            raise DetourError(
                f"{self.run.folder}: the disk has {free / 1e9:.2f} GB left, and a checkpoint takes "
                f"{needed / 1e9:.2f} GB; make room and start again: nothing that was saved is lost"
            )

    def _run_state(self, done: Step | None) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": done.number if done else 0,
            "total_steps": self.run.plan.total_steps,
            "tokens": done.tokens if done else 0,
            "phase": done.phase.name if done else None,
            "ranks": dist.get_world_size(),
            "tensor_parallel": self.run.parallel.tensor_size,
            "dtype": str(next(self.run.zero.module.parameters()).dtype).removeprefix("torch."),
            "guard": self.guard.to_dict(),
            "trajectory": self.run.config.trajectory(),
            "corpora": self._identities(),
            "versions": meter.versions(),
        }

    def _compare(self, source: Source) -> None:
        """A start model has to be the same function here as in transformers: better told now than after the run."""
        if self.run.parallel.is_first:
            difference = huggingface.compare_with_transformers(
                source.name, huggingface.load_model(source, self.run.initial.shape)
            )
            huggingface.refuse_difference(difference, source.name)
            logger.info("%s: logits equal transformers' within %.1e", source.name, difference)

    def _identities(self) -> dict[str, str]:
        return {prefix: manifest.files["bin"]["sha256"] for prefix, manifest in self.run.data.manifests().items()}

    def _check_corpora(self, run_state: dict[str, Any], checkpoint: Path) -> None:
        """By their content, in the order in which they are read: paths may differ, see run_directory.py."""
        known = list(run_state["corpora"].values())
        for number, (prefix, sha256) in enumerate(self._identities().items()):
            if known[number : number + 1] != [sha256]:
                raise DetourError(
                    f"{prefix}: the corpus has changed since {checkpoint} was saved; bring the old one back, or start "
                    "in another folder=..."
                )


class Background:
    """A thread for writing, in the order of `submit`. What it raises is raised by the next `check` or `wait`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "writer")
        self._submitted: deque[Future] = deque()

    def submit(self, work: Callable[[], Any]) -> None:
        self._submitted.append(self._pool.submit(work))

    def check(self) -> None:
        """Does not wait."""
        while self._submitted and self._submitted[0].done():
            self._submitted.popleft().result()

    def wait(self) -> None:
        """Waits until all is done."""
        while self._submitted:
            self._submitted.popleft().result()


def refuse_another_shape(checkpoint: Path, shape: Shape) -> None:
    """Weights may fit a model that computes something else: other heads, windows, thetas. Raises DetourError."""
    there = Shape.of(Source(str(checkpoint)).config(), str(checkpoint))
    for name in (field.name for field in fields(Shape) if field.name not in ("max_positions", "initializer_range")):
        before, now = getattr(there, name), getattr(shape, name)
        if before != now:
            raise DetourError(
                f"{checkpoint}: was saved with {name} {before}, and the start model now says {now}; bring back the "
                "start model that the run began with, or choose another folder=..."
            )


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Raises DetourError for what is not the state of a run, or is of another version."""
    path = checkpoint / huggingface.RUN_STATE
    run_state = huggingface.read_run_state(checkpoint)
    if run_state.get("format") != FORMAT:
        raise DetourError(
            f"{checkpoint}: of another version of this project, which does not resume it; start in another "
            f"folder=... with model.start={checkpoint}"
        )
    wanted = {"step": int, "tokens": int, "guard": dict, "corpora": dict}
    wrong = [key for key, kind in wanted.items() if type(run_state.get(key)) is not kind]
    if wrong or not is_memory(run_state["guard"]):
        raise DetourError(
            f"{path}: {wrong[0] if wrong else 'guard'} is not what a run writes there; remove {checkpoint} to go on "
            "from the checkpoint before it"
        )
    return run_state
