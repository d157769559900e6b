"""A linear-chain CRF over entity boundaries, and decoding of the best entities given CRF and span scores.

Tags are O and, for each entity type, B (begin), I (inside), L (last) and U (unit, an entity of one word), as in Ratinov
and Roth (2009). Paths correspond one-to-one to sets of entities that neither overlap nor nest.

Shapes: n sentences, w words, k tags (1 + 4 per type), t types.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

O_TAG = 0
BEGIN, INSIDE, LAST, UNIT = range(4)  # offsets of a type's four tags
# Far below any score, yet finite: a path through it has probability 0 and a finite gradient.
FORBIDDEN = -1e4

Span = tuple[int, int, int]  # first word, last word, type


def tag_of(kind: int, part: int) -> int:
    return 1 + 4 * kind + part


def path_tags(spans: list[Span], words: int) -> list[int]:
    """Return the path of non-overlapping entities."""
    tags = [O_TAG] * words
    for first, last, kind in spans:
        tags[first : last + 1] = [tag_of(kind, INSIDE)] * (last + 1 - first)
        tags[first], tags[last] = tag_of(kind, BEGIN), tag_of(kind, LAST)
        if first == last:
            tags[first] = tag_of(kind, UNIT)
    return tags


def legal_moves(types: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the allowed transitions, bool [k, k], and the allowed first and last tags, bool [k] each."""
    begins, ends = torch.zeros(1 + 4 * types, dtype=torch.bool), torch.zeros(1 + 4 * types, dtype=torch.bool)
    begins[O_TAG] = ends[O_TAG] = True
    begins[1 + BEGIN :: 4] = begins[1 + UNIT :: 4] = True
    ends[1 + LAST :: 4] = ends[1 + UNIT :: 4] = True
    moves = ends[:, None] & begins[None, :]
    for kind in range(types):
        for part in (BEGIN, INSIDE):
            moves[tag_of(kind, part), [tag_of(kind, INSIDE), tag_of(kind, LAST)]] = True
    return moves, begins, ends


class BoundaryCrf(nn.Module):
    """Learned transitions between the tags of `types` entity types; invalid transitions are excluded."""

    def __init__(self, types: int) -> None:
        super().__init__()
        self.types = types
        moves, begins, ends = legal_moves(types)
        self.transitions = nn.Parameter(torch.zeros(moves.shape))
        self.first = nn.Parameter(torch.zeros(begins.shape))
        self.final = nn.Parameter(torch.zeros(ends.shape))
        for name, legal in (("moves", moves), ("begins", begins), ("ends", ends)):
            self.register_buffer(name, legal, persistent=False)

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return transition [k, k], first [k] and final [k] scores in float32, FORBIDDEN for invalid ones."""
        return (
            self.transitions.float().masked_fill(~self.moves, FORBIDDEN),
            self.first.float().masked_fill(~self.begins, FORBIDDEN),
            self.final.float().masked_fill(~self.ends, FORBIDDEN),
        )

    def log_partition(self, emissions: Tensor, lengths: Tensor) -> Tensor:
        """Return the log partition function, [n].

        emissions: float [n, w, k]; lengths: int64 [n], at least 1; words beyond a sentence's length are ignored.
        """
        transitions, first, final = self.scores()
        reached = first + emissions[:, 0]
        for at in range(1, emissions.shape[1]):
            step = (reached[:, :, None] + transitions).logsumexp(1) + emissions[:, at]
            reached = torch.where((at < lengths)[:, None], step, reached)
        return (reached + final).logsumexp(1)

    def path_score(self, emissions: Tensor, lengths: Tensor, tags: Tensor) -> Tensor:
        """Return the score of one path per sentence, [n]; tags: int64 [n, w], any valid tag beyond the length."""
        transitions, first, final = self.scores()
        within = torch.arange(emissions.shape[1], device=emissions.device) < lengths[:, None]
        seen = emissions.gather(2, tags[:, :, None]).squeeze(2)
        moved = F.pad(transitions[tags[:, :-1], tags[:, 1:]], (1, 0))
        last = tags.gather(1, lengths[:, None] - 1).squeeze(1)
        return ((seen + moved) * within).sum(1) + first[tags[:, 0]] + final[last]

    def loss(self, emissions: Tensor, lengths: Tensor, tags: Tensor) -> Tensor:
        """Return the negative log-likelihood of the paths in nats, [n]."""
        return self.log_partition(emissions, lengths) - self.path_score(emissions, lengths, tags)


def best_spans(crf: BoundaryCrf, emissions: np.ndarray, span_scores: np.ndarray, longest: int) -> list[Span]:
    """Return the entities of the path with the highest sum of CRF score and span scores.

    emissions: float [w, k]; span_scores: float [t, w, w], first word by last word. Entities have at most `longest`
    words. With zero span scores this is Viterbi decoding; otherwise semi-Markov Viterbi decoding (Sarawagi and Cohen,
    2004), whose states are the tags that may end a segment.
    """
    transitions, first, final = (scores.detach().cpu().double().numpy() for scores in crf.scores())
    emissions, span_scores = emissions.astype(np.float64), span_scores.astype(np.float64)
    words, kinds = len(emissions), np.arange(crf.types)
    begin, inside, last, unit = (1 + 4 * kinds + part for part in (BEGIN, INSIDE, LAST, UNIT))
    inner = np.vstack([np.zeros(crf.types), np.cumsum(emissions[:, inside], axis=0)])  # over the words before this one
    entered = np.zeros((words, len(first)))  # best score before a word plus the transition to its tag
    came_from = np.zeros((words, len(first)), dtype=int)
    best = np.full((words, len(first)), -np.inf)  # best score up to a word whose segment ends with this tag
    lengths = np.ones((words, len(first)), dtype=int)
    for at in range(words):
        moves = best[at - 1][:, None] + transitions if at else None
        entered[at] = first if moves is None else moves.max(0)
        came_from[at] = 0 if moves is None else moves.argmax(0)
        best[at, O_TAG] = entered[at, O_TAG] + emissions[at, O_TAG]
        best[at, unit] = entered[at, unit] + emissions[at, unit] + span_scores[:, at, at]
        starts = np.arange(max(0, at - longest + 1), at)
        if len(starts):
            between = (at - starts - 1)[:, None]  # words inside
            chain = np.where(
                between > 0,
                transitions[begin, inside] + (between - 1) * transitions[inside, inside] + transitions[inside, last],
                transitions[begin, last],
            )
            chain = chain + inner[at] - inner[starts + 1] + emissions[starts][:, begin] + emissions[at, last]
            reached = entered[starts][:, begin] + chain + span_scores[:, starts, at].T
            chosen = reached.argmax(0)
            best[at, last] = reached[chosen, kinds]
            lengths[at, last] = at + 1 - starts[chosen]
    return _spans_back(best, final, came_from, lengths)


def _spans_back(best: np.ndarray, final: np.ndarray, came_from: np.ndarray, lengths: np.ndarray) -> list[Span]:
    at, tag = len(best) - 1, int((best[-1] + final).argmax())
    spans: list[Span] = []
    while at >= 0:
        start = at + 1 - int(lengths[at, tag])
        entering = tag
        if tag != O_TAG:
            kind, part = divmod(tag - 1, 4)
            spans.append((start, at, kind))
            entering = tag if part == UNIT else tag_of(kind, BEGIN)
        at, tag = start - 1, int(came_from[start, entering])
    return spans[::-1]
