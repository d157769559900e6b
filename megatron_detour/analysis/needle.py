"""Needle in a haystack: does a frozen encoder's [CLS] tell whether a given fact is in a long document?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_detour.analysis.hidden_states import Encoder, Report
from megatron_detour.analysis.needle_examples import PLACES, Needle, NeedleOptions, make_needles
from megatron_detour.errors import DetourError

CONFIDENCE_Z = 1.959964  # of 95%


@dataclass(frozen=True)
class Rate:
    """A share of right answers with its 95% interval (Wilson); with several seeds the mean, of the same examples."""

    accuracy: float
    low: float
    high: float
    examples: int

    @classmethod
    def of(cls, right: Sequence[float]) -> Rate:
        """`right` has a number from 0 to 1 per example: the share of seeds that answered it rightly."""
        n, share, z = len(right), float(np.mean(right)), CONFIDENCE_Z
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return cls(share, max(0.0, middle - half), min(1.0, middle + half), n)


@dataclass(frozen=True)
class NeedleResult:
    """Accuracy on the test examples: of all, by length and by place. Guessing gives 0.5."""

    model: str
    all: Rate
    by_length: dict[int, Rate]
    by_place: dict[str, Rate]
    dev_accuracy: tuple[float, ...]  # by seed, of the best epoch
    best_epochs: tuple[int, ...]
    options: NeedleOptions

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_needle(
    model: Path,
    documents: Sequence[str],
    options: NeedleOptions | None = None,
    report: Report = lambda examples: None,
) -> NeedleResult:
    """Train the paper's probe on a frozen encoder and score it: dropout, linear, GELU, dropout, linear on [CLS].

    [CLS] is the encoder's output, after the final norm. The encoder is run once per example, without dropout. Of each
    seed, the epoch with the best accuracy on dev is scored on test, the first of equals. Raises DetourError for
    folders that are not encoders, lengths beyond the model's, and too few documents.
    """
    options = options or NeedleOptions()
    encoder = Encoder.open(model)
    if max(options.lengths) > encoder.longest:
        raise DetourError(f"{model}: the longest input is {encoder.longest:,} tokens; lower --lengths")
    needles = make_needles(encoder.tokenizer, documents, options)
    states = encoder.first_outputs([list(needle.ids) for needle in needles], options.batch_tokens, report)
    outcomes = [train_classifier(states, needles, seed, options) for seed in options.train_seeds]
    tested = [needle for needle in needles if needle.split == "test"]
    right = np.mean([outcome.right for outcome in outcomes], axis=0)

    def rate(fits: Callable[[Needle], bool]) -> Rate:
        return Rate.of([share for share, needle in zip(right, tested, strict=True) if fits(needle)])

    return NeedleResult(
        model=str(model),
        all=rate(lambda needle: True),
        by_length={length: rate(lambda needle, n=length: needle.length == n) for length in options.lengths},
        by_place={place: rate(lambda needle, name=place: needle.place == name) for place in PLACES},
        dev_accuracy=tuple(outcome.dev_accuracy for outcome in outcomes),
        best_epochs=tuple(outcome.epoch for outcome in outcomes),
        options=options,
    )


@dataclass(frozen=True)
class Outcome:
    """Whether each test example was answered rightly, by the classifier of the best epoch (from 1)."""

    right: list[bool]
    dev_accuracy: float
    epoch: int


def train_classifier(states: torch.Tensor, needles: Sequence[Needle], seed: int, options: NeedleOptions) -> Outcome:
    """Train on states [examples, hidden] and return the outcome of the epoch with the best accuracy on dev."""
    answers = torch.tensor([int(needle.present) for needle in needles])
    rows = {
        split: torch.tensor([i for i, needle in enumerate(needles) if needle.split == split])
        for split in ("train", "dev", "test")
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = build_classifier(states.shape[1], options.dropout)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=options.learning_rate)
        best = Outcome([], -1.0, 0)
        for epoch in range(1, options.epochs + 1):
            classifier.train()
            for batch in rows["train"][torch.randperm(len(rows["train"]))].split(options.batch):
                loss = nn.functional.cross_entropy(classifier(states[batch]), answers[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            right = {split: _right(classifier, states, answers, rows[split]) for split in ("dev", "test")}
            if (accuracy := float(np.mean(right["dev"]))) > best.dev_accuracy:
                best = Outcome(right["test"], accuracy, epoch)
    return best


def build_classifier(hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, 2)
    )


@torch.inference_mode()
def _right(classifier: nn.Module, states: torch.Tensor, answers: torch.Tensor, rows: torch.Tensor) -> list[bool]:
    classifier.eval()
    return (classifier(states[rows]).argmax(-1) == answers[rows]).tolist()
