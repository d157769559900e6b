"""Occurrences of listed phrases: in any document of a batch, as whole words, with and without a space before them."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.entities import Entities
from megatron_detour.tokenizer.vocabulary import load_tokenizer, load_vocabulary
from megatron_detour.tokenizer.word_boundaries import Words

EVEN_BEGINS = Words(np.arange(8) % 2 == 1, np.ones(8, dtype=bool))  # odd ids continue a word


def naive(phrases: list[list[int]], documents: list[list[int]]) -> tuple[set[int], set[int]]:
    """The positions that `find` returns, from its definition."""
    inside, borders, offset = set(), set(), 0
    for ids in documents:
        edges = {0, len(ids), *(i for i, token in enumerate(ids) if token % 2 == 0)}
        longest = {}
        for first in edges:
            ends = {first + len(p) for p in phrases if ids[first : first + len(p)] == p}
            if ends & edges:
                longest[first] = max(ends & edges)
        inside |= {offset + place for first, end in longest.items() for place in range(first, end)}
        for first, end in longest.items():
            borders |= {offset + edge for edge in (first, end) if not any(a < edge < b for a, b in longest.items())}
        offset += len(ids)
    return inside, borders - {offset}


ids = st.integers(0, 7)


@given(
    phrases=st.lists(st.lists(ids, min_size=1, max_size=4), min_size=1, max_size=8),
    documents=st.lists(st.lists(ids, min_size=1, max_size=12), min_size=1, max_size=6),
)
def test_occurrences_are_those_of_the_definition(phrases, documents):
    entities = Entities.from_ids(phrases, EVEN_BEGINS, 8)
    listed, begins = entities.find(np.concatenate(documents), np.array([len(document) for document in documents]))
    found = set(np.flatnonzero(listed).tolist()), set(np.flatnonzero(begins).tolist())
    assert found == naive(phrases, documents)


@pytest.fixture(scope="module")
def from_file(tokenizer_folder, tmp_path_factory):
    file, path = tokenizer_folder / "tokenizer.json", tmp_path_factory.mktemp("lists") / "words.txt"
    vocabulary = load_vocabulary(tokenizer_folder)
    words = Words.from_file(file, vocabulary)

    def read(content: bytes) -> Entities:
        path.write_bytes(content)
        return Entities.from_file(str(path), file, vocabulary, words)

    return read


def test_phrases_of_a_file_are_found_in_texts(from_file, tokenizer_folder):
    content = "\ufeffmetformin\r\n\n  toux sèche \nœdema\nMetformin\npain\n".encode()
    entities, tokenizer = from_file(content), load_tokenizer(tokenizer_folder)
    assert entities.sha256 == hashlib.sha256(content).hexdigest()
    text = "Metformin, une toux sèche and toux; an œdema (metformin) and metforminate, painless pain."
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    listed, begins = entities.find(tokens, np.array([len(tokens)]))
    occurrences = [tokenizer.decode(part).strip() for part in np.split(tokens, np.flatnonzero(begins))]
    kept = [text for text, is_listed in zip(occurrences, [False, *listed[begins]], strict=True) if is_listed]
    assert kept == ["Metformin", "toux sèche", "œdema", "metformin", "pain"]


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "no words that the tokenizer knows"), (b"\xff\xfe", "not a text file in UTF-8")],
)
def test_a_file_without_words_is_refused(from_file, content, says):
    with pytest.raises(DetourError, match=rf"^\S+words\.txt: {says}"):
        from_file(content)


def test_a_file_that_is_not_there_is_refused(tokenizer_folder):
    vocabulary = load_vocabulary(tokenizer_folder)
    with pytest.raises(DetourError, match=r"^/nowhere/words\.txt: cannot be read: No such file or directory$"):
        Entities.from_file("/nowhere/words.txt", tokenizer_folder / "tokenizer.json", vocabulary, EVEN_BEGINS)
