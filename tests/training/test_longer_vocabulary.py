"""A start model with a longer tokenizer: from a domain's texts to the released encoder; what new rows begin as."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from megatron_detour.commands.main import main
from megatron_detour.config import Model, load
from megatron_detour.errors import DetourError
from megatron_detour.forecast import forecast
from megatron_detour.plan import Plan
from megatron_detour.preflight import look
from megatron_detour.tokenizer.extension import new_pieces
from megatron_detour.tokenizer.vocabulary import load_tokenizer, load_vocabulary
from megatron_detour.training.initial_model import InitialModel
from tests.conftest import write_jsonl
from tests.corpus.test_extend_tokenizer import domain
from tests.harness import slow
from tests.injections.runs import Setup, begin
from tests.models import config_of, tiny
from tests.tokenizer.test_kinds import NAMES, save, word_piece

ADDED, OLD = 37, 400  # 437 ids: no tensor-parallel size divides them
EMBEDDING, BIAS = "model.embeddings.tok_embeddings.weight", "decoder.bias"


@pytest.fixture
def family(request) -> str:
    return getattr(request, "param", "modernbert")


@pytest.fixture
def extended(start_model, family, tmp_path) -> Path:
    """The start model's tokenizer with more pieces, as the command makes it."""
    if family == "bert":
        become_bert(Path(start_model))
    texts = write_jsonl(tmp_path / "domain.jsonl", domain(400))
    words = f"--tokenizer {start_model} --input {texts} --add {ADDED} --output {tmp_path / 'longer'}"
    assert main(["extend-tokenizer", *words.split()]) == 0
    return tmp_path / "longer"


def become_bert(folder: Path) -> None:
    """Make the start model a BERT of 48 positions, with a WordPiece tokenizer."""
    tokenizer = word_piece(NAMES)
    assert tokenizer.get_vocab_size() == OLD
    (folder / "special_tokens_map.json").unlink()
    save(tokenizer, folder, NAMES)
    config = config_of("bert", vocab_size=OLD, max_position_embeddings=48)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: p.detach() for name, p in tiny(**config).named_parameters()}, folder / "model.safetensors")


def rows_of(model: Model, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that a run with this model begins with, of those of its start model."""
    initial = InitialModel.from_preflight(look(model).refuse())
    return {name: initial.changed(name, weights[name]) for name in initial.shape.sizes}


def mean_rows(old: torch.Tensor, start: str, longer: Path) -> torch.Tensor:
    pieces = new_pieces(load_tokenizer(start), load_tokenizer(longer))
    return torch.stack([old[ids].mean(0) for ids in pieces.values()])


def test_a_new_row_is_the_mean_of_its_old_pieces(start_model, extended):
    weights = load_file(Path(start_model, "model.safetensors"))
    found = rows_of(Model(start=start_model, tokenizer=str(extended)), weights)
    for name in (EMBEDDING, BIAS):
        assert len(found[name]) == OLD + ADDED
        assert torch.equal(found[name][:OLD], weights[name])
        assert torch.equal(found[name][OLD:], mean_rows(weights[name], start_model, extended))
    assert all(found[name] is weights[name] for name in weights.keys() - {EMBEDDING, BIAS})
    assert rows_of(Model(start=start_model), weights) == weights


def test_rows_that_the_start_model_has_in_reserve_are_used(start_model, extended):
    """An embedding is often longer than its tokenizer; then it stays so, and the weights keep their size."""
    path, spare = Path(start_model, "model.safetensors"), ADDED + 11
    weights = load_file(path)
    weights |= {name: torch.cat([weights[name], torch.ones_like(weights[name][:spare])]) for name in (EMBEDDING, BIAS)}
    save_file(weights, path)
    config = Path(start_model, "config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": OLD + spare}))
    found = rows_of(Model(start=start_model, tokenizer=str(extended)), weights)
    for name in (EMBEDDING, BIAS):
        assert torch.equal(found[name][:OLD], weights[name][:OLD])
        assert torch.equal(found[name][OLD : OLD + ADDED], mean_rows(weights[name], start_model, extended))
        assert torch.equal(found[name][OLD + ADDED :], weights[name][OLD + ADDED :])


@pytest.fixture
def run(start_model, extended, family, tmp_path) -> Path:
    """A run file whose first phase leaves the embedding as it began, and the corpus of the longer tokenizer."""
    words = ["--input", str(tmp_path / "domain.jsonl"), "--output-prefix", str(tmp_path / "corpus")]
    assert main(["preprocess", *words, "--tokenizer", str(extended)]) == 0
    rate = {"learning_rate": {"peak": 1e-2}}
    more = {"config": {"max_position_embeddings": 96}} if family == "bert" else {}
    content = {
        "name": "longer",
        "folder": "set by the test",
        "model": {"start": start_model, "tokenizer": str(extended)} | more,
        "data": {"corpora": [{"prefix": str(tmp_path / "corpus")}], "sequence_length": 64},
        "batch": {"sequences": 4, "micro_sequences": 2},
        "phases": [
            {"name": "detour", "objective": "clm", "tokens": "2 steps", "freeze": ["embeddings"], **rate},
            {"name": "decay", "objective": "mlm", "mask_rate": 0.3, "tokens": "3 steps", **rate},
        ],
        "deepspeed": "set by the test",
        "validation": {"corpora": [{"prefix": str(tmp_path / "corpus")}], "sequences": 4},
        "checkpoint": {"every": "1 step", "keep": 9},
        "tensorboard": False,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "run.yaml"


def finish(folder: Path, run: Path, setup: Setup) -> None:
    session = begin(folder, run, setup, folder.with_suffix(".log"))
    assert set(session.wait()) == {0}, session.output()[-4000:]


@pytest.mark.integration
@pytest.mark.parametrize("family", ["modernbert", slow("bert")], indirect=True)
def test_from_the_texts_to_the_released_encoder(run, family, start_model, extended, tmp_path):
    """Two tensor ranks; embedding rows at the start; resuming without the start model; transformers at the end."""
    embedding = {"modernbert": EMBEDDING, "bert": "bert.embeddings.word_embeddings.weight"}[family]
    whole, cut, setup = tmp_path / "whole", tmp_path / "cut", Setup(2, 2)
    finish(whole, run, setup)
    old = load_file(Path(start_model, "model.safetensors"))[embedding]
    frozen, last = (
        load_file(whole / f"checkpoints/step-0000000{step}/model.safetensors")[embedding] for step in (2, 5)
    )
    assert torch.equal(frozen, torch.cat([old, mean_rows(old, start_model, extended)]))
    assert (last != frozen).any(1)[OLD:].sum() > ADDED / 2  # new pieces occur, and are trained

    shutil.copytree(whole, cut)
    for step in (4, 5):
        shutil.rmtree(cut / f"checkpoints/step-0000000{step}")
    for missing in (Path(start_model), extended):  # the checkpoint stands in for them
        missing.rename(missing.with_suffix(".away"))
    finish(cut, run, setup)
    ours, theirs = (load_file(folder / "checkpoints/step-00000005/model.safetensors") for folder in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    released = tmp_path / "released"
    assert main(["convert", "--checkpoint", str(cut), "--output", str(released), "--dtype", "fp32"]) == 0
    model, tokenizer = (kind.from_pretrained(released) for kind in (AutoModelForMaskedLM, AutoTokenizer))
    assert (model.config.vocab_size, len(tokenizer)) == (OLD + ADDED, OLD + ADDED)
    text = domain(1, seed=9)[0]
    ids = tokenizer(text, return_tensors="pt")
    assert ids.input_ids[0].tolist() == load_tokenizer(extended.with_suffix(".away")).encode(text).ids
    assert ids.input_ids.max() >= OLD
    with torch.no_grad():
        logits = model(**ids).logits
    assert logits.shape[-1] == OLD + ADDED and logits.isfinite().all()


def test_plan_counts_the_longer_vocabulary(run, start_model):
    config = load(str(run), [f"folder={run.parent / 'planned'}", "deepspeed=ds_configs/zero2_fp32_cpu.json"])
    shorter = look(dataclasses.replace(config.model, tokenizer=None)).shape
    planned = forecast(config, Plan.from_config(config), 1, device="cpu")
    assert planned.shape == dataclasses.replace(shorter, vocabulary=OLD + ADDED)
    assert planned.origin == f"{start_model} ({ADDED} pieces added)"
    assert not any("embeddings" in warning for warning in planned.warnings)
    frozen = load(str(run), [f"folder={run.parent / 'p'}", "phases.decay.freeze=[embeddings]"])
    (warning,) = [w for w in forecast(frozen, Plan.from_config(frozen), 1).warnings if "embeddings" in w]
    assert warning.startswith(f"phases: all of them freeze embeddings, so the {ADDED} pieces that model.tokenizer adds")


def test_a_tokenizer_that_does_not_extend_the_models_is_refused(start_model, extended, tmp_path):
    raw = json.loads((extended / "tokenizer.json").read_text())
    raw["model"]["merges"].insert(0, raw["model"]["merges"].pop())
    (extended / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(DetourError) as refusal:
        look(Model(start=start_model, tokenizer=str(extended))).refuse()
    says = "nor an extension of it: its merges do not begin with the old ones; remove the key to use the model's own"
    assert f"{extended} is not the tokenizer that {start_model} was trained with, {says}" in str(refusal.value)
    assert load_vocabulary(extended).size == OLD + ADDED
