"""Occurrences of a user's words and phrases in token ids.

The ids of all phrases form a trie, whose edges are one sorted array: a batch's occurrences are followed together.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import Vocabulary, load_tokenizer

if TYPE_CHECKING:
    from megatron_detour.tokenizer.word_boundaries import Words


@dataclass(frozen=True)
class Entities:
    """The phrases of a file as they are written, with and without a space before them."""

    words: Words
    size: int  # of the vocabulary
    edges: np.ndarray  # int64 [edges], ascending: node * size + id
    targets: np.ndarray  # int64 [edges]: the nodes that they lead to
    complete: np.ndarray  # bool [nodes]: whether a phrase ends here
    sha256: str  # of the file

    @classmethod
    def from_file(cls, file: str, tokenizer_file: Path, vocabulary: Vocabulary, words: Words) -> Entities:
        """Read a text file with one phrase per line. Raises DetourError, also for a file without any."""
        try:
            content = Path(file).read_bytes()
            lines = content.decode("utf-8-sig").splitlines()
        except OSError as error:
            raise DetourError(f"{file}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise DetourError(f"{file}: not a text file in UTF-8") from None
        phrases = dict.fromkeys(line.strip() for line in lines if line.strip())
        variants = [variant for phrase in phrases for variant in (phrase, f" {phrase}")]
        special = set(vocabulary.special_ids)  # an unknown character would match any other
        encoded = load_tokenizer(tokenizer_file).encode_batch(variants, add_special_tokens=False)
        known = [one.ids for one in encoded if one.ids and special.isdisjoint(one.ids)]
        if not known:
            raise DetourError(f"{file}: no words that the tokenizer knows; write one word or phrase per line")
        return cls.from_ids(known, words, vocabulary.size, hashlib.sha256(content).hexdigest())

    @classmethod
    def from_ids(cls, phrases: list[list[int]], words: Words, size: int, sha256: str = "") -> Entities:
        nodes: dict[tuple[int, int], int] = {}  # by parent and id; the root is 0
        last = set()
        for phrase in phrases:
            node = 0
            for token in phrase:
                node = nodes.setdefault((node, token), len(nodes) + 1)
            last.add(node)
        edges = np.array([node * size + token for node, token in nodes])
        order = np.argsort(edges)
        complete = np.isin(np.arange(len(nodes) + 1), list(last))
        return cls(words, size, edges[order], order + 1, complete, sha256)

    def find(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find phrases that begin and end with words, the longest at each place; overlapping ones are one occurrence.

        tokens: int64 [positions], documents concatenated; lengths: int64 [documents]. Return two bool [positions]:
        whether each is part of an occurrence, and whether an occurrence or the text after one begins there.
        """
        starts, ends = self.words.first_tokens(tokens, lengths), np.cumsum(lengths)
        begins_word = np.zeros(len(tokens) + 1, dtype=bool)
        begins_word[starts] = begins_word[-1] = True
        document_ends = ends[ends.searchsorted(starts, side="right")]
        longest, node, depth = np.zeros_like(starts), np.zeros_like(starts), 0
        going = np.arange(len(starts))
        while len(going):
            going = going[starts[going] + depth < document_ends[going]]
            keys = node[going] * self.size + tokens[starts[going] + depth]
            edge = np.minimum(self.edges.searchsorted(keys), len(self.edges) - 1)
            there = self.edges[edge] == keys
            going = going[there]
            node[going], depth = self.targets[edge[there]], depth + 1
            longest[going[self.complete[node[going]] & begins_word[starts[going] + depth]]] = depth
        starts, ends = starts[longest > 0], (starts + longest)[longest > 0]
        reach = np.maximum.accumulate(ends)
        begins = starts[starts >= np.append(0, reach)[:-1]]
        past = reach[np.append(starts[1:] >= reach[:-1], True)[: len(reach)]]
        change, is_border = np.zeros((2, len(tokens) + 1), dtype=np.int64)
        change[begins] += 1
        change[past] -= 1
        is_border[begins] = is_border[past] = 1
        return np.cumsum(change[:-1]) > 0, is_border[:-1] > 0
