"""Examples as a model reads them: token ids, where words begin, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_detour.errors import DetourError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from megatron_detour.evaluation.task_types.base import TaskType

IGNORED = -100  # of labels: no loss
FILLERS = {"attention_mask": 0, "token_type_ids": 0, "word_starts": -1, "labels": IGNORED}
Example = dict[str, Any]
Feature = dict[str, Any]


@dataclass(frozen=True)
class Encoder:
    """Turns a task's examples into features, and a model's outputs into predictions.

    `fitted` is what the task type learned from the training examples (TaskType.fit).
    """

    kind: TaskType
    labels: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    fitted: Any = None

    def __call__(self, examples: Sequence[Example]) -> list[Feature]:
        """Features in the examples' order; `labels` in the form that the task's loss takes."""
        return self.kind.encode(examples, self)

    def decode(self, features: list[Feature], outputs: np.ndarray) -> list[Any]:
        """Predictions out of a model's outputs, padded to the longest."""
        return self.kind.decode(features, outputs, self)

    def gold(self, examples: Sequence[Example]) -> list[Any]:
        """The right answers in the form of predictions (evaluation/metrics.py)."""
        return [self.kind.gold(example) for example in examples]

    def tokenize(
        self, texts: list[str], second: Sequence[str | None] | None = None, *, offsets: bool = False
    ) -> list[Feature]:
        """A feature per text, or per pair of texts; `offsets` adds offset_mapping. Raises DetourError for a tokenizer
        that has a [CLS] but does not begin texts with it."""
        pairs = list(second) if second and second[0] is not None else None
        encoded = self.tokenizer(
            texts, pairs, truncation=True, max_length=self.max_length, return_offsets_mapping=offsets
        )
        features = [{key: encoded[key][i] for key in encoded} for i in range(len(texts))]
        if self.tokenizer.cls_token_id is not None and features[0]["input_ids"][0] != self.tokenizer.cls_token_id:
            raise DetourError(
                f"{self.tokenizer.name_or_path}: the tokenizer does not begin a text with its "
                f"{self.tokenizer.cls_token}; its tokenizer.json needs a post-processor that does"
            )
        return features


def token_count(feature: Feature) -> int:
    """Tokens of an example, all options of a question together."""
    ids = feature["input_ids"]
    return sum(map(len, ids)) if isinstance(ids[0], list) else len(ids)


def was_cut(feature: Feature, max_length: int) -> bool:
    """Whether a text filled the length; such a one has most likely lost its end."""
    ids = feature["input_ids"]
    longest = max(map(len, ids)) if isinstance(ids[0], list) else len(ids)
    return longest >= max_length


def pad_features(features: list[Feature], pad: int) -> dict[str, Tensor]:
    """A batch of features that are lists of numbers, or single numbers: [batch, longest] or [batch]."""
    return {key: pad_values([feature[key] for feature in features], FILLERS.get(key, pad)) for key in features[0]}


def pad_values(values: list[Any], filler: int) -> Tensor:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tensors = [torch.as_tensor(value) for value in values]
    return pad_sequence(tensors, batch_first=True, padding_value=filler) if tensors[0].ndim else torch.stack(tensors)
