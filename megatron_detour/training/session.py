"""One session of a run, from the corpora to the report: a run is one session, or several when it was interrupted."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_detour.checkpoint import huggingface, store
from megatron_detour.checkpoint.huggingface import Source
from megatron_detour.checkpoint.state import gather, scatter
from megatron_detour.config import Corpus, RunConfig
from megatron_detour.data.batches import Sequences
from megatron_detour.errors import DetourError
from megatron_detour.model.choose import Choice, choose_compute
from megatron_detour.model.modernbert import ModernBert
from megatron_detour.observe import meter
from megatron_detour.observe.progress import Progress
from megatron_detour.observe.report import write_report
from megatron_detour.observe.sinks import MetricsFile, Sink, TensorBoardSink
from megatron_detour.parallel.state import ParallelState
from megatron_detour.plan import Plan, Step
from megatron_detour.training.engine import create_engine, read_deepspeed_config, start_distributed, training_dtype
from megatron_detour.training.folder import add_session, take
from megatron_detour.training.loop import Trainer
from megatron_detour.training.start import StartModel
from megatron_detour.training.validation import Validation

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def run_session(config: RunConfig, plan: Plan, folder: Path) -> None:
    """Trains from the newest whole checkpoint of `folder`, or from the start, to the end of the plan."""
    deepspeed_config = read_deepspeed_config(config.deepspeed)
    start = StartModel.of(config)
    sequences = Sequences(config.data.corpora, config.data.sequence_length, config.data.order_seed, start.vocabulary)
    state, device = start_distributed(config)
    choice = choose_compute(
        config.compute.attention,
        config.compute.kernels,
        config.compute.recompute,
        start.shape.head_dim,
        device,
        training_dtype(deepspeed_config),
    )
    session = Session(config, plan, folder, start, sequences, state, device, choice)
    model = ModernBert(start.shape, state, choice.compute, config.z_loss)
    session.train(create_engine(model, config, deepspeed_config, state))
    dist.barrier()
    dist.destroy_process_group()


class Session:
    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        folder: Path,
        start: StartModel,
        sequences: Sequences,
        state: ParallelState,
        device: torch.device,
        choice: Choice,
    ) -> None:
        self.config, self.plan, self.folder, self.start, self.choice = config, plan, folder, start, choice
        self.sequences, self.state, self.device = sequences, state, device
        self.checkpoints = folder / "checkpoints"
        self.validation = None
        if config.validation.corpora:
            self.validation = Validation(config, start.vocabulary, state, device)
        if state.is_first:
            take(folder, config, plan)
        self.sinks: list[Sink] = []
        self.progress: Progress | None = None

    def train(self, engine: DeepSpeedEngine) -> None:
        tokens = self._restore(engine)
        done = tokens // self.plan.tokens_per_step
        trainer = Trainer(
            self.config,
            self.plan,
            engine,
            self.state,
            self.device,
            self.sequences,
            self.start.vocabulary,
            self.start.words,
            validate=self.validation,
            save=lambda step: self._save(engine, step),
            record=self._record,
        )
        if tokens < self.plan.total_tokens:
            with ExitStack() as stack:
                if self.state.is_first:
                    self._describe(engine, done)
                    self._open_sinks(stack, done)
                if tokens == 0:
                    self._begin(engine)
                trainer.run(tokens)
        if self.state.is_first:
            self._finish()

    def _restore(self, engine: DeepSpeedEngine) -> int:
        """Sets weights and optimiser from the newest checkpoint or the start model; returns the tokens consumed."""
        found = [store.latest(self.checkpoints, self._say) if self.state.is_first else None]
        dist.broadcast_object_list(found, src=0)
        checkpoint, model = found[0], engine.module
        if checkpoint is None and self.start.weights is None:
            scatter(engine, self.state, lambda name: model.initial_weight(name, self.config.seed))
            return 0
        with ExitStack() as stack:
            source = self.start.weights if checkpoint is None else Source(str(checkpoint))
            weights = stack.enter_context(huggingface.Weights(source))
            weights.check(model.full_sizes())
            if checkpoint is None:
                self._compare(source)
                scatter(engine, self.state, weights)
                return 0
            run_state = huggingface.read_run_state(checkpoint)
            if run_state["tokens"] < self.plan.total_tokens:
                self._check_corpora(run_state, checkpoint)
            moments = huggingface.open_moments(checkpoint, stack)
            scatter(engine, self.state, weights, moments, run_state["adam_steps"])
            self._say(f"resuming from {checkpoint} at {run_state['tokens']:,} tokens")
            return run_state["tokens"]

    def _compare(self, source: Source) -> None:
        """A start model has to be the same function here as in transformers: better told now than after the run."""
        if self.state.is_first:
            difference = huggingface.compare_with_transformers(
                source.name, huggingface.load_model(source, self.start.shape)
            )
            huggingface.refuse_difference(difference, source.name)
            self._say(f"{source.name}: logits equal transformers' within {difference:.1e}")

    def _identities(self) -> dict[str, str]:
        corpora = zip(self.config.data.corpora, self.sequences.manifests, strict=True)
        return {corpus.prefix: manifest.files["bin"]["sha256"] for corpus, manifest in corpora}

    def _check_corpora(self, run_state: dict[str, Any], checkpoint: Path) -> None:
        for prefix, sha256 in self._identities().items():
            if run_state.get("corpora", {}).get(prefix) != sha256:
                raise DetourError(
                    f"{prefix}: the corpus has changed since {checkpoint} was saved; bring the old one back, or start "
                    "in another folder=..."
                )

    def _begin(self, engine: DeepSpeedEngine) -> None:
        """Step 0: the figures before training, and a checkpoint where no folder holds these weights yet."""
        if self.validation:
            self._record({"step": 0, "tokens": 0} | self.validation(engine.module))
        if self.start.weights is None:
            self._save(engine, None)

    def _save(self, engine: DeepSpeedEngine, done: Step | None) -> None:
        """Publishes a checkpoint after step `done`, or of the start."""
        training = gather(engine, self.state)
        if not self.state.is_first:
            return
        start, step = self.start, done.number if done else 0
        run_state = {
            "step": step,
            "total_steps": self.plan.total_steps,
            "tokens": done.tokens if done else 0,
            "phase": done.phase.name if done else None,
            "ranks": dist.get_world_size(),
            "tensor_parallel": self.state.tensor_size,
            "trajectory": self.config.trajectory(),
            "corpora": self._identities(),
            "versions": meter.versions(),
        }

        def write(aside: Path) -> None:
            huggingface.write_model(aside, start.config, start.tokenizer, start.vocabulary, training.weights)
            huggingface.write_checkpoint(aside, training, run_state)

        target = store.checkpoint_folder(self.checkpoints, step)
        store.publish(target, write)
        boundaries = {0, *(phase.end // self.plan.tokens_per_step for phase in self.plan.phases)}
        store.prune(self.checkpoints, step, self.config.checkpoint.keep, boundaries)
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
            "attention": self.choice.attention,
            "kernels": self.choice.kernels,
            "recompute": self.choice.compute.recompute,
            "passed_over": self.choice.passed_over,
        }
        self._say(str(self.choice))
        validation = self.validation
        weights = [corpus.weight for corpus in self.config.data.corpora]
        sizes = engine.module.full_sizes().values()
        facts = {
            "versions": meter.versions(),
            "model": {"parameters": sum(torch.Size(size).numel() for size in sizes), **_sizes(self.start.config)},
            "corpora": _corpora(self.config.data.corpora, self.sequences),
            "validation_corpora": _corpora(self.config.validation.corpora, validation.sequences) if validation else [],
            "unigram_loss": validation.unigram_loss(self.sequences, weights) if validation else None,
        }
        add_session(self.folder, session, facts)
        if validation:
            self._say(f"always guessing by token frequency, the validation MLM loss is {facts['unigram_loss']:.3f}")

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
            "sha256": manifest.files["bin"]["sha256"],
            "tokenizer_sha256": manifest.tokenizer["sha256"],
            "sources": manifest.sources,
        }
        for corpus, manifest in zip(corpora, sequences.manifests, strict=True)
    ]
