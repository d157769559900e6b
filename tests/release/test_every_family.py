"""A new model of every family, released: its files agree with the run's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_detour.model.families import FAMILIES
from megatron_detour.release.export import export
from tests.release.made import make_run


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
