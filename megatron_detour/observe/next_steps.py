"""What to do with a run that is done: the commands, ready to be copied."""

from __future__ import annotations

import shlex
from pathlib import Path


def next_commands(folder: Path, checkpoint: Path, control: bool) -> str:
    """Convert, evaluate, train the control and compare; `control` where the run has a causal phase to stand against."""
    run, name = shlex.quote(str(folder)), shlex.quote(folder.name)
    model = f"models/{name}"
    steps = [
        ("convert", f"python tools/convert_to_hf.py --checkpoint {shlex.quote(str(checkpoint))} --output {model}"),
        ("evaluate", f"python tools/evaluate.py --model {model} --tasks hoc --data tasks --output evaluation/{name}"),
    ]
    if control:
        steps += [
            ("control", f"bash examples/pretrain_base.sh --run-file {shlex.quote(str(folder / 'run.yaml'))} --control"),
            ("compare", f"megatron-detour compare {run}-control {run} --output {run}-comparison"),
        ]
    return "\n".join(["next:", *(f"  {what:9}{command}" for what, command in steps)])
