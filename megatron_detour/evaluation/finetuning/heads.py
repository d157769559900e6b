"""A pretrained encoder with a new head for a task: the model, its optimiser and its loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.examples import Dataset
from megatron_detour.evaluation.finetuning.encode import IGNORED, Example
from megatron_detour.evaluation.finetuning.protocol import Settings
from megatron_detour.evaluation.finetuning.span import SpanTagger
from megatron_detour.evaluation.models import opening

PROBLEMS = {
    "classification": "single_label_classification",
    "multi-label": "multi_label_classification",
    "similarity": "regression",
}


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
    if kind in PROBLEMS:  # said always, as a fine-tuned folder says that of another task
        options["problem_type"] = PROBLEMS[kind]
    with opening(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if settings.pooling and hasattr(config, "classifier_pooling"):
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
    """The encoder of a folder with a head that no task has trained."""
    options |= {"local_files_only": True, "dtype": torch.float32, "ignore_mismatched_sizes": True}
    with opening(folder):
        network, loading = kind.from_pretrained(folder, output_loading_info=True, **options)
    # transformers fills what is missing with random numbers: right for a new head, never for the encoder
    own = f"{network.base_model_prefix}." if network.base_model is not network else ""
    new = {name for name in loading["missing_keys"] if "pooler" not in name}
    new |= {name for name, *_ in loading["mismatched_keys"]}
    if missing := sorted(name for name in new if name.startswith(own)):
        raise DetourError(
            f"{folder}: {len(missing)} weights of the encoder are missing or of another size, {missing[0]} first"
        )
    of_head = {name for name, _ in network.named_parameters() if not name.startswith(own)}
    if own and any(name not in loading["missing_keys"] and not name.startswith("head.") for name in of_head):
        return _with_fresh_head(kind, network)
    return network


def _with_fresh_head(kind: Any, tuned: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The folder is of a model that was fine-tuned: its classifier, and the layer before it, are another task's."""
    fresh = kind.from_config(tuned.config, dtype=torch.float32)
    fresh.base_model.load_state_dict(tuned.base_model.state_dict())
    return fresh


def pretrained_part(network: nn.Module) -> transformers.PreTrainedModel:
    return network.encoder if isinstance(network, SpanTagger) else network.base_model


def optimizer_of(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW without decay on norms and biases; the head, everything outside the encoder, may have its own rate."""
    encoder = {id(parameter) for parameter in pretrained_part(network).parameters()}
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
