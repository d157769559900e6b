"""The span head for French entity recognition: BiLSTM, CRF and biaffine scores of spans on an encoder.

Sources. The paper gives "BiLSTM(400 x 3) + CRF + biaffine(64), 4,000 steps, lr 5e-5 encoder / 1e-3 head, batch
16". All of these stand together in tabib, an open framework for French biomedical models whose examples name the
paper's own; it ports the head of Wajsbürt's NLStruct (models/bitag.py, recipes/train_ner.py). There: a linear layer and
GELU to 400; three bidirectional LSTMs of 400 in all (200 a direction), each let in by a gate g = sigmoid(linear(h)) as
LayerNorm((1 - g) x + g h); a CRF over O, B, I, L, U; for each span of 40 words at most and each type, a biaffine score
(begin . end) / sqrt(64) + bias of two projections; dropout 0.4; AdamW with weight decay 0.01, a warm-up of 10%, then
linear to 0, gradients clipped at 10. tabib has sub-tokens for words and one loss, the binary cross-entropy of biaffine
scores plus the CRF's log-marginals; it takes spans above one half and drops those that overlap a better one.
NLStruct averages the sub-tokens of a word and sums two losses, the CRF's negative log-likelihood and the binary
cross-entropy of the biaffine scores of all spans; it takes the spans of Viterbi's paths, one chain a type, that hold
against the biaffine scores. Both allow nested entities.

What is chosen. Layers as in tabib, words and losses as in NLStruct, each loss divided by the number of words in the
batch; one chain for all types, since BIO tags hold no nested entities; a start of the biaffine bias at a probability of
1%. Decoding gives the set of entities that is the most probable under the product of both models: the CRF's
log-probability of the set plus the biaffine log-odds of its spans, exactly, by dynamic programming (crf.py); with
nothing nested, NLStruct's way would leave the biaffine scores without a say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.task_types.span.crf import (
    BEGIN,
    INSIDE,
    LAST,
    UNIT,
    BoundaryCrf,
    Span,
    best_spans,
    path_tags,
)

LONGEST_SPAN = 40  # words
RARE = math.log(0.01 / 0.99)


@dataclass
class SpanOutput(ModelOutput):
    """loss: nats per word, []; logits: float [batch, words, BIO tags], each word's scores before the CRF, 0 for
    padding; tags, only outside training: int64 [batch, words], the decoded ids of BIO tags, O for padding."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    tags: Tensor | None = None


class SpanTagger(nn.Module):
    """Entity recognition with a span head, for transformers' Trainer. `labels` are the entity types.

    BIO tags have the ids of Dataset.labels: O, then B-X and I-X by type in alphabetical order. Raises DetourError for
    missing or duplicate types, and an odd `hidden`.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        labels: Sequence[str],
        hidden: int = 400,
        layers: int = 3,
        biaffine: int = 64,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        if not labels or len(set(labels)) < len(labels):
            raise DetourError(f"the span head needs distinct entity types, got {', '.join(labels) or 'none'}")
        if hidden % 2:
            raise DetourError(f"hidden {hidden}: give an even number; each direction of the BiLSTM has half of it")
        self.labels = tuple(sorted(labels))
        self.tags = ("O", *(f"{part}-{label}" for label in self.labels for part in "BI"))
        self.encoder = encoder
        self.context = GatedLstm(encoder.config.hidden_size, hidden, layers, dropout)
        self.dropout = nn.Dropout(dropout)
        self.emit = nn.Linear(hidden, 1 + 4 * len(self.labels))
        self.crf = BoundaryCrf(len(self.labels))
        self.spans = Biaffine(hidden, len(self.labels), biaffine)

    @property
    def base_model(self) -> PreTrainedModel:
        """The encoder, named as in transformers' models with a head."""
        return self.encoder

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, word_starts: Tensor, labels: Tensor | None = None
    ) -> SpanOutput:
        """Score the words of sentences and, with `labels`, compute the loss.

        input_ids, attention_mask: int64 [batch, tokens]. word_starts: int64 [batch, words], the index of each word's
        first sub-token, ascending; -1 for padding, and for words that are truncated or have no token. labels: int64
        [batch, words], ids of BIO tags, -100 for padding; an I-X that continues nothing begins an entity.
        """
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # Autocast would run the LSTM in fp16 on a GPU; the head is cheap compared with the encoder.
        with torch.autocast(states.device.type, enabled=False):
            return self._tag(states.float(), input_ids, attention_mask, word_starts, labels)

    def _tag(
        self, states: Tensor, input_ids: Tensor, attention_mask: Tensor, word_starts: Tensor, labels: Tensor | None
    ) -> SpanOutput:
        logits = states.new_zeros((*word_starts.shape, len(self.tags)), dtype=torch.float32)
        tags = torch.zeros_like(word_starts)
        places = [(row >= 0).nonzero().squeeze(1) for row in word_starts.cpu()]  # of words that have a token
        rows = [number for number, place in enumerate(places) if len(place)]
        if not rows:
            return SpanOutput(states.sum() * 0 if labels is not None else None, logits, None if self.training else tags)
        here = torch.tensor(rows, device=states.device)
        ends = _ends_of_text(input_ids, attention_mask, self.encoder.config)
        words, lengths = _word_means(states[here], word_starts[here], ends[here], [places[row] for row in rows])
        context = self.dropout(self.context(words, lengths))
        emissions, span_scores = self.emit(context).float(), self.spans(context).float()
        as_bio = self._as_bio(emissions)
        for number, row in enumerate(rows):
            logits[row, places[row].to(states.device)] = as_bio[number, : len(places[row])]
        loss = None
        if labels is not None:
            gold = [_gold_spans(labels[row].cpu()[places[row]].tolist()) for row in rows]
            loss = self._loss(emissions, span_scores, lengths.to(states.device), gold)
        if self.training:
            return SpanOutput(loss, logits)
        for number, row in enumerate(rows):
            for first, last, kind in self._best(emissions[number], span_scores[number], len(places[row])):
                begin, end = int(places[row][first]), int(places[row][last])
                tags[row, begin : end + 1] = 2 + 2 * kind
                tags[row, begin] = 1 + 2 * kind
        return SpanOutput(loss, logits, tags)

    @torch.no_grad()
    def decode(
        self, input_ids: Tensor, attention_mask: Tensor, word_starts: Tensor, words: Sequence[int] | None = None
    ) -> list[list[str]]:
        """Return the BIO tags of each sentence's words, without dropout.

        `words` is the number of words of each sentence, truncated ones included; by default all columns of word_starts.
        """
        training = self.training
        self.eval()
        try:
            ids = self(input_ids, attention_mask, word_starts).tags.tolist()
        finally:
            self.train(training)
        counts = words if words is not None else [len(row) for row in ids]
        return [[self.tags[tag] for tag in row[:count]] for row, count in zip(ids, counts, strict=True)]

    def _loss(self, emissions: Tensor, span_scores: Tensor, lengths: Tensor, gold: list[list[Span]]) -> Tensor:
        words = emissions.shape[1]
        paths = torch.tensor([path_tags(spans, words) for spans in gold], device=emissions.device)
        targets = torch.zeros_like(span_scores)
        for row, spans in enumerate(gold):
            for first, last, kind in spans:
                targets[row, kind, first, last] = 1
        span_loss = F.binary_cross_entropy_with_logits(span_scores, targets, reduction="none")
        at = torch.arange(words, device=emissions.device)
        counted = (at[:, None] <= at) & (at < at[:, None] + LONGEST_SPAN) & (at < lengths[:, None, None])
        span_loss = (span_loss * counted[:, None]).sum()
        return (self.crf.loss(emissions, lengths, paths).sum() + span_loss) / lengths.sum()

    def _best(self, emissions: Tensor, span_scores: Tensor, words: int) -> list[Span]:
        scores = span_scores[:, :words, :words].detach().cpu().numpy()
        return best_spans(self.crf, emissions[:words].detach().cpu().numpy(), scores, LONGEST_SPAN)

    def _as_bio(self, emissions: Tensor) -> Tensor:
        """[..., 1 + 4 types] -> [..., 1 + 2 types]: B and U begin, I and L continue."""
        parts = emissions[..., 1:].unflatten(-1, (len(self.labels), 4))
        begins = torch.logaddexp(parts[..., BEGIN], parts[..., UNIT])
        goes_on = torch.logaddexp(parts[..., INSIDE], parts[..., LAST])
        return torch.cat([emissions[..., :1], torch.stack([begins, goes_on], -1).flatten(-2)], -1)


class GatedLstm(nn.Module):
    """Bidirectional LSTMs of total width `width`, each combined with its input by a gate, then a LayerNorm."""

    def __init__(self, inputs: int, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, width)
        self.lstms = nn.ModuleList(
            nn.LSTM(width, width // 2, bidirectional=True, batch_first=True) for _ in range(layers)
        )
        self.gates = nn.ModuleList(nn.Linear(width, 1) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """words: [n, w, inputs]; lengths: int64 [n] on the CPU, at least 1, maximum w. Returns [n, w, width]."""
        hidden = F.gelu(self.enter(words))
        for lstm, gate, norm in zip(self.lstms, self.gates, self.norms, strict=True):
            packed = pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
            out = self.dropout(pad_packed_sequence(lstm(packed)[0], batch_first=True)[0])
            weight = torch.sigmoid(gate(out))
            hidden = norm((1 - weight) * hidden + weight * out)
        return hidden


class Biaffine(nn.Module):
    """Log-odds that a span is an entity, by type: the dot product of its first and last words' projections."""

    def __init__(self, inputs: int, types: int, size: int) -> None:
        super().__init__()
        self.types, self.size = types, size
        self.begin, self.end = nn.Linear(inputs, types * size), nn.Linear(inputs, types * size)
        self.bias = nn.Parameter(torch.full((types,), RARE))

    def forward(self, words: Tensor) -> Tensor:
        """[n, w, inputs] -> [n, types, w, w], first word by last word."""
        begins, ends = (
            project(words).unflatten(-1, (self.types, self.size)).transpose(1, 2) for project in (self.begin, self.end)
        )
        return begins @ ends.transpose(-1, -2) / math.sqrt(self.size) + self.bias[:, None, None]


def _ends_of_text(input_ids: Tensor, attention_mask: Tensor, config: Any) -> Tensor:
    """Return the end of each sentence's text, int64 [batch], excluding a closing special token."""
    tokens = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = (tokens * attention_mask).max(1).values
    closing = torch.zeros_like(last, dtype=torch.bool)
    for name in ("sep_token_id", "eos_token_id"):
        if isinstance(getattr(config, name, None), int):
            closing |= input_ids.gather(1, last[:, None]).squeeze(1) == getattr(config, name)
    return last + 1 - closing.long()


def _word_means(states: Tensor, starts: Tensor, ends: Tensor, places: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean of each word's sub-tokens, [n, w, width], and the number of words, int64 [n] on the CPU.

    A word extends to the first sub-token of the next, the last word to the end of the text.
    """
    lengths = torch.tensor([len(place) for place in places])
    ends = torch.maximum(ends, starts.max(1).values + 1)
    borders = ends[:, None].repeat(1, int(lengths.max()) + 1)
    for row, place in enumerate(places):
        borders[row, : len(place)] = starts[row, place.to(starts.device)]
    at = torch.arange(states.shape[1], device=states.device)
    members = (at >= borders[:, :-1, None]) & (at < borders[:, 1:, None])
    # A matrix product, because index_add_ is not deterministic on a GPU.
    return (members / members.sum(-1, keepdim=True).clamp(min=1)).to(states.dtype) @ states, lengths


def _gold_spans(ids: Iterable[int]) -> list[Span]:
    """Return the entities of BIO ids; ids other than B or I are outside."""
    spans: list[Span] = []
    kind_before = None
    for at, tag in enumerate(ids):
        kind = (tag - 1) // 2 if tag > 0 else None
        if kind is not None:
            goes_on = tag % 2 == 0 and kind == kind_before
            spans.append((spans.pop()[0] if goes_on else at, at, kind))
        kind_before = kind
    return spans
