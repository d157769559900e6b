"""The validation of a run, applied to any model: the loss on its held-out text under its fixed masks."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_detour.checkpoint.huggingface import load_model
from megatron_detour.checkpoint.source import Source
from megatron_detour.config import RunConfig
from megatron_detour.errors import DetourError
from megatron_detour.evaluation.models import check_model
from megatron_detour.model.families import read_shape
from megatron_detour.parallel.state import ParallelState
from megatron_detour.tokenizer.vocabulary import find_tokenizer, load_vocabulary
from megatron_detour.training.validation import Validation

MLM_LOSS = "val_mlm_loss"


def held_out_figures(model: Path, run: RunConfig) -> dict[str, float]:
    """Return what training under this run file would write of the model at a validation, by the names of metrics.jsonl.

    MLM_LOSS is in nats per masked token. The model is a folder that training could start from, in fp32. Raises
    DetourError for any other, for a run without validation, and for corpora of another tokenizer.
    """
    if not run.validation.corpora:
        raise DetourError(
            f"run {run.name}: no validation.corpora, so that there is no held-out text to measure a loss on"
        )
    check_model(model, flag="")
    source = Source(str(model))
    network = load_model(source, read_shape(source.config(), str(model)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = run.data.sequence_length  # of a micro-batch
    validation = Validation(run, load_vocabulary(model), find_tokenizer(model), tokens, ParallelState(), device)
    return validation(network.to(device))
