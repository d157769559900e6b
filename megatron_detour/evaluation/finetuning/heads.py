"""A pretrained encoder with a new head for a task: the model, its optimiser and its loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.examples import Dataset
from megatron_detour.evaluation.finetuning.encode import IGNORED, Example
from megatron_detour.evaluation.finetuning.protocol import Settings
from megatron_detour.evaluation.finetuning.span import SpanTagger


def open_model(folder: Path, dataset: Dataset, settings: Settings) -> nn.Module:
    """A pretrained encoder with a new head for the task, in fp32. Raises DetourError for a folder that has none."""
    kind, labels = dataset.task.type, dataset.labels
    if kind == "token-classification" and settings.ner_head == "span":
        return SpanTagger(_pretrained(transformers.AutoModel, folder), entity_types(labels))
    classes = {
        "token-classification": transformers.AutoModelForTokenClassification,
        "multiple-choice": transformers.AutoModelForMultipleChoice,
        "multiple-answer": transformers.AutoModelForMultipleChoice,
    }
    options: dict[str, Any] = {}
    if labels:
        options = {"num_labels": len(labels), "id2label": dict(enumerate(labels))}
        options["label2id"] = {label: i for i, label in enumerate(labels)}
    elif kind == "similarity":
        options = {"num_labels": 1}
    if kind == "multi-label":
        options["problem_type"] = "multi_label_classification"
    if settings.pooling and hasattr(transformers.AutoConfig.from_pretrained(folder), "classifier_pooling"):
        options["classifier_pooling"] = settings.pooling  # released ModernBERTs differ in it
    network = _pretrained(classes.get(kind, transformers.AutoModelForSequenceClassification), folder, **options)
    if settings.head == "linear":
        if not isinstance(getattr(network, "head", None), nn.Module):
            raise DetourError(f"{folder}: its kind of model has no dense layer that head=linear could leave out")
        network.head = nn.Identity()
    return network


def entity_types(tags: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(tag.removeprefix("B-") for tag in tags if tag.startswith("B-"))


def _pretrained(kind: Any, folder: Path, **options: Any) -> transformers.PreTrainedModel:
    try:
        network, loading = kind.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DetourError(f"{folder}: cannot be opened as a model ({reason})") from None
    # transformers fills what is missing with random numbers: right for a new head, never for the encoder
    own = f"{network.base_model_prefix}." if network.base_model is not network else ""
    missing = sorted(name for name in loading["missing_keys"] if name.startswith(own) and "pooler" not in name)
    if missing:
        raise DetourError(f"{folder}: {len(missing)} weights of the encoder are missing, {missing[0]} first")
    return network


def optimizer_of(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW without decay on norms and biases; the head, everything outside the encoder, may have its own rate."""
    pretrained = network.encoder if isinstance(network, SpanTagger) else network.base_model
    encoder = {id(parameter) for parameter in pretrained.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        rate = settings.learning_rate
        if settings.head_learning_rate and id(parameter) not in encoder:
            rate = settings.head_learning_rate
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": of_group, "lr": rate, "weight_decay": decay} for (rate, decay), of_group in groups.items()]
    )


def loss_of(kind: str, labels: tuple[str, ...], train: list[Example]) -> Callable | None:
    """The losses that are not the models' own, of outputs with `logits` and of labels [batch, labels or options]."""
    if kind == "multi-label":
        counts = torch.tensor([sum(label in example["labels"] for example in train) for label in labels])
        weight = (len(train) - counts) / counts.clamp(min=1)  # negatives over positives

        def weighted(outputs: Any, wanted: torch.Tensor, **_: Any) -> torch.Tensor:
            logits = outputs.logits.float()
            return nn.functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight.to(logits))

        return weighted
    if kind == "multiple-choice":

        def one_of(outputs: Any, wanted: torch.Tensor, **_: Any) -> torch.Tensor:
            logits = outputs.logits.float().masked_fill(wanted == IGNORED, -torch.inf)
            return nn.functional.cross_entropy(logits, wanted.argmax(-1))

        return one_of
    if kind == "multiple-answer":

        def each(outputs: Any, wanted: torch.Tensor, **_: Any) -> torch.Tensor:
            there = wanted != IGNORED
            return nn.functional.binary_cross_entropy_with_logits(outputs.logits.float()[there], wanted[there])

        return each
    return None
