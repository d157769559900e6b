"""One session of a run, from the corpora to the report: a run is one session, or several when it was interrupted."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_detour.checkpoint import huggingface, store
from megatron_detour.checkpoint.huggingface import Source
from megatron_detour.checkpoint.state import gather, scatter
from megatron_detour.config import Corpus, RunConfig
from megatron_detour.data.batches import Sequences
from megatron_detour.data.vocabulary import Vocabulary, load_tokenizer
from megatron_detour.errors import DetourError
from megatron_detour.model.modernbert import ModernBert
from megatron_detour.model.shape import Shape
from megatron_detour.observe import meter
from megatron_detour.observe.progress import Progress
from megatron_detour.observe.report import write_report
from megatron_detour.observe.sinks import MetricsFile, Sink, TensorBoardSink
from megatron_detour.parallel.state import ParallelState
from megatron_detour.plan import Plan, Step
from megatron_detour.training.engine import create_engine, read_deepspeed_config, start_distributed
from megatron_detour.training.folder import add_session, take
from megatron_detour.training.loop import Trainer
from megatron_detour.training.validation import Validation

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Encoder:
    """What a run trains: the configuration and where weights and tokenizer come from."""

    config: dict[str, Any]
    shape: Shape
    weights: Source | None  # None: initialised from the seed
    tokenizer: Source
    vocabulary: Vocabulary

    @classmethod
    def of(cls, config: RunConfig) -> Encoder:
        """Raises DetourError for a model that is no ModernBERT or a tokenizer that does not fit it."""
        model = config.model
        tokenizer = Source(model.tokenizer or model.start, model.download)
        weights = Source(model.start, model.download) if model.start else None
        described = weights.config() if weights else None
        if described is not None:
            Shape.of(described, model.start)  # before the tokenizer: the model's own fault is the one to tell
        vocabulary = Vocabulary.of(load_tokenizer(tokenizer.name, tokenizer.download))
        if vocabulary.mask is None or vocabulary.pad is None:
            raise DetourError(f"{tokenizer.name}: the tokenizer has no [MASK] or no [PAD]; masked training needs both")
        described = described or huggingface.fresh_config(model.config, vocabulary)
        shape = Shape.of(described, model.start or "model.config")
        if vocabulary.size > shape.vocabulary:
            raise DetourError(
                f"{tokenizer.name}: the tokenizer has {vocabulary.size:,} ids, the model's embedding only "
                f"{shape.vocabulary:,}; they do not belong together"
            )
        if config.data.sequence_length > shape.max_positions:
            raise DetourError(
                f"data.sequence_length: {config.data.sequence_length:,} is more than the model's "
                f"{shape.max_positions:,} positions"
            )
        shape.check_tensor_parallel(config.parallel.tensor)
        return cls(described, shape, weights, tokenizer, vocabulary)


def run_session(config: RunConfig, plan: Plan, folder: Path) -> None:
    """Trains from the newest whole checkpoint of `folder`, or from the start, to the end of the plan."""
    deepspeed_config = read_deepspeed_config(config.deepspeed)
    encoder = Encoder.of(config)
    sequences = Sequences(config.data.corpora, config.data.sequence_length, config.data.order_seed, encoder.vocabulary)
    state, device = start_distributed(config)
    try:
        session = Session(config, plan, folder, encoder, sequences, state, device)
        session.train(create_engine(ModernBert(encoder.shape, state), config, deepspeed_config, state))
    finally:
        dist.destroy_process_group()


class Session:
    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        folder: Path,
        encoder: Encoder,
        sequences: Sequences,
        state: ParallelState,
        device: torch.device,
    ) -> None:
        self.config, self.plan, self.folder, self.encoder = config, plan, folder, encoder
        self.sequences, self.state, self.device = sequences, state, device
        self.checkpoints = folder / "checkpoints"
        self.validation = None
        if config.validation.corpora:
            self.validation = Validation(config, encoder.vocabulary, state, device)
        if state.is_first:
            take(folder, config, plan)
        self.sinks: list[Sink] = []
        self.progress: Progress | None = None

    def train(self, engine: DeepSpeedEngine) -> None:
        tokens = self._restore(engine)
        done = tokens // self.plan.tokens_per_step
        with ExitStack() as stack:
            if self.state.is_first:
                self._describe(engine, done)
                self._open_sinks(stack, done)
            if tokens == 0:
                self._begin(engine)
            trainer = Trainer(
                self.config,
                self.plan,
                engine,
                self.state,
                self.device,
                self.sequences,
                self.encoder.vocabulary,
                validate=self.validation,
                save=lambda step: self._save(engine, step.number, step.tokens, step),
                record=self._record,
            )
            trainer.run(tokens)
        if self.state.is_first:
            self._finish()

    def _restore(self, engine: DeepSpeedEngine) -> int:
        """Sets weights and optimiser from the newest checkpoint or the start model; returns the tokens consumed."""
        found = [store.latest(self.checkpoints, self._say) if self.state.is_first else None]
        dist.broadcast_object_list(found, src=0)
        checkpoint, model = found[0], engine.module
        if checkpoint is None and self.encoder.weights is None:
            scatter(engine, self.state, lambda name: model.initial_weight(name, self.config.seed))
            return 0
        with ExitStack() as stack:
            source = self.encoder.weights if checkpoint is None else Source(str(checkpoint))
            weights = stack.enter_context(huggingface.Weights(source))
            weights.check(model.full_sizes())
            if checkpoint is None:
                scatter(engine, self.state, weights)
                return 0
            run_state = huggingface.read_run_state(checkpoint)
            moments = huggingface.open_moments(checkpoint, stack)
            scatter(engine, self.state, weights, moments, run_state["adam_steps"])
            self._say(f"resuming from {checkpoint} at {run_state['tokens']:,} tokens")
            return run_state["tokens"]

    def _begin(self, engine: DeepSpeedEngine) -> None:
        """Step 0: the figures before training, and a checkpoint where no folder holds these weights yet."""
        if self.validation:
            self._record({"step": 0, "tokens": 0} | self.validation(engine.module))
        if self.encoder.weights is None:
            self._save(engine, 0, 0, None)

    def _save(self, engine: DeepSpeedEngine, step: int, tokens: int, planned: Step | None) -> None:
        training = gather(engine, self.state)
        if not self.state.is_first:
            return
        encoder = self.encoder
        run_state = {
            "step": step,
            "tokens": tokens,
            "phase": planned.phase.name if planned else None,
            "ranks": dist.get_world_size(),
            "tensor_parallel": self.state.tensor_size,
            "trajectory": self.config.trajectory(),
            "versions": meter.versions(),
        }

        def write(aside: Path) -> None:
            huggingface.write_model(aside, encoder.config, encoder.tokenizer, encoder.vocabulary, training.weights)
            huggingface.write_checkpoint(aside, training, run_state)

        target = store.checkpoint_folder(self.checkpoints, step)
        store.publish(target, write)
        boundaries = {0, *(phase.end // self.plan.tokens_per_step for phase in self.plan.phases)}
        store.prune(self.checkpoints, self.config.checkpoint.keep, boundaries)
        self._say(f"saved {target}")

    def _open_sinks(self, stack: ExitStack, done: int) -> None:
        self.sinks = [MetricsFile(self.folder / "metrics.jsonl", done if done else -1)]
        if self.config.tensorboard:
            self.sinks.append(TensorBoardSink(self.folder / "tensorboard", done))
        for sink in self.sinks:
            stack.callback(sink.close)
        phases = self.plan.to_dict()["phases"]
        self.progress = stack.enter_context(Progress(phases, self.plan.tokens_per_step, done))

    def _record(self, figures: dict[str, Any]) -> None:
        if self.state.is_first:
            for sink in self.sinks:
                sink.write(figures)
            self.progress.update(figures)

    def _say(self, message: str) -> None:
        if self.state.is_first:
            self.progress.say(message) if self.progress else print(message, flush=True)

    def _describe(self, engine: DeepSpeedEngine, done: int) -> None:
        """Adds this session to environment.json, with what it runs on and what it reads."""
        session = {
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "step": done,
            "ranks": dist.get_world_size(),
            "tensor_parallel": self.state.tensor_size,
            "device": meter.device_name(self.device),
            "host_cores": meter.host_cores(),
        }
        validation = self.validation
        weights = [corpus.weight for corpus in self.config.data.corpora]
        sizes = engine.module.full_sizes().values()
        facts = {
            "versions": meter.versions(),
            "model": {"parameters": sum(torch.Size(size).numel() for size in sizes), **_sizes(self.encoder.config)},
            "corpora": _corpora(self.config.data.corpora, self.sequences),
            "validation_corpora": _corpora(self.config.validation.corpora, validation.sequences) if validation else [],
            "unigram_loss": validation.unigram_loss(self.sequences, weights) if validation else None,
        }
        add_session(self.folder, session, facts)
        if validation:
            self._say(
                f"unigram distribution of the corpus on the masked held-out tokens: {facts['unigram_loss']:.3f} nats"
            )

    def _finish(self) -> None:
        report = write_report(self.folder)
        final = store.checkpoint_folder(self.checkpoints, self.plan.total_steps)
        print(f"model    {final}\nreport   {report}\nmetrics  {self.folder / 'metrics.jsonl'}", flush=True)


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {key: config[key] for key in keys}


def _corpora(corpora: tuple[Corpus, ...], sequences: Sequences) -> list[dict[str, Any]]:
    return [
        {
            "prefix": corpus.prefix,
            "weight": corpus.weight,
            "documents": manifest.documents,
            "tokens": manifest.tokens,
            "tokenizer_sha256": manifest.tokenizer["sha256"],
            "sources": manifest.sources,
        }
        for corpus, manifest in zip(corpora, sequences.manifests, strict=True)
    ]
