"""Any number of labels per text or pair of texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_detour.evaluation.metrics import EXACT_MATCH, MACRO_F1, MICRO_F1, WEIGHTED_F1
from megatron_detour.evaluation.task_types.base import Record, TaskType
from megatron_detour.evaluation.task_types.encode import Encoder, Example, Feature

if TYPE_CHECKING:
    from torch import Tensor


class MultiLabel(TaskType):
    """Examples {"text": str, "text_b": str | None, "labels": [str]}; predictions are lists of labels."""

    name = "multi-label"
    fields = ("text", "text_b", "labels")
    answer = "labels"
    metrics = (MACRO_F1, WEIGHTED_F1, MICRO_F1, EXACT_MATCH)
    label_noun = "label"
    problem_type = "multi_label_classification"

    def read(self, record: Record) -> Example:
        example, values = record.texts(), record.items("labels")
        record.refuse_vectors(values)
        return example | {"labels": record.once("labels", [record.as_label("labels", value) for value in values])}

    def labels_of(self, example: Example) -> set[str]:
        return set(example["labels"])

    def target(self, example: Example, encoder: Encoder) -> list[float]:
        return [float(label in example["labels"]) for label in encoder.labels]

    def loss(self, labels: tuple[str, ...], train: list[Example]) -> Callable[..., Tensor]:
        """Return binary cross-entropy with positives weighted by negatives / positives of the training split."""
        import torch

        counts = torch.tensor([sum(label in example["labels"] for example in train) for label in labels])
        weight = (len(train) - counts) / counts.clamp(min=1)

        def weighted(outputs: Any, targets: Tensor, **_: Any) -> Tensor:
            logits = outputs.logits.float()
            return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight.to(logits))

        return weighted

    def decode(self, features: list[Feature], outputs: np.ndarray, encoder: Encoder) -> list[list[str]]:
        """outputs: logits [n, labels]; labels with probability 0.5 or more are predicted."""
        return [[encoder.labels[i] for i in np.flatnonzero(row > 0)] for row in outputs]
