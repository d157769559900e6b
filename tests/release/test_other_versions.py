"""Exported folders in environments with other versions of transformers, made with pip: they compute the same there.

What they lack (torch above all) they take from this environment, whose packages stand behind their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from megatron_detour.model.families.base import FULL, SLIDING
from megatron_detour.release.export import export
from tests.release.elsewhere import TEXTS
from tests.release.made import make_run
from tests.release.test_way_back import started

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("elsewhere.py")
OLDEST, NEWEST_4 = "transformers==4.48.0", "transformers>=4.57,<5"
OLDEST_OF = {"modernbert": OLDEST, "bert": OLDEST}
OLDEST_OF |= dict.fromkeys(["roberta", "camembert", "xlm-roberta"], "transformers==4.51.0")
INSTALLING_SECONDS, RUNNING_SECONDS = 900, 300

SAVE = """
import sys
from transformers import AutoModelForMaskedLM, AutoTokenizer
folder, output = sys.argv[1:]
AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(output, max_shard_size="20KB")
AutoTokenizer.from_pretrained(folder).save_pretrained(output)
"""
SENTENCES = """
import json, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
print(json.dumps({"modules": [type(m).__name__ for m in model], "vectors": model.encode(sys.argv[2:]).tolist()}))
"""


class Seen(NamedTuple):
    """What elsewhere.py has found."""

    facts: dict[str, Any]
    logits: dict[str, np.ndarray]


def run_python(python: Path | str, *arguments: str) -> subprocess.CompletedProcess:
    alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = [str(python), *arguments]
    return subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, timeout=RUNNING_SECONDS)


def seen_by(python: Path | str, folder: Path, *more: str) -> Seen:
    output = folder.parent / "logits.npz"
    result = run_python(python, str(WORKER), str(folder), str(output), *more)
    assert result.returncode == 0, result.stderr[-3000:]
    return Seen(json.loads(result.stdout.splitlines()[-1]), dict(np.load(output)))


@pytest.fixture(scope="module")
def python_with(tmp_path_factory) -> Callable[..., Path]:
    """The Python of an environment where pip has installed something, with this one's packages behind it."""
    made: dict[str, Path] = {}

    def make(requirement: str, *options: str) -> Path:
        if requirement not in made:
            folder = tmp_path_factory.mktemp("environment") / "venv"
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=INSTALLING_SECONDS)
            python = folder / "bin" / "python"
            pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *options, requirement]
            subprocess.run(pip, check=True, timeout=INSTALLING_SECONDS)
            (site,) = folder.glob("lib/python*/site-packages")
            (site / "zz_behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
            made[requirement] = python
        return made[requirement]

    return make


def assert_alike(here: Seen, there: Seen) -> None:
    assert here.facts["version"].startswith("5.") and here.facts["version"] != there.facts["version"]
    assert there.facts["warnings"] == here.facts["warnings"] == []
    for key in ("model", "ids", "longest"):
        assert there.facts[key] == here.facts[key]
    assert there.logits.keys() == here.logits.keys() and len(here.logits) == 6
    for name, logits in here.logits.items():
        assert logits.std() > 0.3
        np.testing.assert_allclose(there.logits[name], logits, rtol=0, atol=1e-5 * np.abs(logits).max())


def say(name: str, here: Seen, there: Seen) -> None:
    worst = max(float(np.abs(here.logits[k] - there.logits[k]).max()) for k in here.logits)
    print(f"{name}: transformers {there.facts['version']} and {here.facts['version']} differ by {worst:.1e} at most")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("family", "requirement"),  # EuroBERT is in 5 alone
    [(family, version) for family, oldest in OLDEST_OF.items() for version in (oldest, NEWEST_4)],
)
def test_an_encoder_is_the_same_in_4_and_5(python_with, corpus, tmp_path, family, requirement, dtype):
    run = make_run(tmp_path / "run", corpus, steps=(6,), changes={"model_type": family})
    export(str(run), str(tmp_path / "model"), dtype)
    oldest = OLDEST_OF[family].removeprefix("transformers==").removesuffix(".0")
    assert f"| Opens in | transformers {oldest} and later" in (tmp_path / "model" / "README.md").read_text()
    here = seen_by(sys.executable, tmp_path / "model")
    there = seen_by(python_with(requirement), tmp_path / "model")
    assert_alike(here, there)
    say(f"{family}, {dtype}", here, there)
    alike = 1 if dtype == "bf16" else 5  # 5's pipeline computes in bf16, whose rounding orders the others
    assert [top[:alike] for top in there.facts["top"]] == [top[:alike] for top in here.facts["top"]]
    assert len(here.facts["top"][0]) == 5
    assert there.facts["tagged"] == here.facts["tagged"] and here.facts["tagged"][-1] == 3
    assert there.facts["stored"] == here.facts["stored"] == {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]
    np.testing.assert_allclose(there.facts["mean_pooled"], here.facts["mean_pooled"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("requirement", [OLDEST, NEWEST_4])
def test_a_pattern_that_4_cannot_express_stops_it(python_with, corpus, tmp_path, requirement):
    changes = {"layer_types": [FULL, FULL, SLIDING, SLIDING]}
    export(str(make_run(tmp_path / "run", corpus, steps=(6,), changes=changes)), str(tmp_path / "model"), "fp32")
    assert seen_by(sys.executable, tmp_path / "model").facts["warnings"] == []
    result = run_python(python_with(requirement), str(WORKER), str(tmp_path / "model"), str(tmp_path / "no.npz"))
    assert result.returncode != 0 and "TypeError" in result.stderr


def test_a_decoder_is_the_same_in_4_or_stops_it(python_with, corpus, tmp_path):
    one_theta = {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": 5e4} for kind in (FULL, SLIDING)}}
    python = python_with(NEWEST_4)
    alike = make_run(tmp_path / "alike", corpus, steps=(4,), changes=one_theta)
    export(str(alike), str(tmp_path / "one"), "fp32", as_decoder=True)
    here, there = (seen_by(which, tmp_path / "one", "--decoder") for which in (sys.executable, python))
    assert_alike(here, there)
    say("decoder", here, there)
    assert there.facts["continued"] == here.facts["continued"]
    export(str(make_run(tmp_path / "run", corpus, steps=(4,))), str(tmp_path / "two"), "fp32", as_decoder=True)
    assert seen_by(sys.executable, tmp_path / "two", "--decoder").facts["warnings"] == []
    result = run_python(python, str(WORKER), str(tmp_path / "two"), str(tmp_path / "no.npz"), "--decoder")
    assert result.returncode != 0 and "TypeError" in result.stderr


@pytest.mark.parametrize("requirement", [OLDEST, NEWEST_4])
def test_what_4_saves_is_a_start_model(python_with, corpus, tmp_path, requirement):
    export(str(make_run(tmp_path / "run", corpus, steps=(6,))), str(tmp_path / "model"), "fp32")
    result = run_python(python_with(requirement), "-c", SAVE, str(tmp_path / "model"), str(tmp_path / "saved"))
    assert result.returncode == 0, result.stderr[-3000:]
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1 and "decoder.weight" not in index["weight_map"]
    started(tmp_path / "saved")


def test_a_tokenizer_saved_by_5_opens_in_4_once_exported(python_with, corpus, tmp_path):
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(corpus.tokenizer, extra_special_tokens=["[DRUG]"])
    saved.save_pretrained(tmp_path / "tokenizer")
    other = dataclasses.replace(corpus, tokenizer=tmp_path / "tokenizer")
    export(str(make_run(tmp_path / "run", other, steps=(6,))), str(tmp_path / "model"), "fp32")
    assert_alike(seen_by(sys.executable, tmp_path / "model"), seen_by(python_with(OLDEST), tmp_path / "model"))


def test_sentence_transformers_takes_the_mean_over_the_tokens(python_with, corpus, tmp_path):
    export(str(make_run(tmp_path / "run", corpus, steps=(6,))), str(tmp_path / "model"), "fp32")
    here = seen_by(sys.executable, tmp_path / "model")
    python = python_with("sentence-transformers", "--no-deps")
    result = run_python(python, "-c", SENTENCES, str(tmp_path / "model"), *TEXTS)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["modules"] == ["Transformer", "Pooling"]
    np.testing.assert_allclose(found["vectors"], here.facts["mean_pooled"], rtol=0, atol=1e-5)
