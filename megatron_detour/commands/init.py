"""`megatron-detour init`: write a run file and a Slurm script for the user's texts, model and GPUs.

With enough text, numbers of tokens are those of the paper (arXiv 2605.12438); with less they shrink.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import yaml

from megatron_detour.commands.parser import ABOVE_ZERO, COUNT
from megatron_detour.config import AUTO, RECOMPUTE, Model, from_dict, parse_tokens, recipes
from megatron_detour.config.deepspeed import read_deepspeed_config
from megatron_detour.corpus.texts import Texts
from megatron_detour.errors import DetourError, format_faults
from megatron_detour.forecast import Forecast, forecast
from megatron_detour.model.families import PUBLISHED
from megatron_detour.plan import Plan
from megatron_detour.preflight import Preflight, look
from megatron_detour.settings import Pattern, flag_type

MOST_EPOCHS = 4  # more repetition gains little (Muennighoff et al., 2023)
PAPER_TOKENS, PAPER_STEP, PAPER_LENGTH = 55 * 10**9, 3 * 2**20, 8192
DECAY_SHARE = 1 / 11  # of all tokens: 1B after 10B, 5B after 50B
STEPS = 1000  # the batch shrinks before the run has fewer steps than this
CPU_LENGTH = 1024
SLURM_TIME = flag_type(
    Annotated[str, Pattern(r"\d+|(\d+-)?\d+(:\d\d){1,2}|\d+-\d+", "a time such as 24:00:00 or 2-12 for Slurm")]
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--texts", metavar="PATH", help="texts (folder or file: .jsonl, .txt, .parquet), or the prefix of a corpus")
    add("--model", metavar="DIR_OR_ID", help="initial model (answerdotai/ModernBERT-base)")
    add("--gpus", metavar="N", help="total number of GPUs, over all nodes; 0 for the CPU (those of this machine)")
    add("--gpu", metavar="NAME", help="GPU type, such as h100 (that of this machine)")
    add("--gpu-memory", type=ABOVE_ZERO, metavar="GB", help="memory per GPU (that of this machine, or 80)")
    add("--name", metavar="NAME", help="name of the run and its files (that of the texts)")
    add("--account", metavar="NAME", help="Slurm account")
    add("--partition", metavar="NAME", help="Slurm partition")
    add("--nodes", type=COUNT, default=1, metavar="N", help="number of nodes (%(default)s)")
    add("--time", type=SLURM_TIME, default="24:00:00", metavar="TIME", help="time limit of a Slurm job (%(default)s)")
    add(
        "--tokens",
        type=_tokens,
        metavar="N",
        help="tokens to train on, such as 2B (4 epochs, at most 55B)",
    )
    add("--yes", action="store_true", help="accept all defaults without asking")
    add("--list", action="store_true", help="list the packaged recipes and exit")


def _tokens(text: str) -> int:
    try:
        return parse_tokens(text)
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"must be {fault}, not {text!r}") from None


def run(options: argparse.Namespace) -> None:
    """Write NAME.yaml and NAME.sbatch into the current folder. Raises DetourError."""
    if options.list:
        print("\n".join(recipes()))
        return
    answer(options)
    model = Model(options.model, download=not Path(options.model).is_dir())
    start = look(dataclasses.replace(model, download=False))
    if start.shape is None or (start.faults and options.model not in PUBLISHED):
        raise DetourError(format_faults(list(start.faults)))
    texts = Texts.read(options.texts, options.name, None if start.vocabulary is None else options.model)
    machine = Machine(int(options.gpus), options.gpu, options.gpu_memory)
    if machine.ranks % options.nodes:
        raise DetourError(f"--gpus: {machine.ranks} cannot be divided evenly among {options.nodes} nodes")
    chosen = fitting(run_file(options, texts, model, start, machine), start, machine)
    files = {Path(f"{options.name}.yaml"): as_yaml(chosen), Path(f"{options.name}.sbatch"): slurm(options, machine)}
    for path in files:
        if path.exists():
            raise DetourError(f"{path}: already exists; choose another --name")
    for path, content in files.items():
        path.write_text(content, encoding="utf-8")
    print(f"texts    about {texts.tokens:,} tokens")
    print(f"wrote    {', '.join(map(str, files))}")
    commands = next_commands(options, texts, model, machine)
    print("\n".join(["next:", *(f"  {command}" for command in commands)]))


def answer(options: argparse.Namespace) -> None:
    """Fill in missing options: at most five questions, and none with --yes or without a terminal."""
    known = options.gpus == "0" or (options.gpus and options.gpu)
    detected = Machine(0, None, None) if known else Machine.here()
    ask = _ask if sys.stdin.isatty() and not options.yes else _default
    options.texts = options.texts or ask("texts (folder, file or prefix of a corpus)", "")
    if not options.texts:
        raise DetourError("--texts: give the texts to train on")
    options.model = options.model or ask("initial model (folder or hub id)", "answerdotai/ModernBERT-base")
    options.gpus = options.gpus or ask("number of GPUs (0 for CPU)", str(detected.gpus))
    if not options.gpus.isdecimal():
        raise DetourError(f"--gpus: expected an integer, not {options.gpus!r}")
    options.gpu = options.gpu or detected.name or "h100"
    options.gpu_memory = options.gpu_memory or detected.memory or 80
    options.name = options.name or ask("name of the run", Path(options.texts).name.split(".")[0] or "run")
    if options.account is None and options.partition is None:
        options.account, _, options.partition = ask("Slurm account/partition (empty for none)", "").partition("/")


def _ask(question: str, default: str) -> str:
    return input(f"{question} [{default}]: ").strip() or default


def _default(question: str, default: str) -> str:
    return default


@dataclass(frozen=True)
class Machine:
    gpus: int  # 0: the CPU
    name: str | None
    memory: float | None  # GB per GPU

    @classmethod
    def here(cls) -> Machine:
        import torch

        if not torch.cuda.is_available():
            return cls(0, None, None)
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9
        return cls(torch.cuda.device_count(), torch.cuda.get_device_name(0), memory)

    @property
    def ranks(self) -> int:
        return max(self.gpus, 1)


def run_file(
    options: argparse.Namespace, texts: Texts, model: Model, start: Preflight, machine: Machine
) -> dict[str, Any]:
    """Return the run file without recomputation, before GPU memory is considered."""
    length = min(start.shape.max_positions, PAPER_LENGTH if machine.gpus else CPU_LENGTH)
    training = texts.tokens * (1 if texts.built else 1 - texts.held_out)
    total = options.tokens or min(int(MOST_EPOCHS * training), PAPER_TOKENS)
    step = min(PAPER_STEP, total // STEPS)
    per_rank = max(1, step // (length * machine.ranks))
    power = 1 << (per_rank.bit_length() - 1)
    # 2^n or 3 * 2^n, like the paper's 384: such numbers have many divisors for micro-batches.
    sequences = machine.ranks * (power * 3 // 2 if per_rank >= power * 3 // 2 else power)
    decay = max(int(total * DECAY_SHARE), sequences * length)
    detour = max(total - decay, sequences * length)
    every = _rounded(total // 22)
    rate = {"peak": 2e-4}
    content: dict[str, Any] = {
        "name": options.name,
        "folder": f"runs/{options.name}",
        "model": {"start": model.start} | ({"download": True} if model.download else {}),
        "data": {"corpora": [{"prefix": texts.prefix}], "sequence_length": length},
        "batch": {"sequences": sequences, "micro_sequences": AUTO},
        "phases": [
            {
                "name": "detour",
                "objective": "clm",
                "tokens": _rounded(detour),
                "learning_rate": rate | {"warmup": _rounded(min(10**8, detour // 100))},
            },
            {
                "name": "decay",
                "objective": "mlm",
                "mask_rate": 0.15,
                "tokens": _rounded(decay),
                "learning_rate": rate | {"shape": "1-sqrt", "end": 2e-5},
            },
        ],
        "deepspeed": f"ds_configs/zero2_{'bf16' if machine.gpus else 'fp32_cpu'}.json",
        "compute": {"recompute": "none"},
        "checkpoint": {"every": every, "keep": 2},
    }
    if texts.validation:
        held = texts.tokens * texts.held_out / length
        corpora = [{"prefix": texts.validation}]
        content["validation"] = {"corpora": corpora, "every": every, "sequences": max(1, min(256, int(held)))}
    return content


def _rounded(tokens: int) -> int:
    """Round down to two digits, for readability."""
    unit = 10 ** max(len(str(tokens)) - 2, 0)
    return max(tokens // unit * unit, 1)


def fitting(content: dict[str, Any], start: Preflight, machine: Machine) -> dict[str, Any]:
    """Choose the least recomputation that fits into GPU memory by the forecast."""
    for recompute in RECOMPUTE:
        candidate = content | {"compute": {"recompute": recompute}}
        if _fits(_forecast(candidate, start, machine), machine):
            return candidate
    return candidate  # nothing fits: plan says what else to change


def _forecast(content: dict[str, Any], start: Preflight, machine: Machine) -> Forecast:
    config = from_dict(content)
    device = machine.name if machine.gpus else "cpu"
    memory = machine.memory or 80
    checked = dataclasses.replace(start, deepspeed=read_deepspeed_config(config.deepspeed))
    return forecast(config, Plan.from_config(config), machine.ranks, checked=checked, device=device, gpu_memory=memory)


def _fits(result: Forecast, machine: Machine) -> bool:
    most = result.most_memory
    gigabytes = machine.memory if machine.gpus else psutil.virtual_memory().total / 1e9
    return most is None or most.fits(gigabytes)


def as_yaml(content: dict[str, Any]) -> str:
    body = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return (
        "# yaml-language-server: $schema=run.schema.json\n"
        "# Written by megatron-detour init. For completion in editors: megatron-detour schema > run.schema.json\n"
        f"{body}"
    )


def slurm(options: argparse.Namespace, machine: Machine) -> str:
    """Return a batch script that requeues itself until the run is done."""
    requeue = (Path(__file__).parents[1] / "recipes" / "requeue.sh").read_text(encoding="utf-8")
    per_node = machine.ranks // options.nodes
    lines = [f"--job-name={options.name}", f"--nodes={options.nodes}", f"--ntasks-per-node={per_node}"]
    lines += [f"--gpus-per-node={per_node}", "--cpus-per-task=8"] if machine.gpus else ["--cpus-per-task=2"]
    lines += [f"--account={options.account}"] if options.account else []
    lines += [f"--partition={options.partition}"] if options.partition else []
    lines += [f"--time={options.time}", "--signal=USR1@300", "--requeue", "--open-mode=append", "--output=%x-%j.log"]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"# Trains {options.name}.yaml: sbatch {options.name}.sbatch [key=value ...], from this folder.",
            *(f"#SBATCH {line}" for line in lines),
            "set -euo pipefail",
            "[ ! -e .venv/bin/activate ] || . .venv/bin/activate",
            "",
            requeue.rstrip(),
            "",
            "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}",
            f'run_and_requeue "$(folder_of {shlex.quote(f"runs/{options.name}")} "$@")" \\',
            '  srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --gpu-bind=none \\',
            f'  python -u -m megatron_detour train {shlex.quote(f"{options.name}.yaml")} "$@"',
            "",
        ]
    )


def next_commands(options: argparse.Namespace, texts: Texts, model: Model, machine: Machine) -> list[str]:
    """Build or check the corpus, plan, train."""
    build = ["preprocess", "verify", texts.prefix]
    if not texts.built:
        build = ["preprocess", "--input", options.texts, "--output-prefix", texts.prefix, "--tokenizer", model.start]
        build += [*texts.flags, "--held-out", f"{texts.held_out:g}", *(["--download"] if model.download else [])]
    file = f"{options.name}.yaml"
    gpu = ["--gpu", options.gpu, "--gpu-memory", f"{options.gpu_memory:.0f}"] if machine.gpus else ["--gpu", "cpu"]
    plan = ["plan", file, "--gpus", str(machine.ranks), *gpu]
    train = ["train", file, *(["--launch"] if machine.ranks > 1 else [])]
    return [shlex.join(["megatron-detour", *words]) for words in (build, plan, train)]
