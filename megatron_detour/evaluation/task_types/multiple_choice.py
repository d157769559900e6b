"""Questions with one or several right options."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_detour.evaluation.metrics import ACCURACY, EXACT_MATCH, HAMMING
from megatron_detour.evaluation.task_types.base import BadExample, Record, TaskType
from megatron_detour.evaluation.task_types.encode import FILLERS, IGNORED, Encoder, Example, Feature, pad_values

if TYPE_CHECKING:
    from torch import Tensor


class MultipleAnswer(TaskType):
    """Examples {"question": str, "options": [str], "answers": [int]} with the indices of the right options;
    predictions are lists of indices."""

    name = "multiple-answer"
    fields = ("question", "options", "answers")
    answer = "answers"
    metrics = (HAMMING, EXACT_MATCH)
    auto_class = "AutoModelForMultipleChoice"

    def read(self, record: Record) -> Example:
        question, options = record.text("question"), record.value("options")
        if not isinstance(options, dict | list):
            raise BadExample(f"{record.key('options')!r} is neither an object nor a list of options")
        if len(options) < 2:
            raise BadExample(f"{len(options)} options; give at least two")
        # answers refer to options by key, or by index from 0
        names = list(options) if isinstance(options, dict) else [str(i) for i in range(len(options))]
        values = options.values() if isinstance(options, dict) else options
        texts = [record.as_text("options", text) for text in values]
        answers = self.read_answers(record, record.value("answers"))
        for answer in answers:
            if answer not in names:
                raise BadExample(f"the answer {answer!r} is not an option; choose from {', '.join(names)}")
        return {"question": question, "options": texts, "answers": sorted(map(names.index, answers))}

    def read_answers(self, record: Record, value: Any) -> list[str]:
        """Return the names of the right options, without duplicates."""
        if isinstance(value, list):
            record.refuse_vectors(value)
        answers = _answers(record, value)
        if not answers:
            raise BadExample("no right answer; multiple-answer needs at least one")
        return answers

    def shuffle(self, examples: list[Example], rng: random.Random) -> list[Example]:
        """Draw random answers within each question: option indices mean nothing in another question."""
        return [
            example | {"answers": sorted(rng.sample(range(len(example["options"])), len(example["answers"])))}
            for example in examples
        ]

    def encode(self, examples: Sequence[Example], encoder: Encoder) -> list[Feature]:
        return [self._encode(example, encoder) for example in examples]

    def _encode(self, example: Example, encoder: Encoder) -> Feature:
        options = example["options"]
        features = encoder.tokenize([example["question"]] * len(options), options)
        merged: Feature = {key: [feature[key] for feature in features] for key in features[0]}
        return merged | {"labels": [float(i in example["answers"]) for i in range(len(options))]}

    def collate(self, features: list[Feature], pad: int) -> dict[str, Tensor]:
        """Return [batch, options, tokens]; questions with fewer options repeat their first one, without a label."""
        most = max(len(feature["labels"]) for feature in features)
        batch = {"labels": pad_values([feature["labels"] for feature in features], IGNORED)}
        for key in features[0].keys() - {"labels"}:
            filled = [f[key] + [f[key][0]] * (most - len(f[key])) for f in features]
            flat = pad_values([option for options in filled for option in options], FILLERS.get(key, pad))
            batch[key] = flat.view(len(features), most, -1)
        return batch

    def loss(self, labels: tuple[str, ...], train: list[Example]) -> Callable[..., Tensor]:
        """Return binary cross-entropy over each question's options, without padding."""
        import torch

        def each(outputs: Any, targets: Tensor, **_: Any) -> Tensor:
            there = targets != IGNORED
            logits = outputs.logits.float()[there]
            return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets[there])

        return each

    def decode(self, features: list[Feature], outputs: np.ndarray, encoder: Encoder) -> list[Any]:
        """outputs: logits [n, most options]."""
        rows = zip(features, outputs, strict=True)
        return [self.choose(row[: len(feature["labels"])]) for feature, row in rows]

    def choose(self, logits: np.ndarray) -> Any:
        """Return options with probability 0.5 or more; if none, the most likely, since every question has an answer."""
        return np.flatnonzero(logits > min(0.0, logits.max() - 1e-6)).tolist()


class MultipleChoice(MultipleAnswer):
    """Examples like those of multiple-answer, with one right option; predictions are indices."""

    name = "multiple-choice"
    metrics = (ACCURACY,)

    def read_answers(self, record: Record, value: Any) -> list[str]:
        answers = _answers(record, value)
        if len(answers) != 1:
            raise BadExample(f"{len(answers)} right answers; multiple-choice needs exactly one")
        return answers

    def gold(self, example: Example) -> int:
        return example["answers"][0]

    def loss(self, labels: tuple[str, ...], train: list[Example]) -> Callable[..., Tensor]:
        """Return cross-entropy over each question's options, without padding."""
        import torch

        def one_of(outputs: Any, targets: Tensor, **_: Any) -> Tensor:
            logits = outputs.logits.float().masked_fill(targets == IGNORED, -torch.inf)
            return torch.nn.functional.cross_entropy(logits, targets.argmax(-1))

        return one_of

    def choose(self, logits: np.ndarray) -> int:
        return int(logits.argmax())


def _answers(record: Record, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return record.once("answers", [record.as_name("answers", answer) for answer in values])
