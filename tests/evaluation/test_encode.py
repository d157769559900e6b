"""Examples as features and outputs as predictions: where words begin, what is padded, what an answer is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from megatron_detour.evaluation.task_types import TASK_TYPES
from megatron_detour.evaluation.task_types.encode import IGNORED, Encoder, was_cut
from megatron_detour.evaluation.task_types.token_classification import first_tokens


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


WORDS = ["La", "patiente", "de", "38.5", "°C", "œdème", "(", "l'", "été", ")", "metformin"]


def test_a_word_s_first_token_is_found_whatever_includes_the_space(tokenizer):
    encoded = tokenizer(" ".join(WORDS), return_offsets_mapping=True)
    starts = first_tokens(WORDS, encoded["offset_mapping"])
    assert starts == sorted(set(starts)) and len(starts) == len(WORDS)
    ends = [*starts[1:], len(encoded["input_ids"]) - 1]
    read = [tokenizer.decode(encoded["input_ids"][a:b]).strip() for a, b in zip(starts, ends, strict=True)]
    assert read == WORDS


@pytest.mark.parametrize("untrimmed", [False, True])
def test_first_tokens_by_hand(untrimmed):
    # "ab c de", as [CLS] a b _c _ d e [SEP], the spaces within the offsets or not
    before = 1 if untrimmed else 0
    offsets = [(0, 0), (0, 1), (1, 2), (3 - before, 4), (4, 5), (5, 6), (6, 7), (0, 0)]
    assert first_tokens(["ab", "c", "de"], offsets) == [1, 3, 5]
    assert first_tokens(["ab", "c", "de"], offsets[:3]) == [1, -1, -1]  # cut off
    assert first_tokens(["ab", "?", "de"], [(0, 0), (0, 2), (5, 7), (0, 0)]) == [1, -1, 2]  # a word without a token


def words_example(count: int) -> dict:
    tags = ["B-X" if i % 3 == 0 else "O" for i in range(count)]
    return {"tokens": [WORDS[i % len(WORDS)] for i in range(count)], "tags": tags}


@pytest.mark.parametrize("head", ["tokens", "span"])
def test_tags_come_back_and_cut_words_are_no_entities(tokenizer, head):
    encoder = Encoder(TASK_TYPES["token-classification"].with_head(head), ("O", "B-X", "I-X"), tokenizer, 40)
    examples = [words_example(30), words_example(4)]
    features = encoder(examples)
    assert [was_cut(feature, 40) for feature in features] == [True, False]
    batch = encoder.kind.collate(features, tokenizer.pad_token_id)
    assert batch["input_ids"].shape == (2, 40) and not batch["attention_mask"][1, -1]
    assert (batch["labels"] != IGNORED).sum() == sum(s >= 0 for f in features for s in f["word_starts"])
    assert batch["labels"].shape == ((2, 40) if head == "tokens" else (2, 30))
    decoded = encoder.decode(features, batch["labels"].numpy())
    assert decoded[1] == examples[1]["tags"]
    known = sum(start >= 0 for start in features[0]["word_starts"])
    assert 5 < known < 30
    assert decoded[0] == examples[0]["tags"][:known] + ["O"] * (30 - known)
    assert encoder.gold(examples) == [example["tags"] for example in examples]


def test_texts_and_pairs(tokenizer):
    encoder = Encoder(TASK_TYPES["classification"], ("no", "yes"), tokenizer, 64)
    pair = {"text": "the nurse", "text_b": "the surgeon", "label": "yes"}
    features = encoder([pair, pair | {"label": "no"}])
    assert [feature["labels"] for feature in features] == [1, 0]
    assert features[0]["input_ids"].count(tokenizer.sep_token_id) == 2
    assert encoder([{**pair, "text_b": None}])[0]["input_ids"].count(tokenizer.sep_token_id) == 1
    assert encoder.decode(features, np.array([[0.0, 1.0], [3.0, -1.0]])) == ["yes", "no"]


def test_several_labels_and_scores(tokenizer):
    text = {"text": "the nurse", "text_b": None}
    encoder = Encoder(TASK_TYPES["multi-label"], ("a", "b", "c"), tokenizer, 64)
    features = encoder([text | {"labels": ["c", "a"]}, text | {"labels": []}])
    assert encoder.kind.collate(features, 0)["labels"].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert encoder.decode(features, np.array([[0.1, -0.1, 2], [-1, -1, -1.0]])) == [["a", "c"], []]
    examples = [text | {"score": score} for score in (0.0, 2.0, 4.0)]
    similarity = TASK_TYPES["similarity"]
    encoder = Encoder(similarity, (), tokenizer, 64, similarity.fit(examples))
    values = np.array([[feature["labels"]] for feature in encoder(examples)])
    assert values.mean() == pytest.approx(0) and values.std() == pytest.approx(1)
    assert encoder.decode([{}] * 3, values) == pytest.approx([0, 2, 4])


def test_questions_of_different_numbers_of_options(tokenizer):
    three = {"question": "who", "options": ["the nurse", "a child", "an old man"], "answers": [2]}
    two = {"question": "what", "options": ["the dose", "some pain"], "answers": [0]}
    one = Encoder(TASK_TYPES["multiple-choice"], (), tokenizer, 64)
    features = one([three, two])
    batch = one.kind.collate(features, tokenizer.pad_token_id)
    assert batch["input_ids"].shape[:2] == (2, 3)
    assert torch.equal(batch["input_ids"][1, 2], batch["input_ids"][1, 0])  # repeated, but without a label
    assert batch["labels"].tolist() == [[0, 0, 1], [1, 0, IGNORED]]
    logits = np.array([[0.0, 1.0, 3.0], [-2.0, -1.0, 9.0]])
    assert one.decode(features, logits) == [2, 1]
    assert one.gold([three, two]) == [2, 0]
    several = Encoder(TASK_TYPES["multiple-answer"], (), tokenizer, 64)
    assert several.decode(features, logits) == [[1, 2], [1]]  # none is likely for the second: the likeliest


def test_a_tokenizer_without_a_first_token_is_refused(tokenizer_folder):
    from tokenizers.processors import ByteLevel

    from megatron_detour.errors import DetourError

    bare = AutoTokenizer.from_pretrained(tokenizer_folder)
    bare.backend_tokenizer.post_processor = ByteLevel()
    encoder = Encoder(TASK_TYPES["classification"], ("no", "yes"), bare, 64)
    with pytest.raises(DetourError, match=r"does not prepend \[CLS\]"):
        encoder([{"text": "the nurse", "text_b": None, "label": "yes"}])


def test_a_word_has_the_same_tokens_wherever_it_stands(tokenizer):
    """The first word of a sentence has a space before it as well: with byte-level BPE it would be another word."""
    encoder = Encoder(TASK_TYPES["token-classification"], ("O",), tokenizer, 64)
    (feature,) = encoder([{"tokens": ["dose", "of", "dose"], "tags": ["O"] * 3}])
    ids, starts = feature["input_ids"], feature["word_starts"]
    first, last = ids[starts[0] : starts[1]], ids[starts[2] : -1]
    assert first == last and tokenizer.decode(first).strip() == "dose"
