"""Held-out figures: the same over ranks, by corpus, and in bits a byte."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_detour.config import Corpus
from megatron_detour.model.families import read_shape
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.objectives import CausalLM, MaskedLM
from megatron_detour.parallel.state import ParallelState
from megatron_detour.tokenizer.vocabulary import find_tokenizer, load_tokenizer, load_vocabulary
from megatron_detour.training.validation import Validation
from tests.conftest import build, sentences, write_jsonl
from tests.models import CONFIG
from tests.training.test_zero2 import run_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def second(tokenizer_folder, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("second")
    texts = write_jsonl(folder / "texts.jsonl", [sentences(random.Random(i), 2) for i in range(60)])
    build([texts], folder / "leaflets", tokenizer_folder)
    return str(folder / "leaflets")


def model_of(tokenizer: Path) -> LanguageModel:
    size = load_vocabulary(tokenizer).size
    model = read_shape(CONFIG | {"vocab_size": size}, "tests").build(ParallelState())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(model.initial_weight(name, 3) * 4)
    return model


def validation(tokenizer: Path, corpora: tuple[Corpus, ...], state: ParallelState | None = None) -> Validation:
    config = run_config(1)
    settings = dataclasses.replace(config.validation, corpora=corpora, sequences=12)
    config, vocabulary = dataclasses.replace(config, validation=settings), load_vocabulary(tokenizer)
    return Validation(config, vocabulary, find_tokenizer(tokenizer), 50, state or ParallelState(), torch.device("cpu"))


def test_losses_and_bytes_are_those_of_the_definition(corpus, tokenizer_folder):
    held_out = validation(tokenizer_folder, (Corpus(corpus.prefix),))
    model = model_of(tokenizer_folder)
    figures = held_out(model)
    assert model.training
    mixture, batch = held_out.mixture, held_out.documents
    assert batch.lengths.sum() == pytest.approx(12 * 50, abs=50)
    vocabulary, tokenizer = mixture.vocabulary, load_tokenizer(tokenizer_folder)
    for name, kind in (("mlm", MaskedLM(0.15)), ("clm", CausalLM())):
        objective = kind.bind(vocabulary)
        corrupted = objective.apply(mixture.tokens(batch), batch.lengths, 0, batch.numbers)
        ids = torch.from_numpy(corrupted.inputs.reshape(-1))
        starts = np.cumsum(batch.lengths) - batch.lengths
        positions = torch.from_numpy(np.arange(len(ids)) - np.repeat(starts, batch.lengths))
        with torch.no_grad():
            logits = model.eval().logits(ids, positions, tuple(batch.lengths.tolist()), objective.causal)
        labels = torch.from_numpy(corrupted.labels)
        losses = torch.nn.functional.cross_entropy(logits[corrupted.labeled], labels, reduction="none").double()
        assert figures[f"val_{name}_loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
        special = set(vocabulary.special_ids)
        # A byte-level piece has a character for each byte.
        covered = sum(len(tokenizer.id_to_token(i)) for i in labels.tolist() if i not in special)
        bits = float(losses.sum()) / math.log(2)
        assert figures[f"val_{name}_bits_per_byte"] == pytest.approx(bits / covered, rel=1e-5)
    assert 0 <= figures["val_mlm_accuracy"] <= 1
    assert held_out.reference_loss(model) == pytest.approx(figures["val_mlm_loss"], rel=1e-6)


def test_each_of_several_corpora_has_figures_of_its_own(corpus, second, tokenizer_folder):
    model = model_of(tokenizer_folder)
    both = validation(tokenizer_folder, (Corpus(corpus.prefix, 0.75), Corpus(second, 0.25)))
    figures = both(model)
    names = [Path(corpus.prefix).name, "leaflets"]
    assert list(both.by_corpus) == names
    for key in ("val_mlm_loss", "val_clm_loss", "val_mlm_bits_per_byte", "val_clm_bits_per_byte"):
        low, high = sorted(figures[f"{key}/{name}"] for name in names)
        assert low < figures[key] < high
    assert not any("/" in key for key in validation(tokenizer_folder, (Corpus(second),))(model))


def test_ranks_share_the_documents_out(corpus, second, tokenizer_folder):
    """What two ranks sum separately adds up to what one sums."""
    corpora = (Corpus(corpus.prefix, 0.75), Corpus(second, 0.25))
    model = model_of(tokenizer_folder).eval()
    whole = validation(tokenizer_folder, corpora)
    shares = [validation(tokenizer_folder, corpora, ParallelState(data_rank=rank, data_size=2)) for rank in (0, 1)]
    for name, documents in whole.by_corpus.items():
        for objective in whole.objectives.values():
            parts = sum(share._sums(model, objective, share.by_corpus[name]) for share in shares)
            np.testing.assert_allclose(parts, whole._sums(model, objective, documents), rtol=1e-5)  # fp32
