"""The file of ds_configs/ that a run file names: ZeRO-2, and nothing that the run file has to say. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError, told

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


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """Raises DetourError with every reason why a run refuses the file."""
    raw, faults = look_at_deepspeed_config(path)
    if raw is None:
        raise DetourError(told(faults))
    return raw


def look_at_deepspeed_config(path: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The file's content, or None with every reason why a run refuses it."""
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
    return (None if faults else raw), faults
