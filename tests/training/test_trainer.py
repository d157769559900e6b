"""Reading the text of a step on a disk that is away for a moment."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest
import torch

from megatron_detour import files
from megatron_detour.objectives import CausalLM
from megatron_detour.training import trainer as module
from megatron_detour.training import validation
from megatron_detour.training.trainer import Trainer
from megatron_detour.training.validation import Validation


class Away:
    """Raises an error as often as it is told, and then returns its arguments."""

    def __init__(self, error: OSError, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return arguments


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (0.0,) * len(files.PAUSES))


def load(documents, rank_batch, monkeypatch) -> tuple:
    made = object.__new__(Trainer)
    made.run = SimpleNamespace(
        data=SimpleNamespace(mixture=lambda phase: SimpleNamespace(documents=documents)),
        parallel=SimpleNamespace(data_rank=0, data_size=1, sequence_multiple=1),
        initial=SimpleNamespace(checked=SimpleNamespace(words=None, vocabulary=None)),
        config=SimpleNamespace(seed=7),
        device=torch.device("cpu"),
    )
    phase = SimpleNamespace(micro_sequences=1, sequence_length=8)
    monkeypatch.setattr(module, "rank_batch", rank_batch)
    return made._load(SimpleNamespace(phase=phase, objective=CausalLM(), start=0, tokens=8))


@pytest.mark.parametrize("number", sorted(files.TRANSIENT))
@pytest.mark.parametrize("of", ["documents", "text"])
def test_a_step_is_read_again_where_its_disk_was_away_for_a_moment(monkeypatch, number, of):
    away, there = Away(OSError(number, "away"), len(files.PAUSES)), Away(OSError(), 0)
    documents, batch = (away, there) if of == "documents" else (there, away)
    _, read = load(documents, batch, monkeypatch)
    assert read[1] == (0, 8)
    assert away.calls == len(files.PAUSES) + 1


@pytest.mark.parametrize(("number", "calls"), [(errno.EIO, len(files.PAUSES) + 1), (errno.EACCES, 1)])
def test_a_disk_that_stays_away_or_says_no_is_told(monkeypatch, number, calls):
    away = Away(OSError(number, "away"), 100)
    with pytest.raises(OSError, match="away"):
        load(away, None, monkeypatch)
    assert away.calls == calls


def test_validation_reads_again(monkeypatch):
    made = object.__new__(Validation)
    made.mixture, made.seed, made.micro_tokens, made.device = None, 7, 8, "cpu"
    made.state = SimpleNamespace(data_rank=0, data_size=1, sequence_multiple=1, data_group=None)
    away = Away(OSError(errno.EIO, "away"), 1)
    monkeypatch.setattr(
        validation, "rank_batch", lambda *arguments: SimpleNamespace(micro_batches=away(*arguments)[:0])
    )
    documents = SimpleNamespace(lengths=SimpleNamespace(sum=lambda: 8))
    assert made._sums(None, None, documents).tolist() == [0.0] * 4
    assert away.calls == 2
