"""Examples as a model reads them: token ids, where words begin, labels; and what its outputs mean as predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # of labels: no loss
FILLERS = {"attention_mask": 0, "token_type_ids": 0, "word_starts": -1, "labels": IGNORED}
THRESHOLD = 0.5  # of a label's probability where several may hold
Example = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """Scores of a similarity task as the model learns them: mean 0, standard deviation 1."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Scale:
        scores = np.array([example["score"] for example in examples], dtype=np.float64)
        return cls(float(scores.mean()), float(scores.std()) or 1.0)


@dataclass(frozen=True)
class Encoder:
    """Turns a task's examples into features, and a model's outputs into predictions."""

    task: Task
    labels: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    ner_head: str = "tokens"  # or "span": whose outputs are tags of words
    scale: Scale | None = None  # of similarity

    def __call__(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Features in the examples' order; `labels` in the form that the task's loss takes."""
        kind = self.task.type
        if kind == "token-classification":
            return self._of_words(examples)
        if kind in ("multiple-choice", "multiple-answer"):
            return [self._of_options(example) for example in examples]
        features = self._tokenized([e["text"] for e in examples], [e["text_b"] for e in examples])
        for feature, example in zip(features, examples, strict=True):
            feature["labels"] = self._label(example)
        return features

    def _tokenized(self, first: list[str], second: list[str | None] | None = None, **options) -> list[dict[str, Any]]:
        pairs = second if second and second[0] is not None else None
        encoded = self.tokenizer(first, pairs, truncation=True, max_length=self.max_length, **options)
        features = [{key: encoded[key][i] for key in encoded} for i in range(len(first))]
        if self.tokenizer.cls_token_id is not None and features[0]["input_ids"][0] != self.tokenizer.cls_token_id:
            raise DetourError(
                f"{self.tokenizer.name_or_path}: the tokenizer does not begin a text with its "
                f"{self.tokenizer.cls_token}; its tokenizer.json needs a post-processor that does"
            )
        return features

    def _label(self, example: Example) -> Any:
        if self.task.type == "classification":
            return self.labels.index(example["label"])
        if self.task.type == "multi-label":
            return [float(label in example["labels"]) for label in self.labels]
        return (example["score"] - self.scale.mean) / self.scale.deviation

    def _of_words(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Words are joined by spaces, as every kind of tokenizer knows text; a word's first token stands for it.

        The first word has a space before it too, so that it is the word that it is elsewhere (add_prefix_space).
        """
        ids = {tag: i for i, tag in enumerate(self.labels)}
        features = self._tokenized([" " + " ".join(e["tokens"]) for e in examples], return_offsets_mapping=True)
        for feature, example in zip(features, examples, strict=True):
            starts = first_tokens(example["tokens"], feature.pop("offset_mapping"), begin=1)
            feature["word_starts"] = starts
            feature["tags"] = [ids[tag] for tag in example["tags"]]
        return features

    def _of_options(self, example: Example) -> dict[str, Any]:
        options = example["options"]
        features = self._tokenized([example["question"]] * len(options), options)
        merged: dict[str, Any] = {key: [feature[key] for feature in features] for key in features[0]}
        return merged | {"labels": [float(i in example["answers"]) for i in range(len(options))]}

    def gold(self, examples: Sequence[Example]) -> list[Any]:
        """The right answers in the form of predictions (evaluation/metrics.py)."""
        kind = self.task.type
        if kind == "multiple-choice":
            return [example["answers"][0] for example in examples]
        key = {"token-classification": "tags", "classification": "label", "multi-label": "labels"}
        key |= {"similarity": "score", "multiple-answer": "answers"}
        return [example[key[kind]] for example in examples]

    def decode(self, features: list[dict[str, Any]], outputs: np.ndarray) -> list[Any]:
        """Predictions out of a model's outputs, padded to the longest.

        `outputs` are tag ids [n, tokens] or (ner_head "span") [n, words], logits [n, labels] or [n, options], or scores
        [n, 1].
        """
        kind = self.task.type
        if kind == "token-classification":
            return [self._tags(feature, row) for feature, row in zip(features, outputs, strict=True)]
        if kind == "classification":
            return [self.labels[i] for i in outputs.argmax(-1)]
        if kind == "multi-label":
            return [[self.labels[i] for i in np.flatnonzero(row > _logit(THRESHOLD))] for row in outputs]
        if kind == "similarity":
            return [float(score) for score in outputs.reshape(-1) * self.scale.deviation + self.scale.mean]
        rows = [row[: len(feature["labels"])] for feature, row in zip(features, outputs, strict=True)]
        if kind == "multiple-choice":
            return [int(row.argmax()) for row in rows]
        # a question has an answer, so the likeliest option is one where none reaches the threshold
        return [np.flatnonzero(row > min(_logit(THRESHOLD), row.max() - 1e-6)).tolist() for row in rows]

    def _tags(self, feature: dict[str, Any], row: np.ndarray) -> list[str]:
        """Tags of all words; one that was cut off is taken for no entity."""
        at = range(len(feature["word_starts"])) if self.ner_head == "span" else feature["word_starts"]
        known = [start >= 0 for start in feature["word_starts"]]
        return [self.labels[row[i]] if is_known else "O" for i, is_known in zip(at, known, strict=True)]


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]], begin: int = 0) -> list[int]:
    """The first token of each of the words, which were joined by single spaces from character `begin` on; -1 for one
    that has none.

    `offsets` are the tokens' first and one-past-last characters; (0, 0) for special tokens. A token may include the
    space before its word.
    """
    starts, token = [], 0
    for word in words:
        end = begin + len(word)
        while token < len(offsets) and offsets[token][1] <= begin:
            token += 1
        within = token < len(offsets) and offsets[token][0] < end
        starts.append(token if within else -1)
        begin = end + 1
    return starts


def was_cut(feature: dict[str, Any], max_length: int) -> bool:
    """Whether a text filled the length; such a one has most likely lost its end."""
    ids = feature["input_ids"]
    longest = max(map(len, ids)) if isinstance(ids[0], list) else len(ids)
    return longest >= max_length


def length_of(feature: dict[str, Any]) -> int:
    ids = feature["input_ids"]
    return sum(map(len, ids)) if isinstance(ids[0], list) else len(ids)


def collator(pad: int, ner_head: str) -> Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]:
    """Makes padded batches: values [batch, ...], options [batch, options, tokens].

    Tags become `labels` of the words' first tokens (`ner_head` "tokens") or of the words ("span").
    """

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if "tags" in features[0]:
            features = [_with_tags(feature, ner_head) for feature in features]
        if isinstance(features[0]["input_ids"][0], list):
            return _options_batch(features, pad)
        return {key: _padded([f[key] for f in features], FILLERS.get(key, pad)) for key in features[0]}

    return collate


def _padded(values: list[Any], filler: int) -> torch.Tensor:
    tensors = [torch.as_tensor(value) for value in values]
    return pad_sequence(tensors, batch_first=True, padding_value=filler) if tensors[0].ndim else torch.stack(tensors)


def _with_tags(feature: dict[str, Any], ner_head: str) -> dict[str, Any]:
    kept = {key: value for key, value in feature.items() if key not in ("tags", "word_starts")}
    starts, tags = feature["word_starts"], feature["tags"]
    if ner_head == "span":
        kept.pop("token_type_ids", None)  # the head takes none
        labels = [tag if start >= 0 else IGNORED for start, tag in zip(starts, tags, strict=True)]
        return kept | {"word_starts": starts, "labels": labels}
    labels = [IGNORED] * len(feature["input_ids"])
    for start, tag in zip(starts, tags, strict=True):
        if start >= 0:
            labels[start] = tag
    return kept | {"labels": labels}


def _options_batch(features: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """A question with fewer options than others repeats its first one, without a label."""
    most = max(len(feature["labels"]) for feature in features)
    batch = {"labels": _padded([feature["labels"] for feature in features], IGNORED)}
    for key in features[0].keys() - {"labels"}:
        filled = [f[key] + [f[key][0]] * (most - len(f[key])) for f in features]
        flat = _padded([option for options in filled for option in options], FILLERS.get(key, pad))
        batch[key] = flat.view(len(features), most, -1)
    return batch


def _logit(probability: float) -> float:
    return float(np.log(probability / (1 - probability)))
