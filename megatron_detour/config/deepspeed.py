"""Read and check the DeepSpeed file: ZeRO-2, and no key that the run file sets. Does not import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError, format_faults
from megatron_detour.structured import read_json_object

PACKAGE = Path(__file__).parents[1]  # holds ds_configs/
FROM_RUN_FILE = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.micro_sequences",
    "gradient_accumulation_steps": "batch",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "phases",
}
REFUSED = {
    "round_robin_gradients": "checkpoints need partitions in parameter order",
    "overlap_comm": "several releases compute wrong gradients with it",
    "offload_optimizer": "checkpoints need the optimizer state on the device",
}
MAPPING, SIZE, FLAG, TYPE = "a mapping", "an integer above 0", "true or false", "fp32, bf16 or fp16"
TYPES = {  # of the keys in ds_configs/, and of those checked here
    "zero_optimization": MAPPING,
    "zero_optimization.stage": SIZE,
    "zero_optimization.reduce_bucket_size": SIZE,
    "zero_optimization.allgather_bucket_size": SIZE,
    "zero_optimization.contiguous_gradients": FLAG,
    "zero_optimization.reduce_scatter": FLAG,
    "zero_optimization.overlap_comm": FLAG,
    "bf16": MAPPING,
    "bf16.enabled": FLAG,
    "bf16.check_grad_overflow": FLAG,
    "fp16": MAPPING,
    "fp16.enabled": FLAG,
    "data_types": MAPPING,
    "data_types.grad_accum_dtype": TYPE,
    "communication_data_type": TYPE,
}


def read_deepspeed_config(path: str) -> dict[str, Any]:
    """Return the file's content. Raise DetourError with all its faults."""
    raw, faults = check_deepspeed_config(path)
    if raw is None:
        raise DetourError(format_faults(faults))
    return raw


def check_deepspeed_config(path: str) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the file's content, or None and all its faults.

    A path ds_configs/NAME that does not exist is that of the packaged file.
    """
    packaged = path.startswith("ds_configs/") and not Path(path).exists()
    try:
        raw = read_json_object(PACKAGE / path if packaged else path)
    except FileNotFoundError:
        packaged_files = "ds_configs/zero2_bf16.json or ds_configs/zero2_fp32_cpu.json"
        return None, [f"deepspeed: {path}: no such file; use the packaged {packaged_files}"]
    except DetourError as fault:
        return None, [f"deepspeed: {fault}"]
    faults = [fault for key, needed in TYPES.items() if (fault := _type_fault(raw, key, needed))]
    if faults:
        return None, [f"{path}: {fault}" for fault in faults]
    faults = [
        f"{path}: remove {key}; {run_file_key} in the run file sets it"
        for key, run_file_key in FROM_RUN_FILE.items()
        if key in raw
    ]
    zero = raw.get("zero_optimization", {})
    if zero.get("stage") != 2:
        faults.append(f"{path}: zero_optimization.stage is {zero.get('stage')}; set 2, the only supported stage")
    faults += [f"{path}: remove zero_optimization.{key}: {why}" for key, why in REFUSED.items() if zero.get(key)]
    if raw.get("fp16", {}).get("enabled"):
        faults.append(f"{path}: fp16 is not supported; use bf16 or fp32")
    return (None if faults else raw), faults


def is_bf16(deepspeed_config: dict[str, Any]) -> bool:
    """Return whether weights and activations are bf16 under this DeepSpeed file; fp32 otherwise."""
    return bool(deepspeed_config.get("bf16", {}).get("enabled"))


def _type_fault(raw: dict[str, Any], key: str, needed: str) -> str | None:
    section, _, name = key.rpartition(".")
    inside = raw.get(section, {}) if section else raw
    if not isinstance(inside, dict) or name not in inside:  # the section's fault is reported, or the key is not set
        return None
    value = inside[name]
    valid = {
        MAPPING: isinstance(value, dict),
        # DeepSpeed's examples write sizes as 5e8.
        SIZE: type(value) in (int, float) and 0 < value < 2**63 and value == int(value),
        FLAG: isinstance(value, bool),
        TYPE: value in ("fp32", "bf16", "fp16"),
    }[needed]
    return None if valid else f"{key} must be {needed}, not {json.dumps(value)[:60]}"
