"""A similarity score of two texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from megatron_detour.evaluation.metrics import PEARSON, SPEARMAN
from megatron_detour.evaluation.task_types.base import Record, TaskType
from megatron_detour.evaluation.task_types.encode import Encoder, Example, Feature

if TYPE_CHECKING:
    from torch import nn


class Scale(NamedTuple):
    """Mean and sd of the training scores, which are standardized for training."""

    mean: float
    deviation: float


class Similarity(TaskType):
    """Examples {"text": str, "text_b": str, "score": float}; predictions are scores."""

    name = "similarity"
    fields = ("text", "text_b", "score")
    answer = "score"
    metrics = (PEARSON, SPEARMAN)
    always_pairs = True
    problem_type = "regression"

    def read(self, record: Record) -> Example:
        return record.texts() | {"score": record.number("score")}

    def fit(self, train: Sequence[Example]) -> Scale:
        scores = np.array([example[self.answer] for example in train], dtype=np.float64)
        return Scale(float(scores.mean()), float(scores.std()) or 1.0)

    def target(self, example: Example, encoder: Encoder) -> float:
        return (example[self.answer] - encoder.fitted.mean) / encoder.fitted.deviation

    def build_model(self, load: Callable[..., nn.Module], labels: tuple[str, ...]) -> nn.Module:
        return load(self.auto_class, num_labels=1, problem_type=self.problem_type)

    def decode(self, features: list[Feature], outputs: np.ndarray, encoder: Encoder) -> list[float]:
        """outputs: [n, 1]."""
        scale: Scale = encoder.fitted
        return [float(score) for score in outputs.reshape(-1) * scale.deviation + scale.mean]
