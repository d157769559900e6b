"""The training loop. What a step does follows from the tokens consumed; what it did goes into one record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_detour.checkpoint.state import refuse_unequal_replicas, reset_optimizer_state
from megatron_detour.config import RunConfig
from megatron_detour.data.batches import RankBatch, rank_batch
from megatron_detour.data.order import micro_batches_of
from megatron_detour.data.phase_data import PhaseData
from megatron_detour.errors import DetourError
from megatron_detour.files import retry
from megatron_detour.model.flops import Frozen, training_flops
from megatron_detour.observe.meter import memory_bytes, utilisation
from megatron_detour.parallel.shard import spec_of
from megatron_detour.parallel.state import ParallelState
from megatron_detour.plan import Plan, Step
from megatron_detour.training.engine import set_learning_rate
from megatron_detour.training.freezing import freeze
from megatron_detour.training.guards import Guard, Verdict, not_finite
from megatron_detour.training.initial_model import InitialModel

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

REPLICA_STEPS = 100  # between checks of the parameters that every tensor rank holds whole


class Trainer:
    """Runs the plan from the tokens consumed to its end, or until it is to stop.

    `validate(model)` returns figures for a record; `save(step)` publishes a checkpoint; `inspect(step, figures)` keeps
    the state of a run that cannot go on; `record(figures)` takes a step's record; `stop()` tells whether this rank has
    been asked to end. Every rank calls all of them.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        engine: DeepSpeedEngine,
        state: ParallelState,
        device: torch.device,
        data: PhaseData,
        start: InitialModel,
        guard: Guard,
        *,
        validate: Callable[[Any], dict[str, float]] | None,
        save: Callable[[Step], None],
        inspect: Callable[[Step, dict[str, Any]], None],
        record: Callable[[dict[str, Any]], None],
        stop: Callable[[], bool],
    ) -> None:
        self.config, self.plan, self.engine, self.state, self.device = config, plan, engine, state, device
        self.data, self.start, self.guard = data, start, guard
        self.validate, self.save, self.inspect, self.record, self.stop = validate, save, inspect, record, stop

    def run(self, tokens: int) -> bool:
        """Trains from `tokens` consumed on; returns whether the end of the plan was reached.

        Otherwise it was asked to stop, and the last step is saved. Raises DetourError when too many steps in a row
        had to be skipped.
        """
        phase = None
        for step, batch, waited in self._steps(tokens):
            if step.phase is not phase:
                phase = step.phase
                self._enter(step)
            started = time.perf_counter()
            figures, stop = self.train_step(step, batch)
            seconds = time.perf_counter() - started + waited
            figures |= self._speed(figures["document_tokens"], seconds, figures.pop("flops"))
            figures |= {"data_wait_seconds": waited, "memory_bytes": memory_bytes(self.device)}
            if self.validate and (step.ends_phase or step.passes(self.config.validation.every)):
                validated = self.validate(self.engine.module)
                wrong = not_finite(validated)
                figures |= validated | dict.fromkeys(wrong)
            else:
                wrong = []
            self.record(figures)
            self._refuse_to_go_on(step, figures, wrong)
            due = self.config.checkpoint
            if stop or step.ends_phase or step.passes(due.every) or step.passes(due.keep_every):
                self.save(step)
            if stop:
                return step.tokens == self.plan.total_tokens
        return True

    def train_step(self, step: Step, batch: RankBatch) -> tuple[dict[str, Any], bool]:
        """One optimiser step: the mean loss over all labelled positions of all ranks goes down its gradient.

        Returns what it did, and whether a rank has been asked to stop.
        """
        tokens, labelled, padding, crc, flops = self._sum_over_ranks(batch, Frozen.of(step.phase.settings.freeze))
        # ZeRO averages over the ranks, which is undone, so that the update does not depend on how the labelled
        # positions fall on them.
        scale = self.state.data_size / max(labelled, 1)
        set_learning_rate(self.engine, step.learning_rate)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro_batch in batch.micro_batches:
            self.engine.set_gradient_accumulation_boundary(micro_batch is batch.micro_batches[-1])
            out = self.engine(*micro_batch.to(self.device).arguments)
            self.engine.backward(out.loss * scale)
            loss_sum += out.cross_entropy.double()
        loss_sum, stop = self._agree(loss_sum)
        loss = loss_sum / max(labelled, 1)
        norm, verdict = self._update(loss)
        figures = {
            "step": step.number,
            "tokens": step.tokens,
            "phase": step.phase.name,
            "objective": step.objective.name,
            "loss": loss if math.isfinite(loss) else None,
            "lr": step.learning_rate,
            "grad_norm": norm if math.isfinite(norm) else None,
            "sequences": step.sequences,
            "labelled_tokens": labelled,
            "document_tokens": tokens,
            "padding_share": padding / (tokens + padding),
            "data_crc": crc,
            "flops": flops,
            **step.objective.figures(),
        }
        if verdict.fault:
            figures["skipped" if verdict.skip else "spike"] = verdict.fault
        return figures, stop

    def _update(self, loss: float) -> tuple[float, Verdict]:
        """Lets the optimiser step if the guard permits it; returns the norm of the gradient and the verdict."""
        zero = self.engine.optimizer
        verdicts: list[Verdict] = []

        def permit() -> bool:
            if not verdicts:  # asked once for each group of parameters
                verdicts.append(self.guard.judge(loss, float(zero._global_grad_norm)))
            return not verdicts[0].skip

        zero.optimizer.permit = permit
        self.engine.step()
        norm = float(self.engine.get_global_grad_norm())
        # Of a gradient that is NaN ZeRO itself leaves the step out.
        verdict = verdicts[0] if verdicts else self.guard.judge(loss, norm)
        self.guard.remember(loss, norm, verdict)
        return norm, verdict

    def _enter(self, step: Step) -> None:
        """What changes with the phase: a run that is resumed inside it enters it again."""
        freeze(self.engine, step.phase)
        if step.begins_phase:
            self.guard.begin_phase()
            if step.phase.settings.optimizer_state == "reset":
                reset_optimizer_state(self.engine)

    def _refuse_to_go_on(self, step: Step, figures: dict[str, Any], wrong: list[str]) -> None:
        """`wrong` are validation's figures that are NaN or infinite: such weights do not replace good checkpoints."""
        if wrong:
            self.inspect(step, figures)
            raise DetourError(
                f"validation after step {step.number} of phase {step.phase.name}: {wrong[0]} is NaN or infinite; "
                "nothing was saved since the last checkpoint: look at the folder inspect/ and the metrics, lower the "
                "learning rate and start in another folder=..."
            )
        if self.guard.out_of_patience:
            self.inspect(step, figures)
            raise DetourError(
                f"{self.guard.skipped_in_row} steps in a row were skipped, the last one, step {step.number} of phase "
                f"{step.phase.name}, because {figures['skipped']}; nothing was saved since the last checkpoint: look "
                "at the folder inspect/ and the metrics, lower the learning rate and start in another folder=..."
            )
        if step.number % REPLICA_STEPS == 0:
            whole = {name: p for name, p in self.engine.module.named_parameters() if spec_of(p) is None}
            refuse_unequal_replicas(whole, self.state)

    def _steps(self, tokens: int) -> Iterator[tuple[Step, RankBatch, float]]:
        """Steps with their batches, each made while the one before trains, and the seconds that it was waited for."""
        with ThreadPoolExecutor(1, "batches") as pool:
            coming = pool.submit(self._load, self.plan.at(tokens)) if tokens < self.plan.total_tokens else None
            while coming is not None:
                started = time.perf_counter()
                step, batch = coming.result()
                waited = time.perf_counter() - started
                more = step.tokens < self.plan.total_tokens
                coming = pool.submit(self._load, self.plan.at(step.tokens)) if more else None
                yield step, batch, waited

    def _load(self, step: Step) -> tuple[Step, RankBatch]:
        phase = step.phase
        objective = step.objective.bind(self.start.vocabulary, self.start.words)
        mixture, state = self.data.of(phase), self.state
        micro_tokens = phase.micro_sequences * phase.sequence_length
        mine, of = micro_batches_of(step.tokens - step.start, micro_tokens, state.data_rank, state.data_size)

        def read() -> RankBatch:
            documents = mixture.documents(step.start, step.tokens)
            return rank_batch(mixture, documents, mine, of, objective, self.config.seed, state.sequence_multiple)

        return step, retry(read)

    def _sum_over_ranks(self, batch: RankBatch, frozen: Frozen) -> list[int]:
        """Tokens, labelled positions, padding, checksum and floating-point operations of all data-parallel ranks."""
        flops = sum(
            training_flops(self.start.shape, micro.lengths, micro.causal, len(micro.labels), frozen)
            for micro in batch.micro_batches
        )
        mine = [batch.tokens, batch.labelled, batch.padding, batch.crc, flops]
        totals = torch.tensor(mine, dtype=torch.int64, device=self.device)
        dist.all_reduce(totals, group=self.state.data_group)
        return totals.tolist()

    def _agree(self, loss_sum: torch.Tensor) -> tuple[float, bool]:
        """The sum of the losses, the same bits on every rank, and whether any rank is to stop."""
        mine = loss_sum if self.state.tensor_rank == 0 else torch.zeros_like(loss_sum)
        totals = torch.stack([mine, mine.new_tensor(float(self.stop()))])
        dist.all_reduce(totals)
        loss, stop = totals.tolist()
        return loss, stop > 0

    def _speed(self, tokens: int, seconds: float, flops: int) -> dict[str, float]:
        speed = {
            "tokens_per_second": tokens / seconds,
            "seconds": seconds,
            "model_tflops": flops / seconds / 1e12,
        }
        share = utilisation(flops / seconds, self.device, next(self.engine.module.parameters()).dtype)
        return speed if share is None else speed | {"mfu": share}
