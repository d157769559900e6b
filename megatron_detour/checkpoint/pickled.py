"""Weights in torch's pickle files, of which nothing but tensors and plain containers is ever loaded."""

from __future__ import annotations

import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from numpy._core.multiarray import _reconstruct

from megatron_detour.errors import DetourError

NEEDS_CODE = "add_safe_globals"  # what torch advises for a pickle that names anything but tensors and containers
COMPOSER = ("state", "model")  # where Composer keeps the weights, as in ModernBERT's own checkpoints
# Composer keeps the time trained and the state of random numbers beside them: plain values, of which none runs code.
PLAIN = (
    *(timedelta, np.ndarray, np.dtype, np.dtypes.UInt32DType),
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),  # numpy 1 and 2
)


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors by name, mapped from the file. Raise DetourError for a file that needs code, or is damaged."""
    try:
        # torch 1.5 and earlier wrote no zip files, and only zip files can be mapped.
        with torch.serialization.safe_globals([*PLAIN]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of torch's reader, whatever a damaged file makes of it
        if NEEDS_CODE in str(error):
            raise DetourError(
                f"{path}: a pickle file that runs code when it is opened, which is refused; save its weights alone, as "
                "model.safetensors, where you trust it"
            ) from None
        raise DetourError(f"{path}: not a file of weights, or damaged; download or save the model again") from None
    for key in COMPOSER:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise DetourError(f"{path}: it holds no weights by name")
    return {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
