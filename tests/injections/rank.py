"""A rank of a run, forked off a process that has its libraries loaded, so that hundreds of starts take no hours."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

# ruff: noqa: F401  what takes seconds to load
import deepspeed.runtime.zero.muon.muon_optimizer
import matplotlib.backends.backend_agg
import matplotlib.figure
import torch._inductor.compile_fx
import transformers.models.modernbert.modeling_modernbert

import megatron_detour.training.session
from megatron_detour.errors import command_line
from megatron_detour.training.run import main


def fail_at(step_number: int) -> None:
    from megatron_detour.training.loop import Trainer

    honest = Trainer.train_step

    def train_step(trainer, step, batch):
        if step.number == step_number:
            raise RuntimeError("injected")
        return honest(trainer, step, batch)

    Trainer.train_step = train_step


def work(environment: dict[str, str], log: str, arguments: list[str]) -> None:
    """Runs as srun would have started it; RAISE_AT=STEP makes it fail in that step, as a fault of the code would."""
    os.setsid()  # whatever it starts can be told by its session
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if "RAISE_AT" in os.environ:
        fail_at(int(os.environ["RAISE_AT"]))
    command_line(lambda: main("no run file was given", arguments))
