"""One label per text or pair of texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_detour.evaluation.metrics import ACCURACY, MACRO_F1, MICRO_F1, WEIGHTED_F1
from megatron_detour.evaluation.task_types.base import Record, TaskType
from megatron_detour.evaluation.task_types.encode import Encoder, Example, Feature

if TYPE_CHECKING:
    import numpy as np


class Classification(TaskType):
    """Examples {"text": str, "text_b": str | None, "label": str}; predictions are labels."""

    name = "classification"
    fields = ("text", "text_b", "label")
    answer = "label"
    metrics = (MACRO_F1, WEIGHTED_F1, MICRO_F1, ACCURACY)
    label_noun = "label"
    fewest_labels = 2
    problem_type = "single_label_classification"

    def read(self, record: Record) -> Example:
        return record.texts() | {"label": record.as_label("label", record.value("label"))}

    def decode(self, features: list[Feature], outputs: np.ndarray, encoder: Encoder) -> list[str]:
        """outputs: logits [n, labels]."""
        return [encoder.labels[i] for i in outputs.argmax(-1)]
