"""A rank of a run, as the examples start it; RAISE_AT=STEP makes it fail in that step, as a fault of the code would."""

from __future__ import annotations

import os

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


if __name__ == "__main__":
    if "RAISE_AT" in os.environ:
        fail_at(int(os.environ["RAISE_AT"]))
    command_line(lambda: main("no run file was given"))
