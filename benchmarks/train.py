"""`tools/benchmark.py train`: forward and backward passes of this project's model, and optionally transformers'."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist

from benchmarks import contenders
from benchmarks.measure import Figures, matrix_rate, take_turns
from benchmarks.workload import make_workload
from megatron_detour.config import ATTENTION, KERNELS, RECOMPUTE
from megatron_detour.errors import DetourError
from megatron_detour.files import write_whole
from megatron_detour.model.choose import choose_compute, run_sizes
from megatron_detour.model.families import read_shape
from megatron_detour.objectives import validated
from megatron_detour.observe import meter
from megatron_detour.parallel.state import ParallelState
from megatron_detour.settings import Choice, Faults, Flag, Range, validate
from megatron_detour.ui.tables import Table

SIZES = {
    "base": {"hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 22, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 28, "num_attention_heads": 16},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1},
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


HELP = "forward and backward passes of a model with random weights; no optimizer"
Positive = Annotated[int, Range(above=0)]


@dataclass(frozen=True)
class Measurement:
    size: Annotated[str, Choice(SIZES), "model size"] = "base"
    layers: Annotated[Positive | None, "override the number of layers"] = None
    objective: Annotated[str, Choice(sorted(validated()))] = "mlm"
    mask_rate: Annotated[float, Range(above=0, below=1), "mask rate of MLM"] = 0.3
    dtype: Annotated[str, Choice(DTYPES)] = "bf16"
    corpus: Annotated[str | None, Flag("PREFIX"), "read documents from this corpus instead of generating them"] = None
    full: Annotated[bool, "generate documents as long as the sequence"] = False
    sequence_length: Annotated[Positive, "tokens per pack; longer documents are truncated"] = 1024
    micro_sequences: Annotated[Positive, "packs per micro-batch"] = 4
    tokens: Annotated[Positive, "approximate tokens per step"] = 16384
    attention: Annotated[str, Choice(ATTENTION), "backend"] = "auto"
    kernels: Annotated[str, Choice(KERNELS), "fused or plain"] = "auto"
    recompute: Annotated[str, Choice(RECOMPUTE), "activation checkpointing"] = "none"
    compile: Annotated[bool, "also measure layers compiled with torch.compile, alternating"] = False
    tensor: Annotated[Positive, "tensor-parallel ranks, started with torchrun"] = 1
    sequence_parallel: Annotated[bool, "split positions over tensor-parallel ranks"] = False
    against: Annotated[
        str | None, Choice(("transformers",)), "also measure a peer, alternating, on the same documents"
    ] = None
    peer_attention: Annotated[str, "the peer's attn_implementation"] = "sdpa"
    peer_compile: Annotated[bool, "compile the peer's model with torch.compile"] = False
    peer_batch: Annotated[Positive, "documents per padded batch of the peer"] = 8
    rounds: Annotated[Positive, "steps per contender, after a warm-up step"] = 3
    seed: Annotated[int, Range(least=0), "seed of documents and masks"] = 0


@dataclass(frozen=True)
class Settings(Measurement):
    """Measurements in turn."""

    objective: Annotated[tuple[Annotated[str, Choice(sorted(validated()))], ...], "one or more, measured in turn"] = (
        "mlm",
    )
    dtype: Annotated[tuple[Annotated[str, Choice(DTYPES)], ...], "one or more"] = ("bf16",)
    json: Annotated[Path | None, "write all results here"] = None


def run(settings: Settings, say: Callable[[str], None]) -> None:
    """Print the table of all objectives and dtypes, and write the figures to `json`. Raises DetourError."""
    if settings.json and not settings.json.parent.is_dir():
        raise DetourError(f"--json: no such folder: {settings.json.parent}")
    common = {field.name: getattr(settings, field.name) for field in dataclasses.fields(Measurement)}
    chosen = itertools.product(settings.objective, settings.dtype)
    results = measure_all([Measurement(**common | {"objective": each, "dtype": dtype}) for each, dtype in chosen], say)
    if os.environ.get("RANK", "0") == "0":
        print(table(results))
        if settings.json:
            write_json(settings.json, results)


def measure_all(all_settings: list[Measurement], say) -> list[dict[str, Any]]:
    """Run several measurements; return their figures as plain values. Raises DetourError for invalid settings."""
    for settings in all_settings:
        validate(settings, _check)
    state, device = _join(all_settings[0])
    results = [measure(settings, state, device, say if state.is_first else _silent) for settings in all_settings]
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return results


def measure(settings: Measurement, state: ParallelState, device: torch.device, say) -> dict[str, Any]:
    work = make_workload(
        settings.corpus,
        settings.objective,
        settings.mask_rate,
        settings.sequence_length,
        settings.tokens,
        settings.full,
        settings.seed,
    )
    config = {"model_type": "modernbert", "vocab_size": work.vocabulary.size, **SIZES[settings.size]}
    config |= {"max_position_embeddings": max(8192, settings.sequence_length), "pad_token_id": work.vocabulary.pad}
    if settings.layers:
        config["num_hidden_layers"] = settings.layers
    dtype = DTYPES[settings.dtype]
    batch = settings.sequence_length, settings.micro_sequences, work.causal
    shape = read_shape(config, "benchmark")
    sizes = run_sizes(shape, state.tensor_size, [batch])
    compiled = shape if settings.compile else None
    choice = choose_compute(settings.attention, settings.kernels, settings.recompute, sizes, device, dtype, compiled)
    say(str(choice))
    rivals = []
    for compile in (False, True)[: 1 + settings.compile]:
        compute = dataclasses.replace(choice.compute, compile=compile)
        mine, flops = contenders.ours(config, work, settings.micro_sequences, compute, state, device, dtype)
        rivals.append(mine)
    if settings.against:
        peer = contenders.Peer(settings.peer_attention, settings.peer_compile, device, dtype)
        rivals.append(contenders.transformers_padded(config, work, settings.peer_batch, peer))
        rivals.append(contenders.transformers_packed(config, work, settings.micro_sequences, peer))
    rate = matrix_rate(device, dtype)
    figures = take_turns(rivals, settings.rounds, device, say)
    return {
        "settings": dataclasses.asdict(settings),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": meter.device_name(device),
        "threads": torch.get_num_threads(),
        "versions": meter.versions(),
        "attention": choice.attention,
        "kernels": choice.kernels,
        "documents": len(work.documents),
        "tokens": work.tokens,
        "flops_per_step": flops,
        "matrix_flops_per_second": rate,
        "contenders": [_plain(one, figures[0], work.tokens, flops, rate * state.tensor_size) for one in figures],
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table, a row per contender and measurement; `times` is the first's speed over this one's."""
    headers = ["objective", "dtype", "contender", "tokens/s", "times", "ms per step", "GiB per step", "TFLOP/s"]
    rows = [
        (
            result["settings"]["objective"],
            result["settings"]["dtype"],
            row["name"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['times_as_fast']:.2f}",
            f"{1e3 * row['seconds']:,.0f}",
            "" if row["bytes"] is None else f"{row['bytes'] / 2**30:.2f}",
            f"{row['flops_per_second'] / 1e12:,.3f}",
            f"{row['share_of_matrix_rate']:.1%}",
        )
        for result in results
        for row in result["contenders"]
    ]
    return Table([*headers, "of a product's"], rows, align="lllr").markdown()


def write_json(path: Path, results: list[dict[str, Any]]) -> None:
    write_whole(path, json.dumps(results, indent=1) + "\n")


def _plain(one: Figures, first: Figures, tokens: int, flops: int, rate: float) -> dict[str, Any]:
    """Return figures; ratios are medians over rounds, as adjacent steps are most comparable."""
    return {
        "name": one.contender.name,
        "seconds": one.median,
        "all_seconds": one.seconds,
        "tokens_per_second": tokens / one.median,
        "positions": one.contender.positions,
        "times_as_fast": statistics.median(b / a for a, b in zip(first.seconds, one.seconds, strict=True)),
        "bytes": one.bytes,
        "flops_per_second": flops / one.median,
        "share_of_matrix_rate": flops / one.median / rate,
    }


def _check(settings: Measurement, faults: Faults) -> None:
    of_peer = {"peer_attention": settings.peer_attention != "sdpa", "peer_compile": settings.peer_compile}
    for key in (key for key, given in of_peer.items() if given and not settings.against):
        faults.add(key, "requires --against transformers")
    if settings.sequence_parallel and settings.tensor == 1:
        faults.add("sequence_parallel", "requires --tensor above 1")
    if settings.corpus and settings.full:
        faults.add("full", "excludes --corpus; set only one of them")
    if settings.sequence_parallel and settings.sequence_length % settings.tensor:
        faults.add(
            "sequence_parallel",
            f"{settings.sequence_length} positions are not divisible by {settings.tensor} ranks",
        )
    if settings.against and settings.tensor > 1:
        faults.add("against", "transformers' model runs on one rank; compare with --tensor 1")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks != settings.tensor:
        faults.add(
            "tensor",
            f"{settings.tensor} differs from the {ranks} ranks started: "
            "torchrun --nproc_per_node N tools/benchmark.py train --tensor N",
        )


def _join(settings: Measurement) -> tuple[ParallelState, torch.device]:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # for all contenders, as in training
    if settings.tensor == 1:
        return ParallelState(), device
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return ParallelState.create(settings.tensor, settings.sequence_parallel), device


def _silent(_: str) -> None:
    pass
