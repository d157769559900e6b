"""Set up process groups and wrap the model in DeepSpeed's ZeRO-2."""

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
from megatron_detour.config.deepspeed import is_bf16
from megatron_detour.errors import DetourError
from megatron_detour.parallel.state import COLLECTIVE_TIMEOUT, ParallelState
from megatron_detour.parallel.zero import Zero, deepspeed_settings
from megatron_detour.training.freezing import parameter_groups, skip_frozen

RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # between the first rank's start and the last one's


def training_dtype(deepspeed_config: dict[str, Any]) -> torch.dtype:
    """Return the dtype of weights and activations under this DeepSpeed file."""
    return torch.bfloat16 if is_bf16(deepspeed_config) else torch.float32


def start_distributed(config: RunConfig) -> tuple[ParallelState, torch.device]:
    """Join the ranks and create the groups. Raise DetourError if ranks are missing or outnumber the GPUs."""
    ranks = int(os.environ.setdefault("WORLD_SIZE", "1"))
    port = "29500" if ranks > 1 else "0"  # 0: any free port
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port)):
        os.environ.setdefault(name, default)
    _quiet_deepspeed()
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= devices:
            raise DetourError(f"more than {devices} ranks on a machine with {devices} GPUs; start one rank per GPU")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and documents have many
    _join(get_accelerator().communication_backend_name())
    deepspeed.init_distributed(verbose=False, dist_init_required=False)
    return ParallelState.create(config.parallel.tensor, config.parallel.sequence), device


def _join(backend: str) -> None:
    """Initialize torch.distributed. Raise DetourError when other ranks do not join in time."""
    try:
        store, rank, ranks = next(dist.rendezvous("env://", timeout=RENDEZVOUS_TIMEOUT))
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=COLLECTIVE_TIMEOUT)
        store.set(f"here/{rank}", "")
        store.wait([f"here/{peer}" for peer in range(ranks)], RENDEZVOUS_TIMEOUT)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
        if "EADDRINUSE" in str(error):
            raise DetourError(
                f"port {port} is in use, perhaps by another run: pass --master_port to the launcher, or set MASTER_PORT"
            ) from None
        raise DetourError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} timed out waiting for the other ranks at "
            f"{address}:{port}: {str(error).partition(chr(10))[0]}"
        ) from None


def create_engine(model: nn.Module, config: RunConfig, deepspeed_config: dict[str, Any], state: ParallelState) -> Zero:
    """Wrap the model in ZeRO-2 with the run file's optimizer; fp32 gradients are summed and clipped over all ranks."""
    import deepspeed

    settings = deepspeed_settings(deepspeed_config) | {
        "train_micro_batch_size_per_gpu": 1,  # both have no effect: the trainer forms the micro-batches
        "gradient_accumulation_steps": 1,
    }
    optimizer = config.optimizer.kind.build(parameter_groups(model, config))
    skip_frozen(optimizer)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=settings, mpu=state, dist_init_required=False
    )
    return Zero(engine, state, config.optimizer.clip, config.optimizer.kind.states, config.optimizer.ema)


def _quiet_deepspeed() -> None:
    """Silence DeepSpeed's information and warnings, also about our optimizer; errors are still logged."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if not torch.cuda.is_available():
        # Otherwise the first start compiles a shared-memory collective for half a minute; gloo is as good.
        __compatible_ops__["deepspeed_shm_comm"] = False
