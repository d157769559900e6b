"""A pretrained encoder with a new head for a task, and its optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.examples import Dataset
from megatron_detour.evaluation.finetuning.attention import use_best_attention
from megatron_detour.evaluation.finetuning.protocol import FinetuneSettings
from megatron_detour.evaluation.models import opening


def open_model(folder: Path, dataset: Dataset, settings: FinetuneSettings) -> nn.Module:
    """Load a pretrained encoder with a new head for the task, in fp32. Raises DetourError if the folder has none."""

    def load(auto_class: str, **options: Any) -> transformers.PreTrainedModel:
        with opening(folder):
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        if settings.pooling and hasattr(config, "classifier_pooling"):
            options["classifier_pooling"] = settings.pooling  # released ModernBERT models differ here
        network = _pretrained(getattr(transformers, auto_class), folder, **options)
        if settings.head == "linear" and network.base_model is not network:
            if not isinstance(getattr(network, "head", None), nn.Module):
                raise DetourError(
                    f"{folder}: this model type has no dense layer for head=linear to remove; use head=transformers"
                )
            network.head = nn.Identity()
        use_best_attention(network)
        return network

    return dataset.task.kind.with_head(settings.ner_head).build_model(load, dataset.labels)


def _pretrained(auto_class: Any, folder: Path, **options: Any) -> transformers.PreTrainedModel:
    """Load the folder's encoder with an untrained head."""
    options |= {"local_files_only": True, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    with opening(folder):
        network, loading = auto_class.from_pretrained(folder, output_loading_info=True, **options)
    # transformers initializes missing weights randomly: right for a new head, never for the encoder
    own = f"{network.base_model_prefix}." if network.base_model is not network else ""
    new = {name for name in loading["missing_keys"] if "pooler" not in name}
    new |= {name for name, *_ in loading["mismatched_keys"]}
    if missing := sorted(name for name in new if name.startswith(own)):
        raise DetourError(
            f"{folder}: {len(missing)} encoder weights are missing or have the wrong shape, {missing[0]} first"
        )
    head = {name for name, _ in network.named_parameters() if not name.startswith(own)}
    trained_head = any(name not in loading["missing_keys"] and not name.startswith("head.") for name in head)
    if own and (trained_head or getattr(network.base_model, "pooler", None) is not None):
        return _with_fresh_head(auto_class, network)
    return network


def _with_fresh_head(auto_class: Any, tuned: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Replace a head that belongs to another task, and a pooler, which pretraining here drops from a start model."""
    torch.manual_seed(torch.initial_seed())  # models with and without a pooler get the same new weights
    fresh = auto_class.from_config(tuned.config, dtype=torch.float32)
    pooler = {name: weight for name, weight in fresh.base_model.state_dict().items() if name.startswith("pooler.")}
    fresh.base_model.load_state_dict(tuned.base_model.state_dict() | pooler)
    return fresh


def build_optimizer(network: nn.Module, settings: FinetuneSettings) -> torch.optim.Optimizer:
    """Build AdamW without weight decay on norms and biases; the head (all outside the encoder) may have its own lr."""
    encoder = {id(parameter) for parameter in network.base_model.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        rate = settings.learning_rate
        if settings.head_learning_rate and id(parameter) not in encoder:
            rate = settings.head_learning_rate
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]
    )
