"""The training loop. Each step is a function of the tokens consumed, and writes one metrics record.

`run_training` sets up a `Run`; `Trainer.train` trains from the newest checkpoint to the end of the plan.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_detour import log
from megatron_detour.checkpoint.state import refuse_unequal_replicas, reset_optimizer_state
from megatron_detour.config import RunConfig
from megatron_detour.data.batches import RankBatch, rank_batch
from megatron_detour.data.order import rank_micro_batches
from megatron_detour.data.phase_data import PhaseData
from megatron_detour.errors import EXIT_INTERRUPTED, DetourError
from megatron_detour.files import retry
from megatron_detour.model.flops import Frozen, training_flops
from megatron_detour.observe.meter import memory_bytes, utilization
from megatron_detour.parallel.shard import spec_of
from megatron_detour.plan import Plan, Step
from megatron_detour.preflight import preflight
from megatron_detour.runtime.failure_detector import FailureDetector
from megatron_detour.runtime.preemption import Preemption
from megatron_detour.training.checkpoints import Checkpoints
from megatron_detour.training.engine import create_engine, start_distributed
from megatron_detour.training.freezing import freeze
from megatron_detour.training.guards import Guard, not_finite
from megatron_detour.training.initial_model import InitialModel
from megatron_detour.training.micro_batches import choose_sizes
from megatron_detour.training.profiler import Profiler
from megatron_detour.training.recorder import REPORT_SECONDS, Recorder
from megatron_detour.training.run import Run
from megatron_detour.training.validation import Validation

REPLICA_CHECK_STEPS = 100  # between checks that replicated parameters are equal on all tensor-parallel ranks
GC_STEPS = 100  # between garbage collections


def run_training(config: RunConfig, plan: Plan, folder: Path, preemption: Preemption) -> int:
    """Train from the newest intact checkpoint of `folder`, or from the start model, to the end of the plan.

    Return the exit status: 0 at the end of the plan, EXIT_INTERRUPTED when preempted. Raise DetourError.
    """
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if config.parallel.tensor > 1:
        # With one queue, a collective starts before the matrix product that it overlaps with. CUDA reads it once.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    checked = preflight(config, plan, ranks, owns_folder=rank == 0, gpu=torch.cuda.is_available())
    initial = InitialModel.from_preflight(checked)
    data = PhaseData(plan, config.data.order_seed, checked.vocabulary)
    parallel, device = start_distributed(config)
    if parallel.is_first:
        log.to_terminal()
    with FailureDetector(is_stopping=lambda: preemption.reason() is not None) as detector:
        plan, sizes, choice = choose_sizes(config, plan, folder, initial, parallel, device)
        model = initial.shape.build(parallel, choice.compute, config.z_loss)
        zero = create_engine(model, config, checked.deepspeed, parallel)
        trainer = Trainer(Run(config, plan, folder, initial, data, parallel, device, sizes, choice, zero, preemption))
        detector.has_saved, detector.on_failure = lambda: trainer.checkpoints.has_saved, trainer.recorder.note_end
        with trainer.recorder.own_folder():
            finished = trainer.train()
        dist.barrier()
    dist.destroy_process_group()
    return 0 if finished else EXIT_INTERRUPTED


class Trainer:
    """Trains one session of a run. All ranks call the same methods at the same step."""

    def __init__(self, run: Run) -> None:
        self.run, self.zero, self.guard = run, run.zero, Guard(run.config.guards)
        self.checkpoints = Checkpoints(run, self.guard)
        self.recorder = Recorder(run, self.checkpoints)
        self.validation = Validation.from_run(run) if run.config.validation.corpora else None
        self._slowest_step = 0.0  # seconds between two records

    def train(self) -> bool:
        """Return True at the end of the plan, False if the run was preempted and saved a checkpoint."""
        tokens = self.checkpoints.restore()
        finished = True
        if tokens < self.run.plan.total_tokens:
            self.checkpoints.refuse_full_disk()
            with self.recorder.open(tokens, self.validation):
                if tokens == 0:
                    self._step_zero()
                self.checkpoints.prepare()
                with manual_garbage_collection():
                    finished = self._train_from(tokens)
                self.checkpoints.wait()
        self.recorder.finish(finished)
        return finished

    def _step_zero(self) -> None:
        """Validate before training, and save a checkpoint of freshly initialized weights."""
        if self.validation:
            figures = self.validation(self.zero.module)
            wrong = not_finite(figures)
            self.recorder.record({"step": 0, "tokens": 0} | figures | dict.fromkeys(wrong))
            if wrong:
                raise DetourError(f"model.start: {wrong[0]} is NaN or infinite before training; choose another model")
        if self.run.initial.weights is None:
            self.checkpoints.save(None)

    def _train_from(self, tokens: int) -> bool:
        """Run the loop; return as `train` does. Raise DetourError after too many skipped steps in a row."""
        plan, settings = self.run.plan, self.run.config.checkpoint
        phase, profiler, recorded_at = None, Profiler(self.run), time.monotonic()
        for step, batch, waited in self._steps(tokens):
            if step.phase is not phase:
                phase = step.phase
                self._enter(step)
            profiler.before(step)
            started = time.perf_counter()
            figures, stop = self.train_step(step, batch)
            seconds = time.perf_counter() - started + waited
            figures |= self._speed(figures["document_tokens"], seconds, figures.pop("flops"))
            figures |= {"data_wait_seconds": waited, "memory_bytes": memory_bytes(self.run.device)}
            wrong: list[str] = []
            validates = self.validation and (step.ends_phase or step.passes(self.run.config.validation.every))
            if validates:
                validated = self.validation(self.zero.module)
                wrong = not_finite(validated)
                figures |= validated | dict.fromkeys(wrong)
            self.checkpoints.check()
            self.recorder.record(figures)
            now = time.monotonic()
            self._reserve_time(now - recorded_at)
            recorded_at = now
            profiler.after(step, is_last=stop or step.tokens == plan.total_tokens)
            self._check_health(step, figures, wrong)
            saves = stop or step.ends_phase or step.passes(settings.every) or step.passes(settings.keep_every)
            if saves:
                self.checkpoints.save(step)
                if step.ends_phase and step.number < plan.total_steps:
                    self.recorder.write_report()
            if saves or validates or step.number % GC_STEPS == 0:
                gc.collect()
            if stop:
                return step.tokens == plan.total_tokens
        return True

    def train_step(self, step: Step, batch: RankBatch) -> tuple[dict[str, Any], bool]:
        """Take one optimizer step on the mean loss over the labeled positions of all ranks.

        Return the step's metrics, and whether any rank was asked to stop.
        """
        counts = self._sum_over_ranks(batch, Frozen.from_parts(step.phase.settings.freeze))
        scale = 1 / counts[1].clamp(min=1).double()
        self.zero.set_learning_rate(step.learning_rate)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.run.device)
        for micro_batch in batch.micro_batches:
            arguments = micro_batch.to(self.run.device).arguments
            out = self.zero.accumulate(arguments, scale)
            loss_sum += out.cross_entropy.double()
        gradient_norm = self.zero.sum_gradients()
        (tokens, labeled, padding, crc, flops), loss_sum, norm, stop = self._read(counts, loss_sum, gradient_norm)
        loss = loss_sum / max(labeled, 1)
        judgment = self.guard.judge(loss, norm)
        self.zero.step(gradient_norm, skip=judgment.skip)
        self.guard.remember(loss, norm, judgment)
        figures = {
            "step": step.number,
            "tokens": step.tokens,
            "phase": step.phase.name,
            "objective": step.objective.name,
            "loss": loss if math.isfinite(loss) else None,
            "lr": step.learning_rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "sequences": step.sequences,
            "labelled_tokens": labeled,
            "document_tokens": tokens,
            "padding_share": padding / (tokens + padding),
            "data_crc": crc,
            "flops": flops,
            **step.objective.figures(),
        }
        if judgment.fault:
            figures["skipped" if judgment.skip else "spike"] = judgment.fault
        return figures, stop

    def _sum_over_ranks(self, batch: RankBatch, frozen: Frozen) -> torch.Tensor:
        """Return tokens, labeled positions, padding, checksum and FLOPs of all data-parallel ranks, int64 [5]."""
        flops = sum(
            training_flops(self.run.initial.shape, micro.lengths, micro.causal, len(micro.labels), frozen)
            for micro in batch.micro_batches
        )
        counts = torch.tensor([batch.tokens, batch.labeled, batch.padding, batch.crc, flops])
        if self.run.device.type == "cuda":  # only copies from pinned memory are asynchronous
            counts = counts.pin_memory().to(self.run.device, non_blocking=True)
        dist.all_reduce(counts, group=self.run.parallel.data_group)
        return counts

    def _read(
        self, counts: torch.Tensor, loss_sum: torch.Tensor, norm: torch.Tensor
    ) -> tuple[list[int], float, float, bool]:
        """Return counts, loss sum and gradient norm, bit-identical on all ranks, and whether any rank must stop.

        This is a step's only host synchronization: the guard needs loss and norm before the optimizer steps.
        """
        local_loss = loss_sum if self.run.parallel.tensor_rank == 0 else torch.zeros_like(loss_sum)
        must_stop = torch.full_like(local_loss, float(self.run.preemption.reason() is not None))
        sums = torch.stack([local_loss, must_stop])
        dist.all_reduce(sums)
        figures = torch.cat([sums, norm.double().view(1)])
        host = torch.cat([counts, figures.view(torch.int64)]).cpu().numpy()
        loss, stop, norm_value = host[len(counts) :].view(np.float64).tolist()
        return host[: len(counts)].tolist(), loss, norm_value, stop > 0

    def _enter(self, step: Step) -> None:
        """Apply the settings of the step's phase. A run resumed inside a phase enters it again."""
        freeze(self.zero, step.phase)
        if step.begins_phase:
            self.guard.begin_phase()
            if step.phase.settings.optimizer_state == "reset":
                reset_optimizer_state(self.zero)

    def _check_health(self, step: Step, figures: dict[str, Any], wrong: list[str]) -> None:
        """Raise DetourError before bad weights replace good checkpoints.

        wrong: names of validation metrics that are NaN or infinite.
        """
        if wrong:
            self.checkpoints.inspect(step, figures)
            raise DetourError(
                f"validation after step {step.number} of phase {step.phase.name}: {wrong[0]} is NaN or infinite; "
                "nothing was saved since the last checkpoint: check inspect/ and the metrics, lower the learning rate "
                "and start in another folder=..."
            )
        if self.guard.out_of_patience:
            self.checkpoints.inspect(step, figures)
            raise DetourError(
                f"{self.guard.skipped_in_row} steps in a row were skipped, the last one, step {step.number} of phase "
                f"{step.phase.name}, because {figures['skipped']}; nothing was saved since the last checkpoint: check "
                "inspect/ and the metrics, lower the learning rate and start in another folder=..."
            )
        if step.number % REPLICA_CHECK_STEPS == 0:
            whole = {name: p for name, p in self.zero.module.named_parameters() if spec_of(p) is None}
            refuse_unequal_replicas(whole, self.run.parallel)

    def _reserve_time(self, seconds: float) -> None:
        """Reserve time before the time limit for the slowest step so far, validation included, and for a save."""
        self._slowest_step = max(self._slowest_step, seconds)
        self.run.preemption.reserve_seconds(1.5 * (self._slowest_step + self.checkpoints.seconds) + REPORT_SECONDS)

    def _steps(self, tokens: int) -> Iterator[tuple[Step, RankBatch, float]]:
        """Yield steps with their batches, each prefetched during the previous step, and the seconds spent waiting."""
        plan = self.run.plan
        with ThreadPoolExecutor(1, "batches") as pool:
            upcoming = pool.submit(self._load, plan.at(tokens)) if tokens < plan.total_tokens else None
            while upcoming is not None:
                started = time.perf_counter()
                step, batch = upcoming.result()
                waited = time.perf_counter() - started
                more = step.tokens < plan.total_tokens
                upcoming = pool.submit(self._load, plan.at(step.tokens)) if more else None
                yield step, batch, waited

    def _load(self, step: Step) -> tuple[Step, RankBatch]:
        phase, run, parallel = step.phase, self.run, self.run.parallel
        objective = step.objective.bind(run.initial.checked.vocabulary, run.initial.checked.words)
        mixture = run.data.mixture(phase)
        micro_tokens = phase.micro_sequences * phase.sequence_length
        numbers, total = rank_micro_batches(
            step.tokens - step.start, micro_tokens, parallel.data_rank, parallel.data_size
        )

        def read() -> RankBatch:
            documents = mixture.documents(step.start, step.tokens)
            batch = rank_batch(
                mixture, documents, numbers, total, objective, run.config.seed, parallel.sequence_multiple
            )
            if run.device.type == "cpu":
                return batch
            return replace(batch, micro_batches=[micro_batch.pin() for micro_batch in batch.micro_batches])

        return step, retry(read)

    def _speed(self, tokens: int, seconds: float, flops: int) -> dict[str, float]:
        speed = {
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "model_tflops": flops / seconds / 1e12,
        }
        mfu = utilization(flops / seconds, self.run.device, next(self.zero.module.parameters()).dtype)
        return speed if mfu is None else speed | {"mfu": mfu}


@contextmanager
def manual_garbage_collection() -> Iterator[None]:
    """Disable automatic garbage collection, which would stall one rank at a time, and all others with it."""
    gc.collect()
    gc.freeze()  # objects that exist now live as long as the run
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
