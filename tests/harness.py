"""Real processes on gloo: `run_ranks(4, "tests.module:function", ...)` calls the function on every rank."""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_detour.errors import command_line

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 1800  # only what hangs takes that long, on any machine


def slow(*values: Any, **options: Any) -> Any:
    """A case of a parametrized test that `make test-slow` runs: another one of its kind is in `make test`."""
    return pytest.param(*values, marks=pytest.mark.slow, **options)


def environment() -> dict[str, str]:
    """This process's environment with the interpreter's folder in front and one thread a rank."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(ranks: int, function: str, folder: Path, *arguments: Any) -> list[Any]:
    """Calls `module:function(*arguments)` on each of `ranks` processes and returns what each of them returned.

    A rank that fails fails the test with its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "arguments.pkl").write_bytes(pickle.dumps(arguments))
    shared = environment() | {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    processes = []
    for rank in range(ranks):
        log = (folder / f"rank{rank}.log").open("wb")
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "tests.harness", function, str(folder)]
        processes.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=log, stderr=log))
    try:
        codes = [process.wait(TIMEOUT_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, code in enumerate(codes):
        assert code == 0, f"rank {rank} ended with {code}:\n{(folder / f'rank{rank}.log').read_text()[-4000:]}"
    return [pickle.loads((folder / f"rank{rank}.pkl").read_bytes()) for rank in range(ranks)]


def start_gloo() -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")


def _main() -> None:
    target, folder = sys.argv[1], Path(sys.argv[2])
    module, function = target.split(":")
    arguments = pickle.loads((folder / "arguments.pkl").read_bytes())
    result = getattr(importlib.import_module(module), function)(*arguments)
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.barrier()  # rank 0 keeps the store that a slower rank may still make its groups with
    (folder / f"rank{os.environ['RANK']}.pkl").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    command_line(_main)
