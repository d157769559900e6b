"""Models from outside: names and folders, how long a text they read, and folders that hold what no model has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.finetuning.heads import open_model
from megatron_detour.evaluation.models import check_model, most_positions, named_models
from megatron_detour.evaluation.probes import load_model
from tests.evaluation.test_finetune import model, settings_of, small  # noqa: F401 fixtures

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 30}
POSITIONS = 20
FROM_PADDING = (
    "roberta",
    "camembert",
    "xlm-roberta",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
    "mpnet",
    "data2vec-text",
)
FROM_ZERO = ("bert", "electra", "distilbert", "albert")


class Tokenizer:
    model_max_length = 10**30
    name_or_path = "/x"


@pytest.mark.parametrize("kind", [*FROM_PADDING, *FROM_ZERO])
def test_the_longest_input_is_what_the_positions_hold(kind):
    config = transformers.AutoConfig.for_model(
        kind,
        **SMALL,
        max_position_embeddings=POSITIONS,
        pad_token_id=1,
        embedding_size=16,
        dim=16,
        n_heads=2,
        n_layers=1,
    )
    network = transformers.AutoModel.from_config(config).eval()
    longest = most_positions(network, Tokenizer())
    assert longest == (POSITIONS - 2 if kind in FROM_PADDING else POSITIONS)
    network(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        network(input_ids=torch.full((1, longest + 1), 5))


@pytest.mark.parametrize("limit", ["512", [512], None, -1, 0, True, float("nan")])
def test_a_limit_of_the_tokenizer_that_is_none_is_told(limit):
    config = transformers.AutoConfig.for_model("bert", **SMALL, max_position_embeddings=POSITIONS)
    tokenizer = Tokenizer()
    tokenizer.model_max_length = limit
    with pytest.raises(DetourError, match=r"/x: model_max_length .* must be a positive number"):
        most_positions(transformers.AutoModel.from_config(config), tokenizer)


# ------------------------------------------------------------------------------------------------ fine-tuned folders

HEADS = {
    "classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "multi-label": transformers.AutoModelForSequenceClassification,
    "similarity": transformers.AutoModelForSequenceClassification,
    "multiple-choice": transformers.AutoModelForMultipleChoice,
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("labels", ["as many", "more"])
def test_a_fine_tuned_folder_starts_from_a_fresh_head(kind, labels, small, model, tmp_path):  # noqa: F811
    dataset = small[kind]
    count = max(len(dataset.labels), 1) + (labels == "more")
    tuned = HEADS[kind].from_pretrained(model, num_labels=count, problem_type="regression")
    with torch.no_grad():
        tuned.classifier.weight.fill_(7.0)
        tuned.head.dense.weight.fill_(7.0)
    tuned.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, tmp_path)
    opened = open_model(tmp_path, dataset, settings_of(kind))
    assert not (opened.classifier.weight == 7).any() and not (opened.head.dense.weight == 7).any()
    assert all(map(torch.equal, opened.base_model.state_dict().values(), tuned.base_model.state_dict().values()))
    plain = open_model(model, dataset, settings_of(kind))
    assert [p.shape for p in opened.parameters()] == [p.shape for p in plain.parameters()]
    assert opened.config.problem_type == plain.config.problem_type or kind in (
        "token-classification",
        "multiple-choice",
    )


def test_an_encoder_of_other_sizes_is_refused(small, model, tmp_path):  # noqa: F811
    shutil.copytree(model, tmp_path / "m")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(DetourError, match=r"cannot load the model|encoder weights"):
        open_model(tmp_path / "m", small["classification"], settings_of("classification"))


# ------------------------------------------------------------------------------------------------ names


def test_a_path_may_hold_an_equals_sign(tmp_path, monkeypatch):
    folder = tmp_path / "lr=5e-5" / "m"
    folder.mkdir(parents=True)
    assert named_models([str(folder)]) == {"m": folder}
    assert named_models([f"a={folder}"]) == {"a": folder}
    monkeypatch.chdir(tmp_path)
    assert named_models(["lr=5e-5"]) == {"lr=5e-5": Path("lr=5e-5")}
    with pytest.raises(DetourError, match=r"/x/lr=5e-5/m: no such folder.*contains '='.*NAME=/x/lr=5e-5/m"):
        named_models(["/x/lr=5e-5/m"])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "\x1b[31mred", "a\u202eb", "a\nb", "\u200b"])
def test_a_name_that_cannot_be_shown_is_refused_and_not_shown(name, tmp_path):
    with pytest.raises(DetourError) as caught:
        named_models([f"{name}={tmp_path}"])
    assert str(caught.value).isprintable()


# ------------------------------------------------------------------------------------------------ hostile folders

WRONG = [None, [], {}, True, -1, 0, 1e308, "x", [[]], 10**30]
CONFIG = [
    "model_type",
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "vocab_size",
    "architectures",
    "id2label",
    "max_position_embeddings",
    "pad_token_id",
    "layer_types",
    "rope_parameters",
    "torch_dtype",
]
TOKENIZER = ("model_max_length", "tokenizer_class", "cls_token", "pad_token", "added_tokens_decoder", "padding_side")


NO_SUCH_FILE = [
    *("[]", "null", "{", '{"a": 1, "a": 2}', "[" * 100_000, b"\xff\xfe{"),
    *('{"weight_map": []}', '{"weight_map": {"a": ["b"]}}', '{"weight_map": {"a": "../../x"}}'),
]


@pytest.fixture
def copy(model, tmp_path):  # noqa: F811
    return Path(shutil.copytree(model, tmp_path / "m"))


def change(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def open_all(folder: Path, dataset, tmp_path: Path) -> None:
    """As a suite does: the check, then a worker; and as the masked words are measured."""
    from megatron_detour.evaluation.finetuning.finetune import build_encoder

    for opening in (
        lambda: check_model(folder),
        lambda: build_encoder(folder, open_model(folder, dataset, settings_of("classification")), dataset,
                           settings_of("classification"), dataset.train)(dataset.test),
        lambda: load_model(folder),
    ):  # fmt: skip
        try:
            opening()
        except DetourError as fault:
            assert str(folder) in str(fault) and "\n" not in str(fault), fault


@pytest.mark.parametrize("key", CONFIG)
def test_a_config_of_other_types_is_never_a_traceback(key, small, copy, tmp_path):  # noqa: F811
    whole = (copy / "config.json").read_text()
    for value in WRONG:
        if (key, value) in (("hidden_size", 10**30), ("vocab_size", 10**30), ("num_hidden_layers", 10**30)):
            continue  # these ask for more memory or time than there is
        (copy / "config.json").write_text(whole)
        change(copy / "config.json", key, value)
        open_all(copy, small["classification"], tmp_path)


@pytest.mark.parametrize("key", TOKENIZER)
def test_a_tokenizer_config_of_other_types_is_never_a_traceback(key, small, copy, tmp_path):  # noqa: F811
    whole = (copy / "tokenizer_config.json").read_text()
    for value in WRONG:
        (copy / "tokenizer_config.json").write_text(whole)
        change(copy / "tokenizer_config.json", key, value)
        open_all(copy, small["classification"], tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("content", NO_SUCH_FILE)
def test_a_file_that_is_no_such_file_is_never_a_traceback(name, content, small, copy, tmp_path):  # noqa: F811
    if "index" in name:
        (copy / "model.safetensors").rename(copy / "model-1.safetensors")
    (copy / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    open_all(copy, small["classification"], tmp_path)
