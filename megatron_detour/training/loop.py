"""The training loop. What a step does follows from the tokens consumed; what it did goes into one record."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_detour.checkpoint.state import refuse_unequal_replicas
from megatron_detour.config import RunConfig
from megatron_detour.data.batches import RankBatch, Sequences, rank_batch, rank_numbers
from megatron_detour.data.vocabulary import Vocabulary
from megatron_detour.data.words import Words
from megatron_detour.errors import DetourError
from megatron_detour.objectives import make
from megatron_detour.observe.meter import memory_bytes
from megatron_detour.parallel.shard import spec_of
from megatron_detour.parallel.state import ParallelState
from megatron_detour.plan import Plan, Step
from megatron_detour.training.engine import set_learning_rate

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

REPLICA_STEPS = 100  # between checks of the parameters that every tensor rank holds whole


class Trainer:
    """Runs the plan from the tokens consumed to its end.

    `validate(model)` returns figures for a record; `save(step)` publishes a checkpoint; `record(figures)` takes a
    step's record. Every rank calls all of them.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        engine: DeepSpeedEngine,
        state: ParallelState,
        device: torch.device,
        sequences: Sequences,
        vocabulary: Vocabulary,
        words: Words | None,
        *,
        validate: Callable[[Any], dict[str, float]] | None,
        save: Callable[[Step], None],
        record: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config, self.plan, self.engine, self.state, self.device = config, plan, engine, state, device
        self.sequences, self.vocabulary, self.words = sequences, vocabulary, words
        self.validate, self.save, self.record = validate, save, record

    def run(self, tokens: int) -> None:
        """Trains from `tokens` consumed to the end of the plan. Raises DetourError when the loss is no number."""
        for step, batch, waited in self._steps(tokens):
            started = time.perf_counter()
            figures = self.train_step(step, batch)
            seconds = time.perf_counter() - started + waited
            figures |= {
                "tokens_per_second": self.plan.tokens_per_step / seconds,
                "seconds": seconds,
                "data_wait_seconds": waited,
                "memory_bytes": memory_bytes(self.device),
            }
            if self.validate and (step.ends_phase or _passes(self.config.validation.every, step, self.plan)):
                figures |= self.validate(self.engine.module)
            self.record(figures)
            if step.number % REPLICA_STEPS == 0:
                whole = {name: p for name, p in self.engine.module.named_parameters() if spec_of(p) is None}
                refuse_unequal_replicas(whole, self.state)
            if step.ends_phase or _passes(self.config.checkpoint.every, step, self.plan):
                self.save(step)

    def train_step(self, step: Step, batch: RankBatch) -> dict[str, Any]:
        """One optimiser step: the mean loss over all labelled positions of all ranks goes down its gradient."""
        labelled, padding, crc = self._sum_over_ranks(batch.labelled, batch.padding, batch.crc)
        # DeepSpeed divides by the microbatches and averages over the ranks; both are undone, so that the update does
        # not depend on how the labelled positions fall on them.
        scale = self.state.data_size * len(batch.micro_batches) / max(labelled, 1)
        set_learning_rate(self.engine, step.learning_rate)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for number, micro_batch in enumerate(batch.micro_batches, start=1):
            out = self.engine(*micro_batch.to(self.device).arguments)
            self.engine.backward(out.loss * scale)
            loss_sum += out.cross_entropy.double()
            if number == len(batch.micro_batches):
                dist.all_reduce(loss_sum, group=self.state.data_group)
                loss = self._finite("loss", float(loss_sum) / max(labelled, 1), step)
            self.engine.step()
        norm = self._finite("gradient norm", float(self.engine.get_global_grad_norm()), step)
        return {
            "step": step.number,
            "tokens": step.tokens,
            "phase": step.phase.name,
            "objective": step.phase.objective,
            "loss": loss,
            "lr": step.learning_rate,
            "grad_norm": norm,
            "labelled_tokens": labelled,
            "padding_share": padding / self.plan.tokens_per_step,
            "data_crc": crc,
        }

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
        words = self.words if phase.whole_word_masking else None
        objective = make(phase.objective, phase.mask_rate, self.vocabulary, words)
        numbers = rank_numbers(step.first_sequence, step.sequences, self.state.data_rank, self.state.data_size)
        micro = self.config.batch.micro_sequences
        return step, rank_batch(self.sequences, numbers, micro, objective, self.config.seed)

    def _sum_over_ranks(self, *counts: int) -> list[int]:
        totals = torch.tensor(counts, dtype=torch.int64, device=self.device)
        dist.all_reduce(totals, group=self.state.data_group)
        return totals.tolist()

    def _finite(self, what: str, value: float, step: Step) -> float:
        if not math.isfinite(value) or value < 0:  # DeepSpeed tells an invalid norm by -1
            raise DetourError(
                f"the {what} is {value} at step {step.number} (phase {step.phase.name}); nothing was saved since the "
                "last checkpoint: lower the learning rate and start in another folder, or look at this step's data"
            )
        return value


def _passes(every: int | None, step: Step, plan: Plan) -> bool:
    """Whether a step carries the run over a multiple of `every` tokens."""
    return every is not None and step.tokens // every > (step.tokens - plan.tokens_per_step) // every
