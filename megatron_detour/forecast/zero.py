"""The DeepSpeed file as a forecast needs it, and how ZeRO-2 shares out what it holds. No torch here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError

REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's default
ALIGNMENT = 2  # elements; a partition starts at a multiple of it
FROM_RUN_FILE = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.micro_sequences",
    "gradient_accumulation_steps": "batch",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "phases",
}
REFUSED = {
    "round_robin_gradients": "checkpoints are read from partitions in the parameters' order",
    "overlap_comm": "it has given wrong gradients in several releases",
    "offload_optimizer": "checkpoints are read from the optimiser on the device",
}


@dataclass(frozen=True)
class Zero2:
    bf16: bool
    reduce_bucket: int = REDUCE_BUCKET  # elements

    @property
    def item_bytes(self) -> int:
        """Of a weight and of an activation."""
        return 2 if self.bf16 else 4

    @classmethod
    def of(cls, raw: dict[str, Any]) -> Zero2:
        bucket = raw["zero_optimization"].get("reduce_bucket_size", REDUCE_BUCKET)
        return cls(bool(raw.get("bf16", {}).get("enabled")), int(bucket))


def faults_of(path: str) -> tuple[Zero2 | None, list[str]]:
    """What a file of ds_configs/ says, or None with every reason why a run refuses it."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, [f"deepspeed: {path}: there is no such file; ds_configs/ has two"]
    except OSError as error:
        return None, [f"deepspeed: {path}: cannot be read: {error.strerror}"]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        return None, [f"{path}: not a JSON file: {error}"]
    if not isinstance(raw, dict):
        return None, [f"{path}: a DeepSpeed file is a JSON object"]
    faults = [
        f"{path}: remove {key}; it follows from {home} in the run file"
        for key, home in FROM_RUN_FILE.items()
        if key in raw
    ]
    zero = raw.get("zero_optimization", {})
    if zero.get("stage") != 2:
        faults.append(f"{path}: zero_optimization.stage is {zero.get('stage')}; this recipe runs under ZeRO-2: set 2")
    faults += [f"{path}: remove zero_optimization.{key}: {why}" for key, why in REFUSED.items() if zero.get(key)]
    if raw.get("fp16", {}).get("enabled"):
        faults.append(f"{path}: fp16 is not supported; use bf16 or fp32")
    if raw.get("bf16", {}).get("enabled") and not raw["bf16"].get("check_grad_overflow"):
        faults.append(f"{path}: set bf16.check_grad_overflow to true, or gradients that are no numbers are applied")
    return (None if faults else Zero2.of(raw)), faults


def read(path: str) -> Zero2:
    """Raises DetourError with the first reason why a run refuses the file."""
    zero, faults = faults_of(path)
    if zero is None:
        raise DetourError(faults[0])
    return zero


def partition(groups: tuple[int, ...], data_size: int) -> int:
    """Elements that a rank holds of parameter groups of these sizes: each is filled up and cut into equal parts."""
    unit = ALIGNMENT * data_size
    return sum(math.ceil(group / unit) * unit // data_size for group in groups)
