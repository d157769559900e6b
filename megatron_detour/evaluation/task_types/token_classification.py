"""Named entities: a BIO tag per word, by a token classifier or by the span head."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_detour.evaluation.metrics import ENTITY_F1
from megatron_detour.evaluation.task_types.base import BadExample, Record, TaskType
from megatron_detour.evaluation.task_types.encode import IGNORED, Encoder, Example, Feature, pad_features

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

_BIO = re.compile(r"O|[BI]-\S.*")


class TokenClassification(TaskType):
    """Examples {"tokens": [str], "tags": [str]}, a tag per word; predictions are lists of tags.

    A task's labels are entity types; a model's are "O", then B-X and I-X of all types in alphabetical order.
    """

    name = "token-classification"
    fields = ("tokens", "tags")
    answer = "tags"
    metrics = (ENTITY_F1,)
    label_noun = "entity type"
    has_ner_head = True
    auto_class = "AutoModelForTokenClassification"

    def read(self, record: Record) -> Example:
        tokens, tags = record.items("tokens"), record.items("tags")
        for name, values in (("tokens", tokens), ("tags", tags)):
            if not all(isinstance(value, str) for value in values):
                raise BadExample(f"{record.key(name)!r} must contain only strings")
        if len(tokens) != len(tags):
            raise BadExample(
                f"{len(tokens)} values in {record.key('tokens')!r}, but {len(tags)} in {record.key('tags')!r}"
            )
        if not tokens:
            raise BadExample(f"{record.key('tokens')!r} is empty; omit sentences without words")
        for tag in set(tags):
            if not _BIO.fullmatch(tag):
                raise BadExample(f"invalid BIO tag {tag!r}; use O, B-TYPE or I-TYPE")
        return {"tokens": tokens, "tags": tags}

    def labels_of(self, example: Example) -> set[str]:
        return {tag[2:] for tag in example["tags"] if tag != "O"}

    def model_labels(self, labels: list[str]) -> tuple[str, ...]:
        return ("O", *(f"{prefix}-{label}" for label in labels for prefix in "BI"))

    def shuffle(self, examples: list[Example], rng: random.Random) -> list[Example]:
        """Shuffle the tags of all words, so that no entity stays whole."""
        tags = [tag for example in examples for tag in example["tags"]]
        rng.shuffle(tags)
        left = iter(tags)
        return [example | {"tags": [next(left) for _ in example["tags"]]} for example in examples]

    def with_head(self, ner_head: str) -> TaskType:
        return SpanClassification() if ner_head == "span" else self

    def encode(self, examples: Sequence[Example], encoder: Encoder) -> list[Feature]:
        """Join words by spaces, which suits every tokenizer; a word is represented by its first token.

        The first word is preceded by a space too, so that it is tokenized as elsewhere (add_prefix_space).
        """
        ids = {tag: i for i, tag in enumerate(encoder.labels)}
        features = encoder.tokenize([" " + " ".join(e["tokens"]) for e in examples], offsets=True)
        for feature, example in zip(features, examples, strict=True):
            feature["word_starts"] = first_tokens(example["tokens"], feature.pop("offset_mapping"), begin=1)
            feature["tags"] = [ids[tag] for tag in example["tags"]]
        return features

    def collate(self, features: list[Feature], pad: int) -> dict[str, Tensor]:
        """Return a padded batch with tags as `labels` of the words' first tokens."""
        return pad_features([self._labeled(feature) for feature in features], pad)

    def _labeled(self, feature: Feature) -> Feature:
        labels = [IGNORED] * len(feature["input_ids"])
        for start, tag in zip(feature["word_starts"], feature["tags"], strict=True):
            if start >= 0:
                labels[start] = tag
        return {key: value for key, value in feature.items() if key not in ("tags", "word_starts")} | {"labels": labels}

    def kept_outputs(self, outputs: tuple[Tensor, ...]) -> Tensor:
        """Ids of tags [batch, tokens]."""
        return outputs[0].argmax(-1)

    def decode(self, features: list[Feature], outputs: np.ndarray, encoder: Encoder) -> list[list[str]]:
        """outputs: ids of tags [n, tokens]. Truncated words count as O."""
        return [
            [encoder.labels[row[start]] if start >= 0 else "O" for start in feature["word_starts"]]
            for feature, row in zip(features, outputs, strict=True)
        ]


class SpanClassification(TokenClassification):
    """Token classification with the span head, whose labels and outputs are per word."""

    def _labeled(self, feature: Feature) -> Feature:
        labels = [
            tag if start >= 0 else IGNORED for start, tag in zip(feature["word_starts"], feature["tags"], strict=True)
        ]
        return {key: feature[key] for key in ("input_ids", "attention_mask", "word_starts")} | {"labels": labels}

    def build_model(self, load: Callable[..., Any], labels: tuple[str, ...]) -> nn.Module:
        from megatron_detour.evaluation.task_types.span.head import SpanTagger

        return SpanTagger(load("AutoModel"), [tag.removeprefix("B-") for tag in labels if tag.startswith("B-")])

    def kept_outputs(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[1]  # SpanOutput.tags

    def decode(self, features: list[Feature], outputs: np.ndarray, encoder: Encoder) -> list[list[str]]:
        """outputs: ids of tags [n, words]."""
        return [
            [encoder.labels[row[i]] if start >= 0 else "O" for i, start in enumerate(feature["word_starts"])]
            for feature, row in zip(features, outputs, strict=True)
        ]


def first_tokens(words: Sequence[str], offsets: Sequence[tuple[int, int]], begin: int = 0) -> list[int]:
    """Return the first token of each word, -1 for words without one; words are joined by single spaces from `begin`.

    `offsets` are the tokens' start and end characters, (0, 0) for special tokens. A token may include the space before
    its word.
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
