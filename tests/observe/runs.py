"""Folders of runs as training writes them, with invented figures."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

SEQUENCE_LENGTH = 1024
SEQUENCES = 64
TOKENS_PER_STEP = SEQUENCE_LENGTH * SEQUENCES
# name, objective, mask rate, steps and, where a fifth is there, what else the plan says of the phase
PhaseSketch = tuple[Any, ...]
THREE_PHASES: list[PhaseSketch] = [
    ("warm-up", "mlm", 0.3, 60),
    ("detour", "clm", None, 180),
    ("decay", "mlm", 0.15, 60),
]
FREEZE = {"freeze": ["embeddings", "layers.0-7"]}
FIVE_PHASES: list[PhaseSketch] = [
    ("a very long name of the first phase", "mlm", 0.3, 40),
    ("x", "clm", None, 100, {**FREEZE, "sequences": 8}),
    ("$\\frac", "clm", None, 60, {"freeze": ["embeddings"]}),
    ("anneal", "mlm", 0.15, 12, FREEZE),
    ("final decay", "mlm", 0.3, 88, {"mask_rate_end": 0.1}),
]
TWO_PHASES: list[PhaseSketch] = [("detour", "clm", None, 120), ("decay", "mlm", 0.3, 80)]


def make_plan(name: str, phases: list[PhaseSketch]) -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    step, tokens = 1, 0
    for title, objective, mask_rate, steps, *more in phases:
        entry = {
            "name": title,
            "objective": objective,
            "mask_rate": mask_rate,
            "mask_rate_end": None,
            "whole_word_masking": False,
            "first_step": step,
            "steps": steps,
            "start_tokens": tokens,
            "sequence_length": SEQUENCE_LENGTH,
            "sequences": SEQUENCES,
            "batch_warmup": None,
            "freeze": [],
            "optimizer_state": "keep",
            "corpora": [{"prefix": "data/web", "weight": 1.0}],
            "learning_rate": {"peak": 5e-4, "warmup_tokens": 655_360, "shape": "cosine", "end": 5e-5},
            **(more[0] if more else {}),
        }
        entry["tokens"] = sum(step_sequences(entry, index) for index in range(steps)) * entry["sequence_length"]
        step, tokens = step + steps, tokens + entry["tokens"]
        entries.append(entry | {"end_tokens": tokens})
    return {"name": name, "total_steps": step - 1, "total_tokens": tokens, "phases": entries}


def step_sequences(phase: dict[str, Any], index: int) -> int:
    """The sequences of the phase's step of this index: a batch that warms up grows by a step each step."""
    warmup = phase["batch_warmup"]
    return min(phase["sequences"], warmup["from"] + index * warmup["increment"]) if warmup else phase["sequences"]


def make_records(plan: dict[str, Any], done: int, validate_every: int) -> list[dict[str, Any]]:
    noise = random.Random(7)
    records: list[dict[str, Any]] = []
    if validate_every:
        records.append({"step": 0, "tokens": 0, **validation(0.0, clm=False)})
    for phase in plan["phases"]:
        tokens = phase["start_tokens"]
        for index in range(phase["steps"]):
            step = phase["first_step"] + index
            if step > done:
                return records
            sequences = step_sequences(phase, index)
            tokens += sequences * phase["sequence_length"]
            record = trained(phase, index, step, noise) | {"tokens": tokens, "sequences": sequences}
            if validate_every and (step % validate_every == 0 or index == phase["steps"] - 1):
                record |= validation(step / plan["total_steps"], phase["objective"] == "clm")
            records.append(record)
    return records


def trained(phase: dict[str, Any], index: int, step: int, noise: random.Random) -> dict[str, Any]:
    clm, share = phase["objective"] == "clm", index / phase["steps"]
    loss = 3.4 + 6.0 * math.exp(-9 * share) if clm else 2.1 + 0.9 * math.exp(-7 * share)
    warm = min(1.0, (index + 1) / 10)
    record = {
        "step": step,
        "phase": phase["name"],
        "objective": phase["objective"],
        "loss": loss + noise.gauss(0, 0.06),
        "lr": warm * (5e-5 + 4.5e-4 * 0.5 * (1 + math.cos(math.pi * share))),
        "grad_norm": 0.8 + noise.gauss(0, 0.05),
        "labelled_tokens": 60_000,
        "padding_share": 0.01,
        "data_crc": 1_000_003 * step % 2**32,
        "tokens_per_second": (9_000 if step == 1 else 152_000) * noise.uniform(0.96, 1.02),
        "seconds": 7.3 if step == 1 else 0.43,
        "data_wait_seconds": 0.004,
        "memory_bytes": 41_300_000_000,
        "model_tflops": 160.0,
        "mfu": 0.41 + noise.gauss(0, 0.005),
    }
    if not clm:
        first, last = phase["mask_rate"], phase["mask_rate_end"]
        record["mask_rate"] = first if last is None else first + (last - first) * share
    return record


def validation(share: float, clm: bool) -> dict[str, float]:
    mlm = 2.61 - 0.35 * share + (0.5 if clm else 0)
    return {
        "val_mlm_loss": mlm,
        "val_mlm_accuracy": 0.512 + 0.06 * share - (0.08 if clm else 0),
        "val_mlm_bits_per_byte": mlm / 3,
        "val_clm_loss": 3.6 + 5.8 * math.exp(-5 * share),
        "val_clm_bits_per_byte": (3.6 + 5.8 * math.exp(-5 * share)) / 3,
    }


ENVIRONMENT = {
    "sessions": [
        {
            "started": "2026-03-02T09:14:05+00:00",
            "step": 0,
            "ranks": 4,
            "tensor_parallel": 2,
            "device": "NVIDIA H200",
            "host_cores": 64,
            "attention": "flash2",
            "kernels": "triton",
            "recompute": "none",
            "dtype": "bfloat16",
            "ended": "SIGTERM",
        },
        {
            "started": "2026-03-02T18:40:51+00:00",
            "step": 100,
            "ranks": 4,
            "tensor_parallel": 2,
            "device": "NVIDIA H200",
            "host_cores": 64,
            "attention": "flash2",
            "kernels": "triton",
        },
    ],
    "versions": {"torch": "2.11.0", "deepspeed": "0.19.4", "transformers": "5.0.1", "numpy": "2.2.0"},
    "model": {"parameters": 149_655_232, "hidden_size": 768, "layers": 22},
    "corpora": [
        {
            "prefix": "data/web",
            "weight": 0.7,
            "documents": 1_204_113,
            "tokens": 983_120_442,
            "sha256": "cd" * 32,
            "tokenizer_sha256": "ab" * 32,
            "sources": [{"path": "web-<b>0</b>.jsonl.gz", "bytes": 2_400_112_221}, {"path": "web-1.jsonl", "bytes": 7}],
        },
    ],
    "validation_corpora": [
        {
            "prefix": "data/held-out",
            "weight": 1.0,
            "documents": 2000,
            "tokens": 1_500_200,
            "tokenizer_sha256": "ab" * 32,
            "sources": [{"path": "held-out.jsonl", "bytes": 5_200_111}],
        }
    ],
    "unigram_loss": 7.42,
}


def make_run(
    folder: Path,
    phases: list[PhaseSketch] = THREE_PHASES,
    *,
    name: str = "camembert-detour",
    done: int | None = None,
    validate_every: int = 20,
    environment: dict[str, Any] = ENVIRONMENT,
    run_file: str = "seed: 17\nbatch: {sequences: 64}\n",
) -> Path:
    plan = make_plan(name, phases)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    (folder / "run.yaml").write_text(f"name: '{name}'\n{run_file}", encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    write_records(folder, make_records(plan, plan["total_steps"] if done is None else done, validate_every))
    return folder


def write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")


def change_records(folder: Path, changes: dict[int, dict[str, Any]]) -> None:
    """Gives the records of some steps other fields."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    write_records(folder, [record | changes.get(record["step"], {}) for record in records])


def five_phases(folder: Path) -> Path:
    """A run with everything that is hard to draw: long names, a formula, frozen phases, guards, a peak."""
    make_run(folder, FIVE_PHASES, name="n" * 80)
    by_corpus = {f"{key}/{name}": 0.5 for key in ("val_mlm_loss", "val_clm_loss") for name in ("notes", "c" * 120)}
    guards = {20: {"skipped": "the loss is nan", "loss": None, "grad_norm": None}, 21: {"spike": "spike: ..."}}
    change_records(folder, {0: by_corpus, 40: by_corpus, 300: by_corpus, 90: {"loss": 900.0}, **guards})
    return folder
