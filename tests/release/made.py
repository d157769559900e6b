"""The folder of a run of a tiny model as training writes it, made without training: checkpoints, plan, figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from megatron_detour.checkpoint import huggingface, store
from megatron_detour.checkpoint.huggingface import Source
from megatron_detour.checkpoint.state import TrainingState
from megatron_detour.config import RunConfig, from_dict
from megatron_detour.data.manifest import read_manifest
from megatron_detour.model.families import read_shape
from megatron_detour.parallel.state import ParallelState
from megatron_detour.plan import Plan
from megatron_detour.run_directory import add_session, claim
from megatron_detour.tokenizer.vocabulary import load_vocabulary
from tests.conftest import BuiltCorpus

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "local_attention": 32,
    "max_position_embeddings": 512,
}
STEP_TOKENS = 8 * 64
PHASES = [
    {
        "name": "detour",
        "objective": "clm",
        "tokens": "4 steps",
        "learning_rate": {"peak": 2e-4, "warmup": STEP_TOKENS},
        "freeze": ["embeddings"],
    },
    {
        "name": "decay",
        "objective": "mlm",
        "mask_rate": 0.15,
        "tokens": "2 steps",
        "learning_rate": {"peak": 2e-4, "shape": "1-sqrt", "end": 2e-5},
    },
]
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}


def make_run(
    folder: Path,
    corpus: BuiltCorpus,
    steps: tuple[int, ...],
    sessions: tuple[int, ...] = (0,),
    phases: list[dict[str, Any]] = PHASES,
    model: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
) -> Path:
    """A run with checkpoints after these steps, its sessions beginning after those; returns the folder.

    `changes` are keys of config.json.
    """
    raw = {
        "name": "tiny",
        "folder": str(folder),
        "model": model or {"config": SIZES, "tokenizer": str(corpus.tokenizer)},
        "data": {"corpora": [{"prefix": corpus.prefix}], "sequence_length": 64},
        "batch": {"sequences": 8},
        "phases": phases,
        "deepspeed": "ds_configs/zero2_bf16.json",
        "validation": {"corpora": [{"prefix": corpus.prefix}], "sequences": 4},
    }
    config = from_dict(raw)
    plan = Plan.from_config(config)
    folder.mkdir(parents=True)
    claim(folder, config, plan)
    for start in sessions:
        add_session(folder, _session(start), _facts(corpus))
    last = max(steps)
    lines = [json.dumps(_record(plan, number)) for number in range(last + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    weights = scaled_weights(corpus.tokenizer, changes)
    for step in steps:
        target = store.checkpoint_folder(folder / "checkpoints", step)
        write_checkpoint(target, corpus.tokenizer, weights, _run_state(config, plan, step, corpus), changes)
    return folder


def tiny_config(tokenizer: Path, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    return huggingface.fresh_config(SIZES | (changes or {}), load_vocabulary(tokenizer))


def scaled_weights(tokenizer: Path, changes: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """Full tensors large enough that a wrong window or rotation shows in the logits."""
    model = read_shape(tiny_config(tokenizer, changes), "tests").build(ParallelState())
    found = {}
    for name in model.shape.sizes:
        full = model.initial_weight(name, 3)
        found[name] = 5 * full if full.dim() > 1 else full + 0.1 * torch.sin(torch.arange(len(full)))
    return found


def write_checkpoint(folder: Path, tokenizer: Path, weights, run_state: dict[str, Any], changes=None) -> None:
    def write(aside: Path) -> None:
        config, source = tiny_config(tokenizer, changes), Source(str(tokenizer))
        huggingface.write_model(aside, config, source, load_vocabulary(tokenizer), weights)
        huggingface.write_checkpoint(aside, TrainingState(), run_state)

    store.publish(folder, write)


def _run_state(config: RunConfig, plan: Plan, step: int, corpus: BuiltCorpus) -> dict[str, Any]:
    done = plan.step(step) if step else None
    return {
        "format": 2,
        "step": step,
        "total_steps": plan.total_steps,
        "tokens": done.tokens if done else 0,
        "phase": done.phase.name if done else None,
        "ranks": 2,
        "tensor_parallel": 1,
        "dtype": "bfloat16",
        "guard": {},
        "trajectory": config.trajectory(),
        "corpora": {corpus.prefix: read_manifest(corpus.prefix).files["bin"]["sha256"]},
        "versions": VERSIONS,
    }


def _session(start: int) -> dict[str, Any]:
    return {
        "started": "2026-03-02T09:14:05Z",
        "step": start,
        "ranks": 2 if start == 0 else 4,
        "tensor_parallel": 1,
        "device": "NVIDIA H100 80GB HBM3",
        "host_cores": 16,
        "attention": "flash2",
        "kernels": "triton",
        "recompute": "none",
        "dtype": "bfloat16",
        "passed_over": [],
    }


def _facts(corpus: BuiltCorpus) -> dict[str, Any]:
    manifest = read_manifest(corpus.prefix)
    counted = {"prefix": corpus.prefix, "weight": 1.0, "documents": manifest.documents, "tokens": manifest.tokens}
    return {"versions": VERSIONS, "model": {}, "corpora": [counted], "validation_corpora": [counted]}


def _record(plan: Plan, number: int) -> dict[str, Any]:
    figures = {"val_mlm_loss": 6.0 - number / 4, "val_mlm_accuracy": 0.1 + number / 50, "val_clm_loss": 5.5}
    if not number:
        return {"step": 0, "tokens": 0, **figures}
    step = plan.step(number)
    record = {
        "step": number,
        "tokens": step.tokens,
        "phase": step.phase.name,
        "objective": step.phase.objective.name,
        "loss": 3.0,
        "lr": step.learning_rate,
        "grad_norm": 1.0,
        "sequences": step.sequences,
        "padding_share": 0.05,
        "seconds": 1800.0,
    }
    return record | (figures if step.ends_phase else {})
