"""Cleaning: what is left out is counted, the first of its kind stays, and the held-out share follows from the text."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers

from megatron_detour.corpus import duplicates
from megatron_detour.corpus.examine import verify
from megatron_detour.corpus.filters import PERMUTATIONS, Cleaner, rows_per_band
from megatron_detour.corpus.options import BuildOptions
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import load_tokenizer
from tests.conftest import build, sentences, write_jsonl


def texts_at(prefix, tokenizer) -> list[str]:
    corpus, decoder = IndexedCorpus(prefix), load_tokenizer(tokenizer)
    return [decoder.decode(corpus.tokens(i).tolist()) for i in range(len(corpus))]


def test_lengths_normal_form_and_language():
    removed: Counter[str] = Counter()
    french = "Le patient a de la fièvre depuis hier et prend du paracétamol."
    english = "The patient has had a fever since yesterday and takes paracetamol."
    cleaner = Cleaner(BuildOptions("c", "t", normalize="NFC", min_chars=5, max_chars=80, language=("fr",)))
    texts = [french, english, "Bon", french * 2, french.replace("è", "e\u0300")]
    assert cleaner.clean(texts, removed) == [french, french]
    assert removed == {"language": 1, "short": 1, "long": 1}
    assert Cleaner(BuildOptions("c", "t")).clean(texts, removed) == texts


def test_removed_documents_are_counted_in_the_manifest(tmp_path, tokenizer_folder):
    texts = ["the patient takes metformin", "a", "the nurse refuses the dose", "the patient takes metformin", "b" * 90]
    path = write_jsonl(tmp_path / "t.jsonl", [*texts, " "])
    manifest = build([path], tmp_path / "c", tokenizer_folder, min_chars=2, max_chars=80, deduplicate="exact")
    assert manifest.removed == {"short": 1, "long": 1, "duplicate": 1}
    assert manifest.records == 6 == manifest.documents + manifest.empty + sum(manifest.removed.values())
    assert texts_at(tmp_path / "c", tokenizer_folder) == [texts[0], texts[2]]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 20), min_size=1, max_size=60), st.integers(1, 30), st.integers(1, 40))
def test_the_first_of_equal_documents_stays(tmp_path, values, part, in_memory):
    hashes = np.array([[(value % 3, value)] for value in values], dtype="<u8")
    parts = [hashes[i : i + part] for i in range(0, len(hashes), part)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "IN_MEMORY", in_memory)
        first = duplicates.first_occurrences(parts, len(hashes), tmp_path)
    assert first.tolist() == [value not in values[:i] for i, value in enumerate(values)]
    assert not list(tmp_path.iterdir())


def test_similar_documents_meet_by_way_of_others(tmp_path):
    bands = np.array([[1, 5, 7], [2, 6, 4], [3, 5, 4], [9, 8, 1]], dtype="<u8")  # the last 1 is of another band
    keys = np.stack([bands, np.broadcast_to(np.arange(3, dtype="<u8"), bands.shape)], axis=2)
    assert duplicates.first_occurrences([keys], 4, tmp_path).tolist() == [True, False, False, True]


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_bands_meet_from_about_the_similarity_on(similarity):
    """Pairs of documents that share a known part of their 5-grams, well above and well below the threshold."""
    cleaner = Cleaner(BuildOptions("c", "t", deduplicate="near", similarity=similarity))
    rng = random.Random(3)

    def meet(jaccard: float) -> bool:
        words = [f"w{rng.randrange(10**9)}" for _ in range(400)]
        # Of n common and m own shingles on each side, n / (n + 2 m) are shared.
        own = round(400 * (1 - jaccard) / (1 + jaccard))
        other = words[: 400 - own] + [f"v{rng.randrange(10**9)}" for _ in range(own)]
        bands = cleaner.columns([" ".join(words), " ".join(other)], np.array([1, 1]))["keys"]
        return bool((bands[0] == bands[1]).all(axis=1).any())

    above, below = min(similarity + 0.12, 1.0), similarity - 0.25
    assert sum(meet(above) for _ in range(40)) >= 30
    assert sum(meet(below) for _ in range(40)) <= 10
    rows = rows_per_band(similarity)
    assert PERMUTATIONS // rows * rows <= PERMUTATIONS


def test_near_duplicates_of_real_shape(tmp_path, tokenizer_folder):
    """Texts without words are not all alike; short and long copies with a word changed are."""
    rng = random.Random(9)
    long = [sentences(rng, 40) for _ in range(10)]
    changed = [text.replace("today", "to-day", 1) for text in long]
    odd = ["...", "---", "12", "漢字"]
    path = write_jsonl(tmp_path / "t.jsonl", [*long, *odd, *changed, odd[0], long[3]])
    manifest = build([path], tmp_path / "c", tokenizer_folder, deduplicate="near")
    assert manifest.removed == {"duplicate": 12}
    assert manifest.documents == len(long) + len(odd)


def test_the_held_out_share_follows_from_the_text(tmp_path, tokenizer_folder):
    rng = random.Random(10)
    texts = [f"{i} {sentences(rng, 1)}" for i in range(1_500)]
    first = build([write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "a", tokenizer_folder, held_out=0.1)
    shuffled = [*texts, *texts[:200]]
    rng.shuffle(shuffled)
    build([write_jsonl(tmp_path / "b.jsonl", shuffled)], tmp_path / "b", tokenizer_folder, held_out=0.1)
    apart = {name: texts_at(tmp_path / f"{name}.heldout", tokenizer_folder) for name in "ab"}
    kept = {name: texts_at(tmp_path / name, tokenizer_folder) for name in "ab"}
    assert set(apart["a"]) == set(apart["b"])  # whatever the order, and copies go the same way
    assert not set(kept["b"]) & set(apart["b"])
    assert sorted(kept["a"] + apart["a"]) == sorted(texts)
    assert 0.07 < len(apart["a"]) / len(texts) < 0.13
    other = read_manifest(tmp_path / "a.heldout")
    assert (first.held_out, other.held_out) == (other.documents, first.documents)


@pytest.mark.parametrize(
    "options", [{"deduplicate": "near"}, {"deduplicate": "exact", "held_out": 0.5}, {"min_chars": 30}]
)
def test_files_and_blocks_without_documents(tmp_path, tokenizer_folder, options):
    write_jsonl(tmp_path / "a.jsonl", [" ", ""])
    write_jsonl(tmp_path / "b.jsonl", [f"number {i} of the texts that are no copies" for i in range(30)])
    write_jsonl(tmp_path / "c.jsonl", ["\n", "x"] if "min_chars" in options else ["\n"])
    (tmp_path / "d.txt").write_text("")
    manifest = build(
        [tmp_path / f"{name}" for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.txt")],
        tmp_path / "c",
        tokenizer_folder,
        **options,
    )
    assert manifest.documents + manifest.held_out + sum(manifest.removed.values()) >= 30
    accounted = manifest.documents + manifest.held_out + manifest.empty + sum(manifest.removed.values())
    assert manifest.records == accounted


def test_documents_of_which_the_tokenizer_leaves_nothing_are_empty(tmp_path, tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder)
    tokenizer.normalizer = normalizers.Replace(Regex("[\x00-\x1f\u200b]"), "")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = write_jsonl(tmp_path / "t.jsonl", ["\u200b", "one text", "\x00\x01", "another"])
    manifest = build([path], tmp_path / "c", tmp_path / "tokenizer.json", engine="tokenizers")
    assert (manifest.documents, manifest.empty) == (2, 2)
    assert [len(text) > 2 for text in texts_at(tmp_path / "c", tmp_path / "tokenizer.json")] == [True, True]
    verify(str(tmp_path / "c"))


def test_an_unknown_language_is_refused():
    with pytest.raises(DetourError, match="--language: py3langid does not support 'english'; it supports ace af"):
        Cleaner(BuildOptions("c", "t", language=("fr", "english")))
