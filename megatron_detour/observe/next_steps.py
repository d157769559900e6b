"""The next commands after a finished run, ready to be copied."""

from __future__ import annotations

import shlex
from pathlib import Path


def next_commands(folder: Path, checkpoint: Path, control: bool) -> str:
    """Return commands to convert, evaluate, train the control and compare; `control` if the run has a causal phase."""
    run, name = shlex.quote(str(folder)), shlex.quote(folder.name)
    model = f"models/{name}"
    steps = [
        ("convert", f"megatron-detour convert --checkpoint {shlex.quote(str(checkpoint))} --output {model}"),
        ("evaluate", f"megatron-detour evaluate --model {model} --tasks hoc --data tasks --output evaluation/{name}"),
    ]
    if control:
        steps += [
            ("control", f"megatron-detour train {shlex.quote(str(folder / 'run.yaml'))} --control --launch"),
            ("compare", f"megatron-detour compare {run}-control {run} --output {run}-comparison"),
        ]
    return "\n".join(["next:", *(f"  {what:9}{command}" for what, command in steps)])
