"""What environment.json says of a run and of its sessions."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_detour.config import RunConfig
from megatron_detour.data.batches import DocumentMixture
from megatron_detour.data.phase_data import PhaseData
from megatron_detour.model.choose import Choice
from megatron_detour.model.modernbert import ModernBert
from megatron_detour.observe import meter
from megatron_detour.parallel.state import ParallelState
from megatron_detour.training.initial_model import InitialModel
from megatron_detour.training.validation import Validation

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def session_facts(
    step: int, state: ParallelState, device: torch.device, choice: Choice, model: ModernBert
) -> dict[str, Any]:
    """What a session that begins after `step` runs on."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "step": step,
        "ranks": dist.get_world_size(),
        "tensor_parallel": state.tensor_size,
        "device": meter.device_name(device),
        "host_cores": meter.host_cores(),
        "attention": choice.attention,
        "kernels": choice.kernels,
        "recompute": choice.compute.recompute,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "passed_over": choice.skipped,
    }


def run_facts(
    config: RunConfig, start: InitialModel, data: PhaseData, validation: Validation | None, model: ModernBert
) -> dict[str, Any]:
    """What a run trains and reads, and with which versions."""
    first = data.spans[0]
    weights = [corpus.weight for corpus in first.corpora]
    sizes = {key: start.config[key] for key in SIZES}
    corpora: dict[str, dict[str, Any]] = {}
    for span in data.spans:
        for facts in _corpora(span.mixture, [corpus.weight for corpus in span.corpora]):
            corpora.setdefault(facts["prefix"], facts)
    return {
        "versions": meter.versions(),
        "model": {"parameters": sum(torch.Size(size).numel() for size in model.full_sizes().values()), **sizes},
        "corpora": list(corpora.values()),
        "validation_corpora": _corpora(validation.mixture, [c.weight for c in config.validation.corpora])
        if validation
        else [],
        "unigram_loss": validation.unigram_loss(first.mixture, weights) if validation else None,
    }


def _corpora(mixture: DocumentMixture, weights: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "prefix": prefix,
            "weight": weight,
            "documents": manifest.documents,
            "tokens": manifest.tokens,
            "sha256": manifest.files["bin"]["sha256"],
            "tokenizer_sha256": manifest.tokenizer["sha256"],
            **manifest.input_summary(),
        }
        for prefix, weight, manifest in zip(mixture.prefixes, weights, mixture.manifests, strict=True)
    ]
