"""Metrics, progress, environment.json and the report of a session, written by the first rank.

Every rank calls the same methods; on the others they do nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_detour.data.batches import DocumentMixture
from megatron_detour.errors import EXIT_INTERRUPTED
from megatron_detour.files import is_transient
from megatron_detour.forecast import forecast, headline
from megatron_detour.log import shown_by
from megatron_detour.objectives import REFERENCE
from megatron_detour.observe import meter
from megatron_detour.observe.next_steps import next_commands
from megatron_detour.observe.progress import RunProgress
from megatron_detour.observe.report import write_report
from megatron_detour.observe.sinks import MetricsFile, Sink, TensorBoardSink, WandbSink
from megatron_detour.run_directory import (
    METRICS,
    add_session,
    changed_settings,
    claim,
    note,
    refuse_another_run,
)
from megatron_detour.runtime.failure_detector import Verdict
from megatron_detour.runtime.lock import RunLock
from megatron_detour.training.checkpoints import Checkpoints
from megatron_detour.training.run import Run
from megatron_detour.training.validation import Validation

logger = logging.getLogger(__name__)

AWAY = "disk unavailable"
REPORT_SECONDS = 10.0  # that a preempted session waits for its report


class Recorder:
    def __init__(self, run: Run, checkpoints: Checkpoints) -> None:
        self.run, self.checkpoints = run, checkpoints
        self._sinks: list[Sink] = []
        self._progress: RunProgress | None = None
        self._reports = ThreadPoolExecutor(1, "reports")
        self._described = self._ended = False
        self._unigram: float | None = None
        self._last_loss: float | None = None

    @contextmanager
    def own_folder(self) -> Iterator[None]:
        """Lock the run directory, and record there how the session ended."""
        run = self.run
        if not run.parallel.is_first:
            yield
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        with RunLock(run.folder):
            refuse_another_run(run.folder, run.config)  # another run may have started since preflight
            for line in changed_settings(run.folder, run.config):
                logger.info("%s", line)
            claim(run.folder, run.config, run.plan)
            try:
                yield
            except BaseException as error:
                with suppress(Exception):  # report the first error
                    self.checkpoints.wait()
                reason = f"error: {error}" if isinstance(error, Exception) else "a second Ctrl-C"
                if is_transient(error) and self.checkpoints.has_saved:
                    error.restart = True  # without progress, the next session would fail at the same step
                    reason = f"{AWAY}: {error}"
                with suppress(Exception):
                    self._note(ended=reason)
                raise

    def note_end(self, verdict: Verdict) -> None:
        """Record that another rank failed, unless this session had already ended."""
        if not self._ended:
            with suppress(Exception):
                self._note(ended=f"{AWAY if verdict.restart else 'error'}: {verdict}")

    @contextmanager
    def open(self, tokens: int, validation: Validation | None) -> Iterator[None]:
        """Describe the session, which resumes after `tokens` tokens, and record its metrics while open."""
        with ExitStack() as stack:
            if self.run.parallel.is_first:
                self._describe(tokens, validation)
                self._open_sinks(stack, tokens)
            yield

    def record(self, figures: dict[str, Any]) -> None:
        """Write the metrics of a step, or of the validation before step 1."""
        for sink in self._sinks:
            sink.write(figures)
        if self._progress:
            self._progress.show(figures)
        self._last_loss = figures.get(f"val_{REFERENCE.name}_loss", self._last_loss)

    def write_report(self) -> Future[Path | None] | None:
        """Write the report in the background."""
        return self._reports.submit(self._write_report) if self.run.parallel.is_first else None

    def finish(self, finished: bool) -> None:
        """Log and record how the session ended; `finished`: the end of the plan was reached."""
        run, final = self.run, self.checkpoints.path(self.run.plan.total_steps)
        if not run.parallel.is_first:
            return
        reason = run.preemption.reason() or "a request to another rank"
        self._note(ended="finished" if finished else reason)
        self._ended = True
        if finished:
            logger.info("model    %s", final)
        else:
            logger.info(
                "stopped by %s: saved; run the same command to resume (exit status %d)", reason, EXIT_INTERRUPTED
            )
        report = self.write_report()
        with suppress(TimeoutError):  # a preempted job has little time left
            report = report.result(None if finished else REPORT_SECONDS)
        logger.info("report   %s", report if isinstance(report, Path) else "not written")
        logger.info("metrics  %s", run.folder / METRICS)
        if finished and None not in (self._last_loss, self._unigram) and self._last_loss >= self._unigram:
            logger.warning(
                "the validation MLM loss, %.3f, is not below the unigram baseline, %.3f: the model has learned little; "
                "train longer, or on more text",
                *(self._last_loss, self._unigram),
            )
        if finished:
            logger.info("%s", next_commands(run.folder, final, run.plan.has_detour))

    def _open_sinks(self, stack: ExitStack, tokens: int) -> None:
        run, config = self.run, self.run.config
        done = run.plan.at(tokens).number - 1
        metrics = MetricsFile(run.folder / METRICS, done if done else -1)
        if metrics.missing:
            logger.warning("%s has no metrics for steps %s; the report omits them", metrics.path, metrics.missing)
            self._note(missing_steps=metrics.missing)
        self._sinks = [metrics]
        if config.tensorboard:
            self._sinks.append(TensorBoardSink(run.folder / "tensorboard", done, metrics.counts))
        if config.wandb:
            settings = {key: value for key, value in asdict(config.wandb).items() if value is not None}
            self._sinks.append(WandbSink(settings, run.folder, config.name, done, metrics.counts))
        for sink in self._sinks:
            stack.callback(sink.close)
        self._progress = stack.enter_context(RunProgress(run.plan.to_dict()["phases"], done))
        stack.enter_context(shown_by(self._progress.say))

    def _describe(self, tokens: int, validation: Validation | None) -> None:
        """Add this session to environment.json: hardware, versions and corpora."""
        run, gpu = self.run, self.run.device.type == "cuda"
        logger.info("%s", run.choice)
        predicted = forecast(
            run.config,
            run.plan,
            dist.get_world_size(),
            checked=run.initial.checked,
            device=meter.device_name(run.device) if gpu else "cpu",
            gpu_memory=torch.cuda.get_device_properties(run.device).total_memory / 1e9 if gpu else 0.0,
            attention=run.choice.attention,
            kernels=run.choice.kernels,
        )
        logger.info("%s", headline(replace(predicted, micro_batches=run.micro_batches)))
        facts = run_facts(run, validation)
        add_session(run.folder, session_facts(run, run.plan.at(tokens).number - 1), facts)
        self._described = True
        self._unigram = facts["unigram_loss"]
        if self._unigram is not None:
            logger.info("unigram baseline of the validation MLM loss: %.3f", self._unigram)

    def _note(self, **facts: Any) -> None:
        if self._described:
            note(self.run.folder, **facts)

    def _write_report(self) -> Path | None:
        try:
            return write_report(self.run.folder)
        except Exception as error:  # a missing font or a full disk must not end a run
            logger.warning("no report: %s: %s", type(error).__name__, error)
            return None


def session_facts(run: Run, step: int) -> dict[str, Any]:
    """Return the hardware and backends of a session that begins after `step`, for environment.json."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
        "ranks": dist.get_world_size(),
        "tensor_parallel": run.parallel.tensor_size,
        "device": meter.device_name(run.device),
        "host_cores": meter.host_cores(),
        "attention": run.choice.attention,
        "kernels": run.choice.kernels,
        "recompute": run.choice.compute.recompute,
        "compile": run.choice.compute.compile,
        "micro_sequences": {name: one.sequences for name, one in run.micro_batches.items()},
        "chosen_by_auto": {name: one.why for name, one in run.micro_batches.items() if one.why},
        "dtype": str(next(run.zero.module.parameters()).dtype).removeprefix("torch."),
        "passed_over": run.choice.skipped,
    }


def run_facts(run: Run, validation: Validation | None) -> dict[str, Any]:
    """Return the model, corpora and versions of a run, for environment.json."""
    first = run.data.spans[0]
    corpora: dict[str, dict[str, Any]] = {}
    for span in run.data.spans:
        for facts in _corpora(span.mixture, [corpus.weight for corpus in span.corpora]):
            corpora.setdefault(facts["prefix"], facts)
    held_out = [corpus.weight for corpus in run.config.validation.corpora]
    weights = [corpus.weight for corpus in first.corpora]
    shape = run.initial.shape
    return {
        "versions": meter.versions(),
        "model": {
            "parameters": shape.parameters,
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
        },
        "corpora": list(corpora.values()),
        "entities": run.initial.entities,
        "validation_corpora": _corpora(validation.mixture, held_out) if validation else [],
        "unigram_loss": validation.unigram_loss(first.mixture, weights) if validation else None,
    }


def _corpora(mixture: DocumentMixture, weights: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "prefix": prefix,
            "weight": weight,
            "documents": manifest.documents,
            "tokens": manifest.tokens,
            "sha256": manifest.files["bin"]["sha256"],
            "tokenizer_sha256": manifest.tokenizer["sha256"],
            **manifest.input_summary(),
        }
        for prefix, weight, manifest in zip(mixture.prefixes, weights, mixture.manifests, strict=True)
    ]
