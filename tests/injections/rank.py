"""A rank of a run, forked off a process that has its libraries loaded, so that hundreds of starts take no hours."""

from __future__ import annotations

import dataclasses
import errno
import os
from types import SimpleNamespace

if os.environ.get("CUDA_VISIBLE_DEVICES") == "":  # else DeepSpeed looks for a GPU, also in processes started later
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded; more would wait for each other

# ruff: noqa: F401  what takes seconds to load
import deepspeed.runtime.zero.muon.muon_optimizer
import matplotlib.backends.backend_agg
import matplotlib.figure
import torch._inductor.compile_fx
import transformers.models.modernbert.modeling_modernbert

import megatron_detour.commands.train
import megatron_detour.training.trainer
from megatron_detour.commands.main import main
from megatron_detour.errors import command_line


def fail_at(step_number: int) -> None:
    from megatron_detour.training.trainer import Trainer

    honest = Trainer.train_step

    def train_step(trainer, step, batch):
        if step.number == step_number:
            raise RuntimeError("injected")
        return honest(trainer, step, batch)

    Trainer.train_step = train_step


def no_number_from(step_number: int) -> None:
    """Every gradient of this rank is no number from a step on, while its losses are."""
    from megatron_detour.training.trainer import Trainer

    honest = Trainer.train_step

    def train_step(trainer, step, batch):
        accumulate = trainer.zero.accumulate
        if step.number >= step_number:
            trainer.zero.accumulate = lambda arguments, scale: accumulate(arguments, scale * float("nan"))
        try:
            return honest(trainer, step, batch)
        finally:
            trainer.zero.accumulate = accumulate

    Trainer.train_step = train_step


def validate_to_nan(call: int) -> None:
    """One validation of the run, counted from 1, gives NaN for a loss."""
    from megatron_detour.training.validation import Validation

    honest, calls = Validation.__call__, []

    def validate(validation, model):
        calls.append(model)
        return honest(validation, model) | ({"val_mlm_loss": float("nan")} if len(calls) == call else {})

    Validation.__call__ = validate


def no_report() -> None:
    from megatron_detour.training import recorder

    def write_report(folder):
        raise RuntimeError("no font")

    recorder.write_report = write_report


def disk_away_from(step_number: int) -> None:
    """From a step on no figures can be written."""
    from megatron_detour import files
    from megatron_detour.observe.sinks import MetricsFile

    files.PAUSES = (0.0, 0.0)
    honest = MetricsFile.write

    def fail(line):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def write(sink, record):
        if record["step"] >= step_number:
            sink._file = SimpleNamespace(write=fail, closed=True)
        return honest(sink, record)

    MetricsFile.write = write


def text_away_from(step_number: int) -> None:
    """This rank cannot read what it trains on in a step."""
    from megatron_detour import files
    from megatron_detour.training.trainer import Trainer

    files.PAUSES = (0.0, 0.0)
    honest = Trainer._load

    def fail(start, stop):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def load(trainer, step):
        if step.number >= step_number:
            data = SimpleNamespace(mixture=lambda phase: SimpleNamespace(documents=fail))
            trainer.run = dataclasses.replace(trainer.run, data=data)
        return honest(trainer, step)

    Trainer._load = load


def folder_gone_at(step_number: int) -> None:
    """Somebody moves the run's folder away after a step."""
    from megatron_detour.observe.sinks import MetricsFile

    honest = MetricsFile.write

    def write(sink, record):
        honest(sink, record)
        if record["step"] == step_number:
            sink.path.parent.rename(sink.path.parent.with_suffix(".gone"))

    MetricsFile.write = write


def work(environment: dict[str, str], log: str, arguments: list[str]) -> None:
    """Runs as srun would have started it. RAISE_AT=STEP makes the last rank fail in that step, as a fault of the code
    would; NO_NUMBER_FROM=STEP spoils its gradients from that step on; NAN_VALIDATION=N makes the Nth validation give
    NaN; with NO_REPORT=1 no report can be written, with
    DISK_AWAY_FROM=STEP no figures from that step on; with
    TEXT_AWAY_FROM=STEP the last rank cannot read its text; FOLDER_GONE_AT=STEP takes the folder away."""
    os.setsid()  # whatever it starts can be told by its session
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    is_last = int(environment["RANK"]) == int(environment["WORLD_SIZE"]) - 1
    if is_last and "RAISE_AT" in os.environ:
        fail_at(int(os.environ["RAISE_AT"]))
    if is_last and "NO_NUMBER_FROM" in os.environ:
        no_number_from(int(os.environ["NO_NUMBER_FROM"]))
    if is_last and "TEXT_AWAY_FROM" in os.environ:
        text_away_from(int(os.environ["TEXT_AWAY_FROM"]))
    if "DISK_AWAY_FROM" in os.environ:
        disk_away_from(int(os.environ["DISK_AWAY_FROM"]))
    if "FOLDER_GONE_AT" in os.environ:
        folder_gone_at(int(os.environ["FOLDER_GONE_AT"]))
    if "NAN_VALIDATION" in os.environ:
        validate_to_nan(int(os.environ["NAN_VALIDATION"]))
    if "NO_REPORT" in os.environ:
        no_report()
    command_line(lambda: main(["train", *arguments]))
