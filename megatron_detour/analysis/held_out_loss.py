"""The validation of a run, applied to any model: the loss on its held-out text under its fixed masks."""

from __future__ import annotations

from pathlib import Path

from megatron_detour.checkpoint.huggingface import load_model
from megatron_detour.checkpoint.source import Source
from megatron_detour.config import RunConfig
from megatron_detour.evaluation.models import check_model
from megatron_detour.model.families import read_shape
from megatron_detour.training.validation import Validation

MLM_LOSS = "val_mlm_loss"


def held_out_figures(model: Path, run: RunConfig) -> dict[str, float]:
    """Return what training under this run file would write of the model at a validation, by the names of metrics.jsonl.

    MLM_LOSS is in nats per masked token. The model is a folder that training could start from, in fp32. Raises
    DetourError for any other, for a run without validation, and for corpora of another tokenizer.
    """
    check_model(model, flag="")
    validation = Validation.alone(run, model)
    source = Source(str(model))
    network = load_model(source, read_shape(source.config(), str(model)))
    return validation(network.to(validation.device))
