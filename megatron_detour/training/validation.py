"""Held-out loss under fixed masks: the same tokens in every phase, in every run and on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_detour.config import RunConfig, load
from megatron_detour.data.batches import DocumentMixture, Documents, rank_batch
from megatron_detour.data.order import rank_micro_batches
from megatron_detour.errors import DetourError
from megatron_detour.files import retry
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.objectives import KINDS, REFERENCE, Corruption, validated
from megatron_detour.parallel.state import ParallelState
from megatron_detour.run_directory import RUN_FILE
from megatron_detour.tokenizer.token_bytes import byte_lengths
from megatron_detour.tokenizer.vocabulary import Vocabulary, find_tokenizer, load_vocabulary
from megatron_detour.training.run import Run

UNIGRAM_TOKENS = 20_000_000  # sampled from each corpus for its unigram distribution


class Validation:
    """Documents of the first `validation.sequences` x `data.sequence_length` tokens, masked by `validation.seed`."""

    def __init__(
        self,
        config: RunConfig,
        vocabulary: Vocabulary,
        tokenizer_file: Path,
        micro_tokens: int,
        state: ParallelState,
        device: torch.device,
    ) -> None:
        settings = config.validation
        self.mixture = DocumentMixture(settings.corpora, config.data.sequence_length, settings.seed, vocabulary)
        self.seed, self.micro_tokens, self.state, self.device = settings.seed, micro_tokens, state, device
        self.objectives: dict[str, Corruption] = {
            name: kind.for_validation(settings.mask_rate).bind(vocabulary)
            for name, kind in validated(phase.objective for phase in config.phases).items()
            if all(getattr(vocabulary, role) is not None for role in kind.special_tokens)
        }
        self.bytes_of = byte_lengths(tokenizer_file, vocabulary)
        self.documents = self.mixture.documents(0, settings.sequences * config.data.sequence_length)
        names = _names(self.mixture.prefixes)
        self.by_corpus = {name: self.documents[self.documents.corpora == i] for i, name in enumerate(names)}

    @classmethod
    def from_run(cls, run: Run) -> Validation:
        micro_tokens = min(phase.micro_sequences * phase.sequence_length for phase in run.plan.phases)
        initial = run.initial
        return cls(
            run.config, initial.checked.vocabulary, initial.tokenizer_file, micro_tokens, run.parallel, run.device
        )

    @classmethod
    def alone(cls, config: RunConfig, folder: Path) -> Validation:
        """Create for this process alone, with the tokenizer of a model's folder.

        Raise DetourError for a run without validation corpora.
        """
        if not config.validation.corpora:
            raise DetourError(
                f"run {config.name}: no validation.corpora, so that there is no held-out text to measure a loss on"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        micro_tokens = config.data.sequence_length
        return cls(config, load_vocabulary(folder), find_tokenizer(folder), micro_tokens, ParallelState(), device)

    def __call__(self, model: LanguageModel) -> dict[str, float]:
        """Return losses (nats per labeled token), bits per byte and masked accuracy over all corpora.

        With several corpora there is also KEY/NAME for each. Every rank must call it.
        """
        figures: dict[str, float] = {}
        model.eval()
        for name, objective in self.objectives.items():
            sums = {corpus: self._sums(model, objective, texts) for corpus, texts in self.by_corpus.items()}
            figures |= _figures(name, sum(sums.values()), "")
            if len(sums) > 1:
                for corpus, corpus_sums in sums.items():
                    figures |= _figures(name, corpus_sums, f"/{corpus}")
        model.train()
        return figures

    @torch.no_grad()
    def _sums(self, model: LanguageModel, objective: Corruption, documents: Documents) -> np.ndarray:
        """Return the sums of loss, correct predictions, labeled tokens and their bytes, float64 [4]."""
        totals, state = torch.zeros(4, dtype=torch.float64, device=self.device), self.state
        tokens = int(documents.lengths.sum())
        mine, of = rank_micro_batches(tokens, self.micro_tokens, state.data_rank, state.data_size)
        more = (documents, mine, of, objective, self.seed, state.sequence_multiple)
        for batch in retry(lambda: rank_batch(self.mixture, *more)).micro_batches:
            covered = int(self.bytes_of.take(batch.labels.numpy()).sum())
            out = model(*batch.to(self.device).arguments)
            counts = totals.new_tensor([out.labeled, covered])
            totals += torch.cat([torch.stack([out.cross_entropy.double(), out.right.double()]), counts])
        if self.state.data_group:
            dist.all_reduce(totals, group=self.state.data_group)
        return totals.cpu().numpy()

    def reference_loss(self, model: LanguageModel) -> float:
        """Return the loss of the reference objective alone, over all corpora, in nats per masked token."""
        loss, _, labeled, _ = self._sums(model.eval(), self.objectives[REFERENCE.name], self.documents)
        return loss / labeled

    def unigram_loss(self, training: DocumentMixture, weights: list[float]) -> float:
        """Return the loss, in nats per masked token, of the training corpora's unigram distribution.

        It covers ordinary tokens only, with add-one smoothing: the best loss without context.
        """
        frequencies = np.zeros(training.vocabulary.size)
        for corpus, weight in zip(training.corpora, weights, strict=True):
            counts = np.bincount(corpus.sample(UNIGRAM_TOKENS), minlength=len(frequencies))
            frequencies += weight * counts / counts.sum() * UNIGRAM_TOKENS
        ordinary = training.vocabulary.ordinary()
        probabilities = np.zeros_like(frequencies)
        probabilities[ordinary] = (frequencies[ordinary] + 1) / (frequencies[ordinary] + 1).sum()
        tokens, chosen = self.mixture.tokens(self.documents), self.documents
        labels = self.objectives[REFERENCE.name].apply(tokens, chosen.lengths, self.seed, chosen.numbers).labels
        return float(-np.log(probabilities[labels]).mean())


def held_out_loss(checkpoint: Path) -> Callable[[LanguageModel], float]:
    """Return the reference loss, as a function of a model, under the fixed masks of a checkpoint's run.

    Raise DetourError if the run directory or its validation corpora are not there.
    """
    validation = Validation.alone(load(checkpoint.resolve().parents[1] / RUN_FILE), checkpoint)
    return lambda model: validation.reference_loss(model.to(validation.device))


def _figures(objective: str, sums: Any, suffix: str) -> dict[str, float]:
    loss, right, labeled, covered = sums
    figures = {
        f"val_{objective}_loss{suffix}": loss / max(labeled, 1),
        f"val_{objective}_bits_per_byte{suffix}": loss / math.log(2) / max(covered, 1),
    }
    if KINDS[objective].accuracy:
        figures[f"val_{objective}_accuracy{suffix}"] = right / max(labeled, 1)
    return {key: float(value) for key, value in figures.items()}


def _names(prefixes: list[str]) -> list[str]:
    """Return the shortest suffixes of the prefixes' paths that are unique."""
    parts = [Path(prefix).parts for prefix in prefixes]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = ["-".join(part[-length:]).strip("/") for part in parts]
        if len(set(names)) == len(names):
            return names
    return prefixes
