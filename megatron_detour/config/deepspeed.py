"""The file of ds_configs/ that a run file names: ZeRO-2, and nothing that the run file has to say. No torch here."""

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
    "round_robin_gradients": "checkpoints are read from partitions in the parameters' order",
    "overlap_comm": "it has given wrong gradients in several releases",
    "offload_optimizer": "checkpoints are read from the optimiser on the device",
}
MAPPING, SIZE, FLAG, TYPE = "a mapping", "a whole number above 0", "true or false", "fp32, bf16 or fp16"
NEEDED = {  # what stands in the files of ds_configs/, or is looked at here
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
    """Raises DetourError with every reason why a run refuses the file."""
    raw, faults = look_at_deepspeed_config(path)
    if raw is None:
        raise DetourError(format_faults(faults))
    return raw


def look_at_deepspeed_config(path: str) -> tuple[dict[str, Any] | None, list[str]]:
    """The file's content, or None with every reason why a run refuses it.

    A path ds_configs/NAME that is not here is the package's.
    """
    packaged = path.startswith("ds_configs/") and not Path(path).exists()
    try:
        raw = read_json_object(PACKAGE / path if packaged else path)
    except FileNotFoundError:
        known = "ds_configs/zero2_bf16.json or ds_configs/zero2_fp32_cpu.json"
        return None, [f"deepspeed: {path}: there is no such file; set {known}, which are packaged"]
    except DetourError as fault:
        return None, [f"deepspeed: {fault}"]
    faults = [fault for key, needed in NEEDED.items() if (fault := _fault_of(raw, key, needed))]
    if faults:
        return None, [f"{path}: {fault}" for fault in faults]
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
        faults.append(f"{path}: set bf16.check_grad_overflow to true, or gradients that are NaN are applied")
    return (None if faults else raw), faults


def _fault_of(raw: dict[str, Any], key: str, needed: str) -> str | None:
    section, _, name = key.rpartition(".")
    inside = raw.get(section, {}) if section else raw
    if not isinstance(inside, dict) or name not in inside:  # its section is told, or it is left out
        return None
    value = inside[name]
    good = {
        MAPPING: isinstance(value, dict),
        # DeepSpeed's examples write sizes as 5e8.
        SIZE: type(value) in (int, float) and 0 < value < 2**63 and value == int(value),
        FLAG: isinstance(value, bool),
        TYPE: value in ("fp32", "bf16", "fp16"),
    }[needed]
    return None if good else f"{key} is {json.dumps(value)[:60]}; {needed} is needed"
