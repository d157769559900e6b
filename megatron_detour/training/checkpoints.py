"""Save, restore and prune the checkpoints of a run."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_detour.checkpoint import huggingface, store
from megatron_detour.checkpoint.huggingface import NEW_HEAD, Source
from megatron_detour.checkpoint.state import TrainingState, gather, scatter
from megatron_detour.errors import DetourError
from megatron_detour.files import flush, retry
from megatron_detour.model.families import Family, read_shape
from megatron_detour.observe import meter
from megatron_detour.plan import Step
from megatron_detour.run_directory import CHECKPOINTS, METRICS, newest_checkpoint, note, refuse_full_disk, start_hash
from megatron_detour.training.guards import Guard, is_guard_state
from megatron_detour.training.run import Run

logger = logging.getLogger(__name__)

RUN_STATE_FORMAT = 3  # covers run_state.json, optimizer.safetensors, and the order of documents and masks


class Checkpoints:
    """Every rank calls `restore`, `save` and `inspect`; the first rank writes, in the background."""

    def __init__(self, run: Run, guard: Guard) -> None:
        self.run, self.guard = run, guard
        self.checkpoints, self.metrics = run.folder / CHECKPOINTS, run.folder / METRICS
        self._background = Background()
        self.check, self.wait = self._background.check, self._background.wait
        self.has_saved = False  # whether this session has saved a step
        self._start_hash: str | None = None
        self._new_head = False  # the start model had none
        self.seconds = 0.0  # the last save took, gathering and writing
        self._gathered = TrainingState()

    def path(self, step: int) -> Path:
        return store.checkpoint_folder(self.checkpoints, step)

    def restore(self) -> int:
        """Load weights and optimizer from the newest checkpoint or the start model; return the tokens consumed."""
        newest = [None]
        if self.run.parallel.is_first:
            store.remove_leftovers(self.checkpoints)
            newest = [newest_checkpoint(self.run.folder, self.run.config)]
        dist.broadcast_object_list(newest, src=0)
        if newest[0] is not None:
            return self._resume(newest[0])
        self._load_start()
        return 0

    def _load_start(self) -> None:
        zero, source = self.run.zero, self.run.initial.weights
        if source is None:
            scatter(zero, lambda name: zero.module.initial_weight(name, self.run.config.seed))
            return
        stored, seed = read_shape(source.config(), source.name), self.run.config.seed  # before the run file's changes
        started = self.run.initial.changed
        with huggingface.Weights(source, type(stored)) as weights:
            missing = weights.check(stored, from_start=True)
            self._compare(source, stored, headless=bool(missing))
            scatter(
                zero,
                lambda name: (
                    zero.module.initial_weight(name, seed) if name in missing else started(name, weights(name))
                ),
            )
        self._new_head = bool(missing)

    def _resume(self, checkpoint: Path) -> int:
        zero, initial, named = self.run.zero, self.run.initial, self.run.config.model
        with ExitStack() as stack:
            weights = stack.enter_context(huggingface.Weights(Source(str(checkpoint))))
            weights.check(initial.shape)
            run_state = _read_state(checkpoint)
            if run_state["tokens"] < self.run.plan.total_tokens:
                self._check_inputs(run_state, checkpoint)
                refuse_another_shape(checkpoint, initial.shape)
            scatter(zero, weights, *huggingface.open_optimizer(checkpoint, zero.states, stack))
        self.guard.restore(run_state["guard"])
        self._start_hash, self._new_head = run_state.get("start"), run_state.get(NEW_HEAD, False)
        if initial.tokenizer.name not in (named.tokenizer, named.start):
            missing, stand_in = named.start or named.tokenizer, initial.tokenizer.name
            logger.info("%s no longer exists; using %s instead", missing, stand_in)
        logger.info("resuming from %s at %s tokens", checkpoint, f"{run_state['tokens']:,}")
        return run_state["tokens"]

    def prepare(self) -> None:
        """Allocate the buffers for saving during the first steps, so that the first save does not wait for them."""
        if self.run.parallel.is_first:
            zero = self.run.zero
            sizes, pinned = self.run.initial.shape.sizes, next(zero.module.parameters()).is_cuda
            self._background.submit(lambda: self._gathered.reserve(sizes, zero.states, pinned))
            self._background.submit(self._hash_start)

    def _hash_start(self) -> None:
        self._start_hash = self._start_hash or start_hash(self.run.config.model.start)

    def save(self, done: Step | None) -> None:
        """Save a checkpoint after step `done`, or of the initial weights (None), while training continues.

        Raise DetourError when the disk is full, or the error of the previous save.
        """
        target = self.path(done.number if done else 0)
        self._write(target, self._run_state(done), then=lambda: self._published(target))

    def inspect(self, step: Step, figures: dict[str, Any]) -> None:
        """Save the state of a run that must stop: weights, metrics of the failed step, and which tokens it read."""
        target = self.run.folder / "inspect" / f"step-{step.number:08d}"
        numbers = {"read": [step.start, step.tokens], "figures": figures}  # tokens of the run
        self._write(target, self._run_state(step) | numbers, then=lambda: logger.info("kept %s", target))
        self._background.wait()
        dist.barrier()  # the first rank to exit ends the others

    def _write(self, target: Path, run_state: dict[str, Any], then: Callable[[], None]) -> None:
        self._background.wait()  # the previous save still reads the buffers
        began = time.perf_counter()
        self.refuse_full_disk()
        gather(self.run.zero, self._gathered)
        if not self.run.parallel.is_first:
            return
        training, initial = self._gathered, self.run.initial

        def write(aside: Path) -> None:
            vocabulary = initial.checked.vocabulary
            huggingface.write_model(aside, initial.config, initial.tokenizer, vocabulary, training.weights)
            huggingface.write_checkpoint(aside, training, run_state | {"start": self._start_hash})

        def work() -> None:
            if self.metrics.exists():
                retry(lambda: flush(self.metrics))  # a checkpoint's metrics must reach the disk before it does
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
        except OSError as error:  # some file systems refuse to remove an open file
            logger.warning("%s: not removed yet: %s", error.filename or self.checkpoints, error.strerror or error)

    def _is_kept(self, number: int) -> bool:
        """Return whether a step's checkpoint is permanent: step 0, phase boundaries and multiples of `keep_every`."""
        stands_in = self.run.initial.tokenizer.name == str(self.path(number))  # for a missing start model
        if not number or stands_in:
            return True
        step = self.run.plan.step(number)
        return step.ends_phase or step.passes(self.run.config.checkpoint.keep_every)

    def refuse_full_disk(self) -> None:
        """Raise DetourError unless the disk has room for one more checkpoint. Only the first rank checks."""
        if not self.run.parallel.is_first:
            return
        if not self.run.folder.is_dir():
            raise DetourError(f"{self.run.folder}: the run directory was removed during the run")
        size = self.run.config.optimizer.bytes_per_parameter * self.run.initial.shape.parameters
        refuse_full_disk(self.run.folder, self.run.plan, size)

    def _run_state(self, done: Step | None) -> dict[str, Any]:
        return {
            "format": RUN_STATE_FORMAT,
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
            "entities": self.run.initial.entities,
            "versions": meter.versions(),
            NEW_HEAD: self._new_head,
        }

    def _compare(self, source: Source, shape: Family, headless: bool) -> None:
        """Raise DetourError unless the start model's logits, or its hidden states, match transformers'."""
        if not self.run.parallel.is_first:
            return
        model = huggingface.load_model(source, shape, from_start=True)
        difference = huggingface.compare_with_transformers(
            source.name, model, causal=source.is_decoder, headless=headless, as_read=True
        )
        huggingface.refuse_difference(difference, source.name)
        what = "hidden states" if headless else "logits"
        logger.info("%s: %s match transformers' within %.1e", source.name, what, difference)
        if headless:
            logger.info("%s: the model has no head for masked language modeling: a new one is trained", source.name)

    def _identities(self) -> dict[str, str]:
        return {prefix: manifest.files["bin"]["sha256"] for prefix, manifest in self.run.data.manifests().items()}

    def _check_inputs(self, run_state: dict[str, Any], checkpoint: Path) -> None:
        """Compare corpora and files of words by content and order: paths may differ, see run_directory.py.

        Raise DetourError.
        """
        for kind, what, here in (
            ("corpora", "corpus", self._identities()),
            ("entities", "file", self.run.initial.entities),
        ):
            saved = list(run_state[kind].values())
            for number, (path, sha256) in enumerate(here.items()):
                if saved[number : number + 1] != [sha256]:
                    raise DetourError(
                        f"{path}: the {what} has changed since {checkpoint} was saved; restore it or start in another "
                        "folder=..."
                    )


class Background:
    """A writer thread that runs work in order. Its errors are raised by the next `check` or `wait`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "writer")
        self._submitted: deque[Future] = deque()

    def submit(self, work: Callable[[], Any]) -> None:
        self._submitted.append(self._pool.submit(work))

    def check(self) -> None:
        """Raise the error of finished work, without waiting."""
        while self._submitted and self._submitted[0].done():
            self._submitted.popleft().result()

    def wait(self) -> None:
        """Wait for all submitted work."""
        while self._submitted:
            self._submitted.popleft().result()


def refuse_another_shape(checkpoint: Path, shape: Family) -> None:
    """Raise DetourError if the start model changed its heads, windows or thetas, which the weights would still fit."""
    saved = read_shape(Source(str(checkpoint)).config(), str(checkpoint))
    compared = [field.name for field in fields(shape) if field.name not in ("max_positions", "initializer_range")]
    for name in ("model_type", *compared):
        before, now = getattr(saved, name), getattr(shape, name)
        if before != now:
            raise DetourError(
                f"{checkpoint}: saved with {name} {before}, but the start model now has {now}; restore the original "
                "start model, or start in another folder=..."
            )


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """Read run_state.json. Raise DetourError if it is invalid or has another format version."""
    path = checkpoint / huggingface.RUN_STATE
    run_state = huggingface.read_run_state(checkpoint)
    if run_state.get("format") != RUN_STATE_FORMAT:
        raise DetourError(
            f"{checkpoint}: saved by another version of this project and cannot be resumed; start in another "
            f"folder=... with model.start={checkpoint}"
        )
    run_state.setdefault("entities", {})  # which earlier versions did not have
    types = {"step": int, "tokens": int, "guard": dict, "corpora": dict, "entities": dict}
    wrong = [key for key, kind in types.items() if type(run_state.get(key)) is not kind]
    if wrong or not is_guard_state(run_state["guard"]):
        raise DetourError(
            f"{path}: invalid value of {wrong[0] if wrong else 'guard'}; remove {checkpoint} to resume from the "
            "previous checkpoint"
        )
    return run_state
