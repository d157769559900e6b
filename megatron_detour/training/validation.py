"""Held-out loss under masks that never change: the same tokens in every phase, every run and on any number of ranks."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from megatron_detour.config import RunConfig
from megatron_detour.data.batches import Sequences, micro_batch_of
from megatron_detour.data.vocabulary import Vocabulary
from megatron_detour.model.modernbert import ModernBert
from megatron_detour.objectives import CausalLM, MaskedLM, Objective
from megatron_detour.parallel.state import ParallelState

UNIGRAM_TOKENS = 20_000_000  # read of each corpus for its unigram distribution


class Validation:
    """The first `validation.sequences` packs of the held-out corpora, masked under `validation.seed`."""

    def __init__(self, config: RunConfig, vocabulary: Vocabulary, state: ParallelState, device: torch.device) -> None:
        settings = config.validation
        self.sequences = Sequences(settings.corpora, config.data.sequence_length, settings.seed, vocabulary)
        self.count, self.seed = settings.sequences, settings.seed
        self.micro = config.batch.micro_sequences
        self.masked = MaskedLM(vocabulary, settings.mask_rate)
        self.causal = CausalLM(vocabulary)
        self.state, self.device = state, device

    def __call__(self, model: ModernBert) -> dict[str, float]:
        """Losses in nats a labelled token and the share of masked tokens restored; every rank must call it."""
        model.eval()
        masked_loss, masked_right = self._mean(model, self.masked)
        causal_loss, _ = self._mean(model, self.causal)
        model.train()
        return {"val_mlm_loss": masked_loss, "val_mlm_accuracy": masked_right, "val_clm_loss": causal_loss}

    @torch.no_grad()
    def _mean(self, model: ModernBert, objective: Objective) -> tuple[float, float]:
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        mine = range(self.state.data_rank, self.count, self.state.data_size)
        for first in range(0, len(mine), self.micro):
            batch, _ = micro_batch_of(self.sequences, mine[first : first + self.micro], objective, self.seed)
            out = model(*batch.to(self.device).arguments)
            totals += torch.stack([out.cross_entropy.double(), out.right.double(), totals.new_tensor(out.labelled)])
        dist.all_reduce(totals, group=self.state.data_group)
        loss, right, labelled = totals.tolist()
        return loss / max(labelled, 1), right / max(labelled, 1)

    def unigram_loss(self, training: Sequences, weights: list[float]) -> float:
        """Loss in nats, on the masked tokens, of always answering with the training corpora's token frequencies.

        The distribution covers ordinary tokens only, with one count added to each; it is the floor of a model that has
        learned nothing of context.
        """
        frequencies = np.zeros(training.vocabulary.size)
        for corpus, weight in zip(training.corpora, weights, strict=True):
            counts = np.bincount(corpus.sample(UNIGRAM_TOKENS), minlength=len(frequencies))
            frequencies += weight * counts / counts.sum() * UNIGRAM_TOKENS
        ordinary = training.vocabulary.ordinary()
        probabilities = np.zeros_like(frequencies)
        probabilities[ordinary] = (frequencies[ordinary] + 1) / (frequencies[ordinary] + 1).sum()
        batch = self.sequences.read(range(self.count))
        labels = self.masked.apply(batch.tokens, batch.lengths, self.seed, np.arange(self.count)).labels
        return float(-np.log(probabilities[labels]).mean())
