"""One session of a run, from the corpora to the report: a run is one session, or several when it was interrupted."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_detour.checkpoint.saver import Background
from megatron_detour.config import RunConfig
from megatron_detour.config.deepspeed import read_deepspeed_config
from megatron_detour.data.phase_data import PhaseData
from megatron_detour.errors import EXIT_INTERRUPTED, DetourError
from megatron_detour.files import is_transient
from megatron_detour.forecast import Start, forecast, headline
from megatron_detour.model.choose import Choice, choose_compute
from megatron_detour.model.modernbert import ModernBert
from megatron_detour.observe import meter
from megatron_detour.observe.next_steps import next_commands
from megatron_detour.observe.progress import Progress
from megatron_detour.observe.report import write_report
from megatron_detour.observe.sinks import MetricsFile, Sink, TensorBoardSink, WandbSink
from megatron_detour.parallel.state import ParallelState
from megatron_detour.plan import Plan, Step
from megatron_detour.runtime.failure_detector import FailureDetector, Verdict
from megatron_detour.runtime.lock import RunLock
from megatron_detour.runtime.preemption import Preemption
from megatron_detour.text import visible
from megatron_detour.training.checkpoints import Checkpoints
from megatron_detour.training.describe import run_facts, session_facts
from megatron_detour.training.engine import create_engine, start_distributed, training_dtype
from megatron_detour.training.guards import Guard, not_finite
from megatron_detour.training.initial_model import InitialModel
from megatron_detour.training.run_directory import (
    METRICS,
    add_session,
    changed_settings,
    claim,
    note,
    refuse_another_run,
    stand_in,
)
from megatron_detour.training.trainer import Trainer
from megatron_detour.training.validation import Validation

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

AWAY = "a disk that was away"
REPORT_SECONDS = 10.0  # that a session which has to stop gives its report


def run_session(config: RunConfig, plan: Plan, folder: Path, stop: Preemption) -> int:
    """Trains from the newest whole checkpoint of `folder`, or from the start, to the end of the plan or till `stop`.

    Returns the exit status: 0 at the end, EXIT_INTERRUPTED where it was asked to stop before.
    """
    deepspeed_config = read_deepspeed_config(config.deepspeed)
    start = _start_model(config, folder)
    data = PhaseData(plan, config.data.order_seed, start.vocabulary)
    state, device = start_distributed(config)
    with FailureDetector(asked=lambda: stop.reason() is not None) as watch:
        choice = choose_compute(
            config.compute.attention,
            config.compute.kernels,
            config.compute.recompute,
            start.shape.head_dim,
            device,
            training_dtype(deepspeed_config),
        )
        session = Session(config, plan, folder, start, data, state, device, choice, stop)
        watch.has_saved, watch.ended = session.has_saved, session.note_end
        model = ModernBert(start.shape, state, choice.compute, config.z_loss)
        engine = create_engine(model, config, deepspeed_config, state)
        with session.own_folder():
            finished = session.train(engine)
        dist.barrier()
    dist.destroy_process_group()
    return 0 if finished else EXIT_INTERRUPTED


def _start_model(config: RunConfig, folder: Path) -> InitialModel:
    """What the run starts from; once it has a checkpoint, that says the same where the start model is gone."""
    try:
        return InitialModel.of(config)
    except DetourError:
        model = stand_in(folder, config.model)
        if model is None:
            raise
        return InitialModel.of(replace(config, model=model))


class Session:
    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        folder: Path,
        start: InitialModel,
        data: PhaseData,
        state: ParallelState,
        device: torch.device,
        choice: Choice,
        stop: Preemption,
    ) -> None:
        self.config, self.plan, self.folder, self.start, self.choice = config, plan, folder, start, choice
        self.data, self.state, self.device, self.stop = data, state, device, stop
        self.validation = None
        if config.validation.corpora:
            self.validation = Validation(config, start.vocabulary, start.tokenizer_file, state, device)
        self.sinks: list[Sink] = []
        self.progress: Progress | None = None
        self.checkpoints: Checkpoints | None = None
        self.writing, self.reports = Background(), Background()  # of checkpoints; of reports
        self._described = self._ended = False
        self._slowest, self._recorded_at = 0.0, 0.0

    @contextmanager
    def own_folder(self) -> Iterator[None]:
        """Keeps other runs out of the folder, and notes there how the session ended."""
        if not self.state.is_first:
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with RunLock(self.folder, self._say):
            refuse_another_run(self.folder, self.config)  # another may have begun since the start looked
            for line in changed_settings(self.folder, self.config):
                self._say(line)
            claim(self.folder, self.config, self.plan)
            try:
                yield
            except BaseException as error:
                with suppress(Exception):  # the first fault is the one to tell
                    self.writing.wait()
                how = f"error: {error}" if isinstance(error, Exception) else "a second Ctrl-C"
                if is_transient(error) and self.has_saved():
                    error.start_again = True  # else the next session would end in the same place
                    how = f"{AWAY}: {error}"
                with suppress(Exception):
                    self._note(ended=how)
                raise

    def has_saved(self) -> bool:
        return self.checkpoints is not None and self.checkpoints.has_saved

    def note_end(self, verdict: Verdict) -> None:
        """Another rank has failed, after which no work was saved, unless this one was at its end already."""
        if not self._ended:
            with suppress(Exception):
                self._note(ended=f"{AWAY if verdict.again else 'error'}: {verdict}")

    def train(self, engine: DeepSpeedEngine) -> bool:
        """Returns whether the end of the plan was reached; otherwise the run was asked to stop, and has saved."""
        guard = Guard(self.config.guards)
        self.checkpoints = checkpoints = Checkpoints(
            self.config,
            self.plan,
            self.folder,
            engine,
            self.state,
            self.start,
            self.data,
            guard,
            self.writing,
            self._say,
        )
        tokens = checkpoints.restore()
        finished = True
        if tokens < self.plan.total_tokens:
            with ExitStack() as stack:
                if self.state.is_first:
                    checkpoints.refuse_full_disk()
                    self._describe(engine, tokens)
                    self._open_sinks(stack, tokens)
                if tokens == 0:
                    self._begin(engine, checkpoints)
                checkpoints.prepare()
                finished = self._trainer(engine, guard, checkpoints).run(tokens)
                self.writing.wait()
        if self.state.is_first:
            self._finish(checkpoints, finished)
        return finished

    def _trainer(self, engine: DeepSpeedEngine, guard: Guard, checkpoints: Checkpoints) -> Trainer:
        def record(figures: dict[str, Any]) -> None:
            self.writing.check()
            self._record(figures)
            self._keep_time(checkpoints)

        def save(step: Step) -> None:
            checkpoints.save(step)
            if self.state.is_first and step.ends_phase and step.number < self.plan.total_steps:
                self.reports.submit(self._report)

        self._recorded_at = time.monotonic()
        return Trainer(
            self.config,
            self.plan,
            engine,
            self.state,
            self.device,
            self.data,
            self.start,
            guard,
            validate=self.validation,
            save=save,
            inspect=checkpoints.inspect,
            record=record,
            stop=lambda: self.stop.reason() is not None,
        )

    def _keep_time(self, checkpoints: Checkpoints) -> None:
        """Before a time limit there must be room for a step, with a validation perhaps, and for saving."""
        now = time.monotonic()
        self._slowest, self._recorded_at = max(self._slowest, now - self._recorded_at), now
        self.stop.reserve_seconds(1.5 * (self._slowest + checkpoints.seconds) + REPORT_SECONDS)

    def _begin(self, engine: DeepSpeedEngine, checkpoints: Checkpoints) -> None:
        """Step 0: the figures before training, and a checkpoint where no folder holds these weights yet."""
        if self.validation:
            figures = self.validation(engine.module)
            wrong = not_finite(figures)
            self._record({"step": 0, "tokens": 0} | figures | dict.fromkeys(wrong))
            if wrong:
                raise DetourError(f"model.start: {wrong[0]} is NaN or infinite before any training; start from another")
        if self.start.weights is None:
            checkpoints.save(None)

    def _open_sinks(self, stack: ExitStack, tokens: int) -> None:
        done = self.plan.at(tokens).number - 1
        metrics = MetricsFile(self.folder / METRICS, done if done else -1)
        if metrics.missing:
            self._say(f"warning: {metrics.path} has no figures of steps {metrics.missing}; the report lacks them")
            self._note(missing_steps=metrics.missing)
        self.sinks = [metrics]
        if self.config.tensorboard:
            self.sinks.append(TensorBoardSink(self.folder / "tensorboard", done, metrics.counts))
        if self.config.wandb:
            settings = {key: value for key, value in asdict(self.config.wandb).items() if value is not None}
            self.sinks.append(WandbSink(settings, self.folder, self.config.name, done, metrics.counts))
        for sink in self.sinks:
            stack.callback(sink.close)
        self.progress = stack.enter_context(Progress(self.plan.to_dict()["phases"], done))

    def _record(self, figures: dict[str, Any]) -> None:
        if self.state.is_first:
            for sink in self.sinks:
                sink.write(figures)
            self.progress.update(figures)

    def _say(self, message: str) -> None:
        if self.state.is_first:
            self.progress.say(message) if self.progress else print(visible(message), flush=True)

    def _describe(self, engine: DeepSpeedEngine, tokens: int) -> None:
        """Adds this session to environment.json, with what it runs on and what it reads."""
        self._say(str(self.choice))
        self._say(self._forecast())
        step = self.plan.at(tokens).number - 1
        facts = run_facts(self.config, self.start, self.data, self.validation, engine.module)
        add_session(self.folder, session_facts(step, self.state, self.device, self.choice, engine.module), facts)
        self._described = True
        if facts["unigram_loss"] is not None:
            self._say(f"unigram baseline of the validation MLM loss: {facts['unigram_loss']:.3f}")

    def _forecast(self) -> str:
        gpu = self.device.type == "cuda"
        told = forecast(
            self.config,
            self.plan,
            dist.get_world_size(),
            start=Start(self.start.shape, self.start.vocabulary),
            device=meter.device_name(self.device) if gpu else "cpu",
            gpu_memory=torch.cuda.get_device_properties(self.device).total_memory / 1e9 if gpu else 0.0,
        )
        return headline(told)

    def _note(self, **facts: Any) -> None:
        if self._described:
            note(self.folder, **facts)

    def _report(self) -> Path | None:
        try:
            return write_report(self.folder)
        except Exception as error:  # a font, a full disk: no reason to end a run
            self._say(f"warning: no report: {type(error).__name__}: {error}")
            return None

    def _finish(self, checkpoints: Checkpoints, finished: bool) -> None:
        why = self.stop.reason() or "a request to another rank"
        self._note(ended="finished" if finished else why)
        self._ended = True
        if finished:
            print(f"model    {checkpoints.path(self.plan.total_steps)}", flush=True)
        else:
            print(
                f"stopped by {why}: saved, and the same command goes on from there (exit status {EXIT_INTERRUPTED})",
                flush=True,
            )
        self.reports.submit(self._report)
        report = self.reports.wait(None if finished else REPORT_SECONDS)  # who has asked to stop does not wait for long
        print(f"report   {report or 'not written'}\nmetrics  {self.folder / 'metrics.jsonl'}", flush=True)
        if finished:
            print(next_commands(self.folder, checkpoints.path(self.plan.total_steps), self.plan.has_detour), flush=True)
