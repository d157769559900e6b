"""Measures without labels: which words are masked, what models give to them, and what is told of it."""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import ModernBertConfig, ModernBertForMaskedLM, PreTrainedTokenizerFast

from megatron_detour.commands.evaluate import add_intrinsic_arguments, measure_masked_words
from megatron_detour.errors import DetourError
from megatron_detour.evaluation import probes
from megatron_detour.evaluation.masked_words import measure as intrinsic
from megatron_detour.evaluation.masked_words import score as intrinsic_score
from megatron_detour.evaluation.masked_words.figures import FEWEST_DOCUMENTS, SUMS, compared, draws, measured
from megatron_detour.evaluation.masked_words.measure import IntrinsicOptions, measure
from megatron_detour.evaluation.masked_words.positions import (
    DomainRule,
    Window,
    domain_words,
    find_words,
    read_corpus,
    read_words,
    windows_of,
)
from megatron_detour.evaluation.masked_words.score import mask_window, score_windows
from tests.conftest import sentences, write_jsonl

SHAPE = {"seed": 0, "words": 20, "windows": 100, "mask_rate": 0.2}
OPTIONS = {"documents": 20, "windows": 2, "window_words": 30, "resamples": 200, "device": "cpu"}
SPECIAL = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    rng = random.Random(5)
    return write_jsonl(tmp_path_factory.mktemp("texts") / "notes.jsonl", [sentences(rng, 8) for _ in range(20)])


def save_model(folder: Path, tokens: int, seed: int = 0) -> Path:
    """A random model beside the tokenizer of a folder."""
    torch.manual_seed(seed)
    config = ModernBertConfig(
        vocab_size=tokens,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.1,
        max_position_embeddings=512,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
        pad_token_id=3,
    )
    ModernBertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tokenizer_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random"
    shutil.copytree(tokenizer_folder, folder)
    return save_model(folder, 400)


@pytest.fixture(scope="module")
def opened(model_folder):
    return probes.load_model(model_folder)


@pytest.fixture(scope="module")
def taught_folder(model_folder, opened, texts) -> Path:
    """The same model after some steps on other texts of the same kind, where whole words are masked."""
    model, tokenizer = probes.load_model(model_folder)
    rng = random.Random(6)
    windows = [windows_of(0, sentences(rng, 4), **SHAPE | {"seed": seed})[0] for seed in range(640)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for step in range(80):
        batch = [mask_window(window, tokenizer) for window in windows[step * 8 : step * 8 + 8]]
        width = max(len(one.ids) for one in batch)
        ids = torch.tensor([one.ids + [3] * (width - len(one.ids)) for one in batch])
        labels = torch.full_like(ids, -100)
        for row, one in enumerate(batch):
            labels[row, one.positions] = torch.tensor(one.answers)
        model(input_ids=ids, attention_mask=(ids != 3).long(), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = model_folder.parent / "taught"
    shutil.copytree(model_folder, folder)
    model.save_pretrained(folder)
    return folder


def as_fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=512, **SPECIAL)


@pytest.fixture(scope="module")
def word_piece_folder(tmp_path_factory) -> Path:
    """A model with another tokenizer, which splits words into letters and does not tell capitals apart."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyzéèàùœçâêîôû0123456789.,°'’"))
    tokens = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), "patient"]
    tokenizer = Tokenizer(models.WordPiece({token: at for at, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    folder = tmp_path_factory.mktemp("models") / "letters"
    as_fast(tokenizer).save_pretrained(folder)
    return save_model(folder, len(tokens))


# Words and windows


def test_words_are_stretches_of_letters_and_digits():
    text = "L'hôpital_A: 38.5 °C, re\u0301e\u0301l, x², हिन्दी — covid-19."
    found = [text[start:end] for start, end in find_words(text)]
    assert found == ["L", "hôpital", "A", "38", "5", "C", "re\u0301e\u0301l", "x²", "हिन्दी", "covid", "19"]


def test_windows_are_cut_at_words_and_have_the_share_masked():
    text = " ".join(f"word{number}." for number in range(50))
    windows = windows_of(3, text, **SHAPE)
    assert [len(find_words(window.text)) for window in windows] == [20, 20, 10]
    assert " ".join(window.text for window in windows) == text
    assert [len(window.chosen) for window in windows] == [4, 4, 2]
    assert all(word.startswith("word") for window in windows for word in window.words())
    assert windows == windows_of(3, text, **SHAPE)
    for other in (windows_of(4, text, **SHAPE), windows_of(3, text, **SHAPE | {"seed": 1})):
        assert [window.chosen for window in other] != [window.chosen for window in windows]
    assert len(windows_of(3, "one", **SHAPE)[0].chosen) == 1
    assert windows_of(3, "... !", **SHAPE) == []


def test_words_are_chosen_evenly():
    text = " ".join(["word"] * 40)
    chosen = Counter(
        start
        for number in range(400)
        for window in windows_of(number, text, **SHAPE | {"words": 40})
        for start, _ in window.chosen
    )
    assert len(chosen) == 40 and min(chosen.values()) > 50 and max(chosen.values()) < 112  # 80 expected


def test_some_windows_of_a_long_document_are_taken_by_their_numbers():
    text = " ".join(f"word{number}" for number in range(400))
    whole, some = windows_of(1, text, **SHAPE), windows_of(1, text, **SHAPE | {"windows": 3})
    assert len(whole) == 20 and len(some) == 3
    places = [whole.index(window) for window in some]
    assert places == sorted(places) and places != [0, 1, 2]


def test_a_window_has_few_bytes_even_where_words_are_rare():
    text = " ".join(f"a{'-' * 30}" for _ in range(40)) + " " + "x" * 500 + " end of it"
    windows = windows_of(0, text, **SHAPE)
    assert all(len(window.text.encode()) <= 200 for window in windows)
    assert windows[-1].text == "end of it" and len(windows) == 8


def test_documents_are_taken_by_their_numbers(tmp_path):
    path = write_jsonl(tmp_path / "texts.jsonl", [f"Document number {number}" for number in range(50)])
    corpus = read_corpus(path, "text", 0, 10)
    assert len(corpus.documents) == 10 and list(corpus.documents) == sorted(corpus.documents)
    assert all(text == f"Document number {number}" for number, text in corpus.documents.items())
    assert set(read_corpus(path, "text", 0, 5).documents) < set(corpus.documents)
    assert set(read_corpus(path, "text", 1, 10).documents) != set(corpus.documents)
    assert corpus.counts["document"] == 50 and corpus.counts["49"] == 1


def test_domain_words_are_those_that_general_text_lacks():
    here = Counter(dose=4, rare=2, often=40, dna=9, fever=8, also=46, **{"12345": 9})
    there = Counter(often=40, fever=1, also=959)
    # 118 words here and 1,000 there: fever is 68 times as frequent, often 8.5 times, also 0.4 times
    assert domain_words(here, there, DomainRule()) == {"dose", "fever", "often"}
    assert domain_words(here, there, DomainRule(ratio=10)) == {"dose", "fever"}
    assert domain_words(here, there, DomainRule(occurrences=2, letters=3)) == {"dose", "fever", "often", "rare", "dna"}


# Masks and scores


@pytest.mark.parametrize("folder", ["model_folder", "word_piece_folder"])
def test_tokens_of_the_chosen_words_are_masked_and_no_others(folder, request, texts):
    model_path = request.getfixturevalue(folder)
    _, tokenizer = probes.load_model(model_path)
    for text in read_corpus(texts, "text", 0, 20).documents.values():
        for window in windows_of(0, text, **SHAPE):
            masked = mask_window(window, tokenizer)
            encoded = tokenizer(window.text, return_offsets_mapping=True)
            covered = set()
            for at, (start, end) in enumerate(encoded["offset_mapping"]):
                hidden = any(start < past and end > first for first, past in window.chosen)
                assert (masked.ids[at] == tokenizer.mask_token_id) == hidden == (at in masked.positions)
                covered |= set(range(start, end)) if hidden else set()
            assert {at for first, past in window.chosen for at in range(first, past)} <= covered
            assert masked.answers == [encoded["input_ids"][at] for at in masked.positions]
            assert sorted({word for words in masked.words for word in words}) == list(range(len(window.chosen)))


def test_log_likelihood_is_that_of_the_models_logits(opened):
    model, tokenizer = opened
    text = "The patient takes metformin today."
    window = Window(0, text, ((4, 11), (18, 27)))
    encoded = tokenizer(text, return_offsets_mapping=True)
    places = [
        [at for at, (start, end) in enumerate(encoded["offset_mapping"]) if start < past and end > first]
        for first, past in window.chosen
    ]
    ids = torch.tensor([encoded["input_ids"]])
    for at in places[0] + places[1]:
        ids[0, at] = tokenizer.mask_token_id
    with torch.no_grad():
        likelihoods = model(input_ids=ids).logits[0].double().log_softmax(-1)
    (scores,) = score_windows(model, tokenizer, [window], 1000)
    for of_word, score in zip(places, scores, strict=True):
        answers = [encoded["input_ids"][at] for at in of_word]
        assert score.loss == pytest.approx(-likelihoods[of_word, answers].sum().item())
        assert score.right == (likelihoods[of_word].argmax(-1).tolist() == answers)
        assert score.tokens == len(of_word) and not score.unknown
    assert sum(len(of_word) for of_word in places) > 2


def test_batches_change_nothing(opened, texts):
    model, tokenizer = opened
    documents = read_corpus(texts, "text", 0, 20).documents
    windows = [window for number, text in documents.items() for window in windows_of(number, text, **SHAPE)]
    windows += windows_of(0, "Short one.", **SHAPE)
    reported = []
    together = score_windows(model, tokenizer, windows, 600, reported.append)
    alone = score_windows(model, tokenizer, windows, 1)
    assert len(reported) > 1 and sum(reported) == len(windows) == len(together)
    for one, other in zip(together, alone, strict=True):
        assert [(score.right, score.tokens) for score in one] == [(score.right, score.tokens) for score in other]
        np.testing.assert_allclose([score.loss for score in one], [score.loss for score in other], rtol=1e-5)


def test_a_model_without_a_last_layer_to_watch_gives_the_same(opened, monkeypatch):
    model, tokenizer = opened
    windows = windows_of(0, "The nurse measures the dose twice a day without any reason.", **SHAPE)
    (watched,) = score_windows(model, tokenizer, windows, 100)
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    (plain,) = score_windows(model, tokenizer, windows, 100)
    assert [score.loss for score in watched] == pytest.approx([score.loss for score in plain])


def test_a_token_of_two_words_counts_for_both_and_one_without_letters_for_none():
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "[MASK]": 4, "l'eau": 5, "chaude": 6}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = as_fast(tokenizer)
    masked = mask_window(Window(0, "l'eau chaude ! xyz", ((0, 1), (2, 5), (15, 18))), tokenizer)
    assert masked.ids == [1, 4, 6, 0, 4, 2]
    assert masked.words == [[0, 1], [2]] and masked.answers == [5, 0]
    scores = intrinsic_score._word_scores(masked, 4, [3.0, 1.0], [False, True], 0)
    assert [score.loss for score in scores] == [1.5, 1.5, 1.0, 0.0]
    assert [score.right for score in scores] == [False, False, True, False]
    assert [score.unknown for score in scores] == [False, False, True, True]  # the last one has no token


def test_broken_weights_are_told(model_folder):
    model, tokenizer = probes.load_model(model_folder)
    with torch.no_grad():
        model.decoder.bias.fill_(torch.nan)
    with pytest.raises(DetourError, match="NaN or infinite"):
        score_windows(model, tokenizer, windows_of(0, "The dose.", **SHAPE), 1000)


def test_a_window_that_is_too_long_is_told(opened):
    model, tokenizer = opened
    windows = windows_of(0, "word " * 300, **SHAPE | {"words": 300})
    with pytest.raises(DetourError, match=r"a window has 1,201 tokens, but the model reads 512; .* --window-words"):
        score_windows(model, tokenizer, windows, 1000)


# Figures


def random_sums(documents: int, seed: int) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    words = rng.integers(1, 30, documents)
    sums = {"words": words, "bytes": words * 6, "tokens": words * 2, "unknown": words * 0, "right": words // 2}
    return {name: of.tolist() for name, of in sums.items()} | {"loss": (words * rng.normal(5, 1, documents)).tolist()}


def test_figures_are_ratios_of_sums_and_intervals_come_from_documents():
    sums = {
        "words": [10, 30],
        "bytes": [50, 200],
        "tokens": [12, 40],
        "unknown": [0, 1],
        "right": [4, 6],
        "loss": [20, 60],
    }
    alike = {name: values * 10 for name, values in sums.items()}
    found = measured(alike, draws(20, 500, 0))
    # two nats a word in all documents: how they vary is not known
    assert found["perplexity"] == {"value": pytest.approx(np.exp(2)), "low": None, "high": None}
    assert (
        found["accuracy"]["value"] == 0.25 and 0.2 < found["accuracy"]["low"] < 0.25 < found["accuracy"]["high"] < 0.3
    )
    found = measured(sums, draws(2, 500, 0))
    assert {name: found[name] for name in SUMS[:4]} == {"words": 40, "bytes": 250, "tokens": 52, "unknown": 1}
    assert found["bits_per_byte"]["value"] == pytest.approx(80 / np.log(2) / 250)
    assert found["accuracy"] == {"value": 0.25, "low": None, "high": None}  # two documents: percentiles are too narrow
    assert draws(9, 50, 1).sum(1).tolist() == [9.0] * 50


@pytest.mark.parametrize("documents", [FEWEST_DOCUMENTS, 60])
def test_intervals_hold_the_truth_as_often_as_they_say(documents):
    shown = (measured(random_sums(documents, seed), draws(documents, 300, seed)) for seed in range(100))
    held = sum(found["perplexity"]["low"] <= np.exp(5) <= found["perplexity"]["high"] for found in shown)
    assert 0.88 <= held / 100 < 1


def test_models_are_compared_on_the_same_documents():
    first = random_sums(40, 0)
    better = first | {"loss": [loss - 0.1 * words for loss, words in zip(first["loss"], first["words"], strict=True)]}
    change = compared(better, first, draws(40, 300, 0))
    assert change["perplexity"] == {"value": pytest.approx(np.exp(-0.1)), "low": None, "high": None}
    assert change["bits_per_byte"]["value"] == pytest.approx(-0.1 / np.log(2) / 6)
    assert change["accuracy"] == {"value": 0, "low": None, "high": None}


# The whole


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("general") / "general.txt"
    path.write_text("The old man and the child had some reason to be there since Monday.\n" * 40)
    return path


def test_a_trained_model_is_better_and_all_is_told(model_folder, taught_folder, texts, reference, tmp_path, capsys):
    models_here = {"[red]before": model_folder, "after": taught_folder}
    options = IntrinsicOptions(**OPTIONS, reference=(reference,))
    before, after = measure(models_here, [texts], options, tmp_path / "out")
    assert [before["model"], after["model"]] == list(models_here) and before["change"] is None
    for kind in ("all", "domain"):
        assert after[kind]["perplexity"]["value"] < before[kind]["perplexity"]["value"] / 2
        assert after["change"][kind]["perplexity"]["high"] < 1
        assert before[kind]["words"] == after[kind]["words"] > 20
    assert before["domain"]["words"] < before["all"]["words"]
    assert after["change"]["all"]["accuracy"]["low"] > 0
    assert (before["documents"], before["windows"]) == (20, 40)
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "intrinsic.jsonl").read_text().splitlines()]
    assert lines == [before, after]
    shown = capsys.readouterr()
    assert "[red]before" in shown.out and "compared with [red]before" in shown.out
    assert "80 of 80 windows" in shown.err
    page = (out / "intrinsic.md").read_text()
    assert "## notes.jsonl" in page and "| after | domain |" in page and "Compared with \\[red\\]before:" in page
    # no text of the corpus leaves it
    written = "".join(path.read_text() for path in out.rglob("*") if path.is_file())
    assert "metformin" not in written and "amlodipine" not in written


def test_other_tokenizers_are_measured_on_the_same_words(model_folder, word_piece_folder, texts, tmp_path):
    one, other = measure(
        {"bpe": model_folder, "letters": word_piece_folder}, [texts], IntrinsicOptions(**OPTIONS), tmp_path / "out"
    )
    assert [one["all"][name] for name in ("words", "bytes")] == [other["all"][name] for name in ("words", "bytes")]
    assert one["all"]["tokens"] < other["all"]["tokens"] and one["domain"] is None
    cells = [json.loads((tmp_path / "out" / "cells" / f"{line['key']}.json").read_text()) for line in (one, other)]
    assert cells[0]["all"]["bytes"] == cells[1]["all"]["bytes"]


def test_what_is_finished_is_not_done_again(model_folder, taught_folder, texts, tmp_path, monkeypatch):
    options, out = IntrinsicOptions(**OPTIONS), tmp_path / "out"
    (first,) = measure({"a": model_folder}, [texts], options, out)
    opened: list[Path] = []
    load = probes.load_model
    monkeypatch.setattr(probes, "load_model", lambda folder, *rest: opened.append(folder) or load(folder, *rest))
    assert measure({"a": model_folder}, [texts], options, out) == [first] and not opened
    both = measure({"a": model_folder, "b": taught_folder}, [texts], options, out)
    assert opened == [taught_folder] and both[0] == first and both[1]["compared_with"] == "a"
    # a line of another corpus is added, the others stay
    second = write_jsonl(tmp_path / "second.jsonl", ["The nurse takes the dose."] * 3)
    measure({"a": model_folder}, [second], options, out)
    lines = [json.loads(line) for line in (out / "intrinsic.jsonl").read_text().splitlines()]
    assert [(line["model"], line["corpus"]) for line in lines] == [
        ("a", "notes.jsonl"),
        ("b", "notes.jsonl"),
        ("a", "second.jsonl"),
    ]
    # other settings or other texts are another matter: what was measured otherwise goes
    opened.clear()
    measure({"a": model_folder}, [texts], IntrinsicOptions(**OPTIONS | {"seed": 1}), out)
    lines = [json.loads(line) for line in (out / "intrinsic.jsonl").read_text().splitlines()]
    assert opened == [model_folder] and [line["corpus"] for line in lines] == ["second.jsonl", "notes.jsonl"]
    write_jsonl(second, ["The child reports a fever."] * 3)
    measure({"a": model_folder}, [second], options, out)
    assert opened == [model_folder] * 2


def test_what_is_measured_before_a_fault_is_kept(model_folder, texts, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    options, out = IntrinsicOptions(**OPTIONS), tmp_path / "out"
    with pytest.raises(DetourError, match="broken: cannot load the model"):
        measure({"a": model_folder, "b": broken}, [texts], options, out)
    assert len((out / "intrinsic.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr(probes, "load_model", lambda *_: pytest.fail("measured again"))
    measure({"a": model_folder}, [texts], options, out)


def test_words_of_a_file_are_the_domain(model_folder, texts, tmp_path, capsys):
    words = tmp_path / "words.txt"
    words.write_text("Metformin\nœdema\n\nheart failure\n", encoding="utf-8")
    (line,) = measure({"a": model_folder}, [texts], IntrinsicOptions(**OPTIONS, words=words), tmp_path / "out")
    assert line["domain_words"] == 2 and 0 < line["domain"]["words"] < line["all"]["words"] / 5
    assert f"{words}: 1 lines do not contain exactly one word" in capsys.readouterr().err
    assert read_words(words) == (frozenset({"metformin", "œdema"}), 1)


def test_the_command_takes_what_measure_takes(model_folder, taught_folder, texts, tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    add_intrinsic_arguments(parser)
    given = [
        "--model",
        str(model_folder),
        str(taught_folder),
        "--corpus",
        str(texts),
        "--output",
        str(tmp_path / "out"),
    ]
    calls = []
    monkeypatch.setattr(intrinsic, "measure", lambda *arguments: calls.append(arguments))
    measure_masked_words(parser.parse_args(given))
    more = ["--reference", "a", "--reference", "b", "--mask-rate", "0.3", "--ratio", "4"]
    given[1:3] = [f"x={model_folder}", f"y={taught_folder}"]
    measure_masked_words(parser.parse_args(given + more))
    (plain, named) = calls
    assert plain == ({"random": model_folder, "taught": taught_folder}, [texts], IntrinsicOptions(), tmp_path / "out")
    assert list(named[0]) == ["x", "y"]
    assert named[2] == IntrinsicOptions(reference=(Path("a"), Path("b")), mask_rate=0.3, ratio=4)
    given[2] = f"x={taught_folder}"
    with pytest.raises(DetourError, match="a second model named 'x'"):
        measure_masked_words(parser.parse_args(given))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"documents": 0}, "--documents: must be above 0, not 0"),
        ({"window_words": -1}, "--window-words: must be above 0, not -1"),
        ({"seed": -1}, "--seed: must be at least 0, not -1"),
        ({"ratio": float("nan")}, "--ratio: must be a finite number, not nan"),
        ({"mask_rate": 1.0}, "--mask-rate: must be above 0 and below 1, not 1.0"),
        ({"words": Path("w"), "reference": (Path("r"),)}, "omit --reference"),
        ({"domain": (Path("d"),)}, "--domain: requires --reference"),
    ],
)
def test_options_without_a_meaning_are_told(values, message):
    with pytest.raises(DetourError, match=message):
        IntrinsicOptions(**values).check()


def corpus_faults(folder: Path) -> dict[str, tuple[Path, str]]:
    contents = {
        "absent.jsonl": (None, "absent.jsonl: no such file"),
        "empty.jsonl": ("", "empty.jsonl: no words"),
        "blank.txt": ("\n \n", "blank.txt: no words"),
        "bad.jsonl": ('{"text": "one"}\nnot json\n', "bad.jsonl, line 2: .*JSON"),
        "key.jsonl": ('{"body": "one"}\n', "key.jsonl, line 1: .*text"),
        "signs.txt": ("... !!!\n", "signs.txt: no words"),
    }
    for name, (content, _) in contents.items():
        if content is not None:
            (folder / name).write_text(content)
    return {name: (folder / name, message) for name, (_, message) in contents.items()}


def test_wrong_inputs_get_one_sentence(model_folder, texts, reference, tmp_path):
    def check(message: str, models_here=None, corpora=None, output="out", **values) -> None:
        with pytest.raises(DetourError, match=message) as error:
            measure(
                {"a": model_folder} if models_here is None else models_here,
                [texts] if corpora is None else corpora,
                IntrinsicOptions(**OPTIONS | values),
                tmp_path / output,
            )
        assert "\n" not in str(error.value)
        assert not (tmp_path / "out").exists()

    for path, message in corpus_faults(tmp_path).values():
        check(message, corpora=[path])
    check("at least one model", models_here={})
    check("the same corpus twice", corpora=[texts, texts])
    check("no config.json", models_here={"a": tmp_path})
    (tmp_path / "taken").write_text("")
    check("taken is a file", output="taken")
    check("no domain words: none has 4 letters", reference=(texts,))
    check("absent: no such file", reference=(tmp_path / "absent",))
    check("absent: no such file", words=tmp_path / "absent")
    (tmp_path / "words.txt").write_text("xylophone\n")
    check("no domain words among the masked ones", words=tmp_path / "words.txt")
    (tmp_path / "words.txt").write_text("two words\n")
    check("words.txt: no words; write one per line", words=tmp_path / "words.txt")
    check("--device gpu: give auto, cpu", device="gpu")
    check("--device cuda:99: torch sees", device="cuda:99")
    maskless = tmp_path / "maskless"
    shutil.copytree(model_folder, maskless)
    settings = json.loads((maskless / "tokenizer_config.json").read_text())
    (maskless / "tokenizer_config.json").write_text(json.dumps(settings | {"mask_token": None}))
    check("the tokenizer needs a tokenizer.json and a mask token", models_here={"a": maskless})
    letters = tmp_path / "long.txt"
    letters.write_text("a b " * 400)
    check("random on .*long.txt: a window has .* but the model reads 512", corpora=[letters], window_words=800)


WRONG = [
    "",
    "[]",
    "null",
    "{",
    "[" * 100_000,
    '{"a": 1, "a": 2}',
    '{"model": 1}',
    b"\xff",
    '{"model": "a", "corpus": "b"}',
]


@pytest.mark.parametrize("content", WRONG)
def test_what_lies_in_the_output_is_never_a_traceback(content, model_folder, texts, tmp_path):
    """A damaged cell is measured again; lines of another kind are one sentence."""
    content, out = content if isinstance(content, bytes) else content.encode(), tmp_path / "out"
    options = IntrinsicOptions(**OPTIONS | {"windows": 1, "window_words": 5})
    (whole,) = measure({"a": model_folder}, [texts], options, out)
    (cell,) = (out / "cells").iterdir()
    cell.write_bytes(content)
    (again,) = measure({"a": model_folder}, [texts], options, out)
    assert again["all"] == whole["all"]
    (out / "intrinsic.jsonl").write_bytes(content + b"\n")
    if content:
        with pytest.raises(DetourError, match=r"intrinsic.jsonl: not output of .*remove the file") as caught:
            measure({"a": model_folder}, [texts], options, out)
        assert "\n" not in str(caught.value)
