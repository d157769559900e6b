"""A new model of every family, released: its files agree with the run's tokenizer."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from megatron_detour.model.families import FAMILIES
from megatron_detour.release.export import export
from tests.release.made import make_run
from tests.tokenizer.test_kinds import BERT, word_piece


@pytest.fixture(scope="module", params=FAMILIES)
def released(request, corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    run = make_run(folder / "run", corpus, steps=(6,), changes={"model_type": request.param})
    export(str(run), str(folder / "model"), "fp32")
    return folder / "model"


def test_special_ids_are_those_of_the_tokenizer(released):
    from transformers import AutoTokenizer

    config, tokenizer = json.loads((released / "config.json").read_text()), AutoTokenizer.from_pretrained(released)
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    assert "pad_token_id" in ids and all(0 <= number < config["vocab_size"] for number in ids.values())
    for role in ("pad", "cls", "sep", "mask"):
        number = getattr(tokenizer, f"{role}_token_id")
        assert ids.get(f"{role}_token_id", number) == number


SAID = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
OTHERWISE = ["input_ids", "attention_mask"]


def pair_tokenizer(folder: Path, said: dict[str, Any] | None) -> Path:
    """A BERT's tokenizer with its template for pairs of texts, and a tokenizer_config.json that says this."""
    made = word_piece(BERT)
    ids = [(BERT[role], made.token_to_id(BERT[role])) for role in ("cls", "sep")]
    single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
    made.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    if said is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize("said", [SAID, None, SAID | {"model_input_names": OTHERWISE}])
def test_a_pair_of_texts_has_the_token_types_of_the_start_models_tokenizer(corpus, tmp_path, said):
    from transformers import AutoTokenizer

    other = dataclasses.replace(corpus, tokenizer=pair_tokenizer(tmp_path / "tokenizer", said))
    run = make_run(tmp_path / "run", other, steps=(6,), changes={"model_type": "bert"})
    export(str(run), str(tmp_path / "model"), "fp32")
    folders = (other.tokenizer, run / "checkpoints" / "step-00000006", tmp_path / "model")
    start, checkpoint, exported = (dict(AutoTokenizer.from_pretrained(f)("the patient", "a dose")) for f in folders)
    assert start == checkpoint == exported
    assert ("token_type_ids" in start) == ("model_input_names" not in (said or {}))
    if "token_type_ids" in start:
        assert start["token_type_ids"][0] == 0 and start["token_type_ids"][-3:] == [1, 1, 1]
