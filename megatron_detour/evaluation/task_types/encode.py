"""Encode examples for a model: token ids, word starts, padded batches."""

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

IGNORED = -100  # label without loss
FILLERS = {"attention_mask": 0, "token_type_ids": 0, "word_starts": -1, "labels": IGNORED}
Example = dict[str, Any]
Feature = dict[str, Any]


@dataclass(frozen=True)
class Encoder:
    """Converts a task's examples to features, and a model's outputs to predictions.

    `fitted` is the result of TaskType.fit on the training examples.
    """

    kind: TaskType
    labels: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    fitted: Any = None

    def __call__(self, examples: Sequence[Example]) -> list[Feature]:
        """Return features in the order of the examples, with `labels` in the form that the task's loss expects."""
        return self.kind.encode(examples, self)

    def decode(self, features: list[Feature], outputs: np.ndarray) -> list[Any]:
        """Convert a model's outputs, padded to the longest, to predictions."""
        return self.kind.decode(features, outputs, self)

    def gold(self, examples: Sequence[Example]) -> list[Any]:
        """Return the gold answers in the form of predictions (evaluation/metrics.py)."""
        return [self.kind.gold(example) for example in examples]

    def tokenize(
        self, texts: list[str], second: Sequence[str | None] | None = None, *, offsets: bool = False
    ) -> list[Feature]:
        """Return a feature per text or pair of texts; `offsets` adds offset_mapping. Raises DetourError for a
        tokenizer that has a [CLS] but does not start texts with it."""
        pairs = list(second) if second and second[0] is not None else None
        encoded = self.tokenizer(
            texts, pairs, truncation=True, max_length=self.max_length, return_offsets_mapping=offsets
        )
        features = [{key: encoded[key][i] for key in encoded} for i in range(len(texts))]
        if self.tokenizer.cls_token_id is not None and features[0]["input_ids"][0] != self.tokenizer.cls_token_id:
            raise DetourError(
                f"{self.tokenizer.name_or_path}: the tokenizer does not prepend {self.tokenizer.cls_token}; add a "
                "post-processor to its tokenizer.json"
            )
        return features


def token_count(feature: Feature) -> int:
    """Return the number of tokens of an example, summed over options."""
    ids = feature["input_ids"]
    return sum(map(len, ids)) if isinstance(ids[0], list) else len(ids)


def was_cut(feature: Feature, max_length: int) -> bool:
    """Whether a text fills the maximum length, and so was most likely truncated."""
    ids = feature["input_ids"]
    longest = max(map(len, ids)) if isinstance(ids[0], list) else len(ids)
    return longest >= max_length


def pad_features(features: list[Feature], pad: int) -> dict[str, Tensor]:
    """Pad features, lists of numbers or single numbers, to tensors [batch, longest] or [batch]."""
    return {key: pad_values([feature[key] for feature in features], FILLERS.get(key, pad)) for key in features[0]}


def pad_values(values: list[Any], filler: int) -> Tensor:
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tensors = [torch.as_tensor(value) for value in values]
    return pad_sequence(tensors, batch_first=True, padding_value=filler) if tensors[0].ndim else torch.stack(tensors)
