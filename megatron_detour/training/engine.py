"""DeepSpeed: process groups, ZeRO-2 around the model, and the checks of its configuration file."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_detour.config import RunConfig
from megatron_detour.errors import DetourError, brief
from megatron_detour.parallel.state import COLLECTIVE_TIMEOUT, ParallelState
from megatron_detour.parallel.zero import Zero, deepspeed_settings
from megatron_detour.training.freezing import PhasedAdamW, parameter_groups

RENDEZVOUS = timedelta(minutes=10)  # between the first rank's start and the last one's


def training_dtype(deepspeed_config: dict[str, Any]) -> torch.dtype:
    """The type that weights and activations have under this DeepSpeed file."""
    return torch.bfloat16 if deepspeed_config.get("bf16", {}).get("enabled") else torch.float32


def start_distributed(config: RunConfig) -> tuple[ParallelState, torch.device]:
    """Joins the ranks and makes the groups. Raises DetourError where ranks are missing or more than the GPUs."""
    ranks = int(os.environ.setdefault("WORLD_SIZE", "1"))
    port = "29500" if ranks > 1 else "0"  # 0: any that is free
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        os.environ.setdefault(name, default)
    _quiet_deepspeed()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if config.parallel.tensor > 1:
        # One queue, so that a collective is under way before the product that is to hide it starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= devices:
            raise DetourError(f"more than {devices} ranks were started on a machine of {devices} GPUs; start one a GPU")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    _join(get_accelerator().communication_backend_name())
    deepspeed.init_distributed(verbose=False, dist_init_required=False)
    return ParallelState.create(config.parallel.tensor, config.parallel.sequence), device


def _join(backend: str) -> None:
    """Joins the ranks. Raises DetourError where some do not come; a launcher ends the others before."""
    try:
        store, rank, ranks = next(dist.rendezvous("env://", timeout=RENDEZVOUS))
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT)
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(ranks)], RENDEZVOUS)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error):
            raise DetourError(
                f"port {port} is taken, perhaps by another run: give the launcher --master_port, or set MASTER_PORT"
            ) from None
        raise DetourError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} timed out waiting for the other ranks at "
            f"{address}:{port}: {str(error).partition(chr(10))[0]}"
        ) from None


def create_engine(model: nn.Module, config: RunConfig, deepspeed_config: dict[str, Any], state: ParallelState) -> Zero:
    """Wraps the model in ZeRO-2 with AdamW; fp32 gradients are summed and clipped over all ranks."""
    import deepspeed

    settings = deepspeed_settings(deepspeed_config) | {
        "train_micro_batch_size_per_gpu": config.batch.micro_sequences,
        "gradient_accumulation_steps": 1,
    }
    optimizer = PhasedAdamW(
        parameter_groups(model, config),
        lr=0.0,
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=torch.cuda.is_available() or None,
    )
    refuse_unfit(settings, config.deepspeed)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, mpu=state, dist_init_required=False
    )
    return Zero(engine, state, config.optimizer.clip)


def refuse_unfit(settings: dict[str, Any], file: str) -> None:
    """Raises DetourError where DeepSpeed itself refuses a key or a value of its file, in whichever of its ways."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(dict(settings))
    except (ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:
        cause = brief(error).partition(" For further")[0]
        raise DetourError(f"{file}: DeepSpeed rejects it: {type(error).__name__}: {cause}") from None


def _quiet_deepspeed() -> None:
    """DeepSpeed says at length what nobody asked, and warns of our optimizer; errors still come through."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if not torch.cuda.is_available():
        # Without this the first start compiles a shared-memory collective for half a minute; gloo serves as well.
        __compatible_ops__["deepspeed_shm_comm"] = False
