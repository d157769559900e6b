"""Probes: masked where the answer stands, judged by arg-max, shown side by side."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, ModernBertConfig, ModernBertForMaskedLM

from megatron_detour.corpus.train_tokenizer import train_tokenizer
from megatron_detour.errors import DetourError
from megatron_detour.evaluation.probes import (
    Probe,
    load_model,
    masked_ids,
    print_report,
    probes_from_corpus,
    read_probes,
    run_probes,
)

SENTENCES = [
    "The clinic gives metformin for diabetes, and amlodipine for hypertension.",
    "Le service donne la metformine contre le diabète, et aussi contre l'asthme.",
]
# a word of one token, a word of several tokens, an accent
PROBES = [
    Probe("The clinic gives metformin for [MASK], and more.", "diabetes"),
    Probe("The clinic has [MASK] for all.", "xylophones"),
    Probe("Le service traite le [MASK].", "diabète", "fr"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A random ModernBERT of one layer with a tokenizer in which "diabetes" is one token."""
    root = tmp_path_factory.mktemp("probes")
    (root / "corpus.txt").write_text("\n".join(SENTENCES * 20) + "\n", encoding="utf-8")
    train_tokenizer([root / "corpus.txt"], root / "model", 336)
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=336,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        cls_token_id=1,
        eos_token_id=2,
        sep_token_id=2,
        pad_token_id=3,
    )
    ModernBertForMaskedLM(config).save_pretrained(root / "model")
    return root / "model"


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder, local_files_only=True)


@pytest.fixture(scope="module")
def taught_folder(model_folder) -> Path:
    """The same model, whose output bias makes " diabetes" its answer everywhere."""
    folder = model_folder.parent / "taught"
    shutil.copytree(model_folder, folder)
    model, tokenizer = load_model(folder)
    with torch.no_grad():
        model.decoder.bias[tokenizer.convert_tokens_to_ids("Ġdiabetes")] = 1e4
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("probe", PROBES)
def test_masked_input_is_the_true_sentence_but_for_the_answer(tokenizer, probe):
    ids, where, answer = masked_ids(probe, tokenizer, tokenizer.mask_token_id)
    true = tokenizer(probe.filled()[0], return_tensors="pt").input_ids
    assert answer.tolist() == tokenizer(f" {probe.answer}", add_special_tokens=False).input_ids
    assert (ids == tokenizer.mask_token_id).nonzero()[:, 1].tolist() == where.tolist()
    ids[0, where] = answer
    assert ids.tolist() == true.tolist()


@pytest.mark.parametrize("probe", PROBES)
def test_masked_input_is_what_the_typed_text_gives(tokenizer, probe):
    ids, where, _ = masked_ids(probe, tokenizer, tokenizer.mask_token_id)
    assert tokenizer(probe.text.replace("[MASK]", "[MASK]" * len(where))).input_ids == ids[0].tolist()


def test_answer_at_the_start_and_after_an_apostrophe(tokenizer):
    for probe in (Probe("[MASK] est là.", "Le"), Probe("contre l'[MASK].", "asthme")):
        ids, where, answer = masked_ids(probe, tokenizer, tokenizer.mask_token_id)
        assert tokenizer.decode(answer) == probe.answer
        assert (ids == tokenizer.mask_token_id).sum() == len(where)


def test_answer_inside_a_token_is_refused(tokenizer):
    assert "Ġdiabetes" in tokenizer.get_vocab()
    with pytest.raises(DetourError, match="shares a token"):
        masked_ids(Probe("for dia[MASK].", "betes"), tokenizer, tokenizer.mask_token_id)


def test_untaught_and_taught_model_differ(model_folder, taught_folder):
    report = run_probes([model_folder, taught_folder], PROBES)
    before, after = report.outcomes
    assert [outcome.label for outcome in report.outcomes] == ["model", "taught"]
    assert [guess.right for guess in after.guesses] == [True, False, False]
    assert (before.right, after.right) == (0, 1)
    assert after.guesses[0].tops[0] == "diabetes" and len(after.guesses[0].tops) == 3
    # an answer of several tokens shows the arg-max of each place and no other words
    count = after.guesses[1].tokens
    assert count > 1 and after.guesses[1].tops == (" ".join(["diabetes"] * count),)


def test_guesses_are_the_models_arg_max(model_folder):
    model, tokenizer = load_model(model_folder)
    ids = tokenizer("The clinic gives metformin for [MASK], and more.", return_tensors="pt").input_ids
    at = ids[0].tolist().index(tokenizer.mask_token_id)
    best = model(ids).logits[0, at].argmax()
    guess = run_probes([model_folder], PROBES[:1], top=1).outcomes[0].guesses[0]
    assert guess.tops == (tokenizer.decode(best).strip(),)


def test_table_shows_answers_marks_and_totals(model_folder, taught_folder):
    console = Console(width=200)
    with console.capture() as capture:
        print_report(run_probes([model_folder, taught_folder], PROBES, ["before", "[red]after"]), console)
    shown = capture.get()
    for text in ("before", "[red]after", "for [MASK], and", "✓ diabetes", "✗", "right: 0 of 3", "right: 1 of 3"):
        assert text in shown


def test_bad_requests_are_named(model_folder, tmp_path):
    with pytest.raises(DetourError, match="2 --label for 1 --model"):
        run_probes([model_folder], PROBES, ["a", "b"])
    with pytest.raises(DetourError, match="--top 0"):
        run_probes([model_folder], PROBES, top=0)
    with pytest.raises(DetourError, match=r"absent: no config\.json"):
        run_probes([tmp_path / "absent"], PROBES)


def test_folder_without_weights_or_tokenizer_is_refused(model_folder, tmp_path):
    for gone, name in (("model.safetensors", "weights"), ("tokenizer.json", "tokenizer")):
        folder = tmp_path / name
        shutil.copytree(model_folder, folder)
        (folder / gone).unlink()
        with pytest.raises(DetourError, match=name):
            load_model(folder)
    folder = tmp_path / "broken"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(DetourError, match=r"broken: cannot load the model"):
        load_model(folder)


def test_missing_head_is_refused(model_folder, tmp_path):
    folder = tmp_path / "headless"
    shutil.copytree(model_folder, folder)
    load_model(folder)[0].model.save_pretrained(folder)
    with pytest.raises(DetourError, match="weights are missing"):
        load_model(folder)


def test_probes_are_read(tmp_path):
    path = tmp_path / "probes.jsonl"
    path.write_text("\n".join(json.dumps(probe.__dict__) for probe in PROBES) + "\n")
    assert read_probes(path) == PROBES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no probes"),
        ("{", "line 1: invalid JSON"),
        ("[]", "line 1: not a JSON object"),
        ('{"text": "a [MASK]"}', "line 1: 'answer' is not a string"),
        ('\n{"text": "a", "answer": "b"}', "line 2: .*exactly one"),
        ('{"text": "[MASK] [MASK]", "answer": "b"}', "line 1: .*exactly one"),
    ],
)
def test_bad_probes_are_named(tmp_path, content, message):
    (tmp_path / "probes.jsonl").write_text(content)
    with pytest.raises(DetourError, match=message):
        read_probes(tmp_path / "probes.jsonl")
    with pytest.raises(DetourError, match="no such file"):
        read_probes(tmp_path / "absent.jsonl")


def test_probes_of_a_corpus_restore_its_text(tokenizer, tmp_path):
    words = [f"{'abcdefghij'[number % 10] * 6}{'klmnop'[number % 6] * 2}" for number in range(90)]
    documents = [f"Une phrase courte ici. {' '.join(words[start:])}; voilà (encore) la fin." for start in range(12)]
    (tmp_path / "texts.txt").write_text("\n".join(documents) + "\nun et on\n")
    probes = probes_from_corpus(tmp_path / "texts.txt", 10, 1)
    assert probes == probes_from_corpus(tmp_path / "texts.txt", 10, 1)
    assert probes != probes_from_corpus(tmp_path / "texts.txt", 10, 2)
    assert len(probes) == 10
    for probe in probes:
        assert len(probe.answer) >= 5 and probe.answer.isalpha()
        assert len(probe.text.split()) <= 40
        assert any(probe.filled()[0] in document for document in documents)
        masked_ids(probe, tokenizer, tokenizer.mask_token_id)
    assert max(len(probe.text.split()) for probe in probes) > 30
    assert len(probes_from_corpus(tmp_path / "texts.txt", 99)) == 12


def test_corpus_without_words_is_refused(tmp_path):
    (tmp_path / "texts.txt").write_text("un et on\nenfin\n")
    with pytest.raises(DetourError, match="five letters"):
        probes_from_corpus(tmp_path / "texts.txt")
    with pytest.raises(DetourError, match="--count 0"):
        probes_from_corpus(tmp_path / "texts.txt", 0)
