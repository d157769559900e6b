"""Study files of tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests.evaluation.small_tasks import write_small_tasks
from tests.injections.runs import write_run_file

ARMS: dict[str, Any] = {
    "detour": {},
    "control": {"control": 0.3},
    "control2": {"control": 0.3, "seed_offset": 100, "evaluate": False},
    "decay_frozen": {"set": {"phases.decay.freeze": ["embeddings", "low"]}},
}
CRITERIA = {
    "helps": "detour > control on mean of tasks, p < 0.05",
    "drifts": "drift ratio of low > 2, p < 0.05",
    "loss": "control > detour on loss",
}


def write_study(folder: Path, corpus: Any, **changes: Any) -> Path:
    """Write FOLDER/study.yaml and its run file; return it. `changes` replace its keys."""
    run = yaml.safe_load(write_run_file(folder / "run.yaml", corpus.prefix, corpus.tokenizer).read_text())
    run["deepspeed"] = str(Path(__file__).parents[2] / "ds_configs" / "zero2_fp32_cpu.json")
    run["phases"][1]["freeze"] = []
    run["model"]["config"]["max_position_embeddings"] = 256  # tokens that hold a needle
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    content = {
        "name": "tiny",
        "folder": str(folder / "study"),
        "run": "run.yaml",
        "arms": ARMS,
        "seeds": [1, 2],
        "analyses": {
            "drift": {
                "texts": {"files": [str(corpus.jsonl)], "count": 20, "draws": [1, 2]},
                "noise": "control2",
            },
        },
        "criteria": CRITERIA,
    }
    if "evaluation" not in changes:
        tasks = write_small_tasks(folder / "tasks")
        names = [tasks["classification"], tasks["multi-label"]]
        content["evaluation"] = {
            "data": str(folder / "tasks"),
            "tasks": [str(folder / "tasks" / f"{name}.yaml") for name in names],
            "set": {"epochs": 1, "max_length": 24, "train_examples": 32},
            "seeds": 2,
        }
    content |= {key: value for key, value in changes.items() if value is not None}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
