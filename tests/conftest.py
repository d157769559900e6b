"""What several tests share: a tiny tokenizer and a corpus built with it."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from megatron_detour.corpus import BuildOptions, build_corpus
from megatron_detour.corpus.train_tokenizer import train_tokenizer
from megatron_detour.data.manifest import Manifest
from tests.harness import ROOT

WORDS = {
    "who": ("the patient", "the nurse", "a child", "the surgeon", "la patiente", "le médecin", "an old man"),
    "does": ("takes", "refuses", "reports", "describes", "observe", "prescrit", "measures"),
    "what": ("metformin", "amlodipine", "a fever of 38.5 °C", "some pain", "une toux sèche", "the dose", "an œdema"),
    "when": ("today", "since Monday", "after surgery", "twice a day", "depuis hier", "without any reason"),
}
VOCABULARY = 400
LONG_DOCUMENT = 150  # sentences; far more than 128 tokens


def pytest_collection_modifyitems(items):
    """Files with long tests first, so that no worker is left alone with one at the end."""
    long = {item.path for item in items if item.get_closest_marker("integration")}
    items.sort(key=lambda item: item.path not in long)


@dataclass(frozen=True)
class BuiltCorpus:
    prefix: str
    jsonl: Path
    tokenizer: Path


def pytest_configure(config):
    """Hide GPUs from all tests but those of `-m gpu`, and use one thread per process; in child processes too."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes of several threads slow each other to a crawl
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def sentences(rng: random.Random, count: int) -> str:
    return " ".join(" ".join(rng.choice(group) for group in WORDS.values()).capitalize() + "." for _ in range(count))


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def build(inputs: list[Path | str], prefix: Path | str, tokenizer: Path | str, **options) -> Manifest | None:
    """Builds a corpus from `inputs`."""
    return build_corpus(BuildOptions(str(prefix), str(tokenizer), tuple(map(str, inputs)), **options))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A byte-level BPE of 400 ids with ModernBERT's special tokens and template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = random.Random(1)
    texts = write_jsonl(folder / "texts.jsonl", [sentences(rng, 3) for _ in range(300)])
    train_tokenizer([texts], folder / "tokenizer", VOCABULARY)
    return folder / "tokenizer"


@pytest.fixture(scope="session")
def corpus(tokenizer_folder, tmp_path_factory) -> BuiltCorpus:
    """300 documents of 1 to 8 sentences, one of them far longer than 128 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(2)
    counts = [rng.randint(1, 8) for _ in range(300)]
    counts[137] = LONG_DOCUMENT
    jsonl = write_jsonl(folder / "texts.jsonl", [sentences(rng, count) for count in counts])
    build([jsonl], folder / "corpus", tokenizer_folder)
    return BuiltCorpus(str(folder / "corpus"), jsonl, tokenizer_folder)


@pytest.fixture
def start_model(tokenizer_folder, tmp_path) -> str:
    """A folder of a model of 400 ids."""
    from safetensors.torch import save_file

    from megatron_detour.tokenizer.vocabulary import load_vocabulary
    from tests.models import CONFIG, tiny

    folder = tmp_path / "model"
    folder.mkdir()
    for file in tokenizer_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    size = load_vocabulary(tokenizer_folder).size
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": size}))
    weights = {name: parameter.detach() for name, parameter in tiny(vocab_size=size).named_parameters()}
    save_file(weights, folder / "model.safetensors")
    return str(folder)


@pytest.fixture
def good_run(start_model, corpus, tmp_path) -> dict:
    """A run file that nothing is wrong with."""
    detour = {"name": "detour", "objective": "clm", "tokens": "8 steps", "learning_rate": {"peak": 1e-3}}
    rate = {"peak": 1e-3, "shape": "1-sqrt", "end": 0.0}
    decay = {"name": "decay", "objective": "mlm", "mask_rate": 0.2, "tokens": "2 steps", "learning_rate": rate}
    return {
        "name": "small",
        "folder": str(tmp_path / "run"),
        "model": {"start": start_model},
        "data": {"corpora": [{"prefix": corpus.prefix}], "sequence_length": 128},
        "batch": {"sequences": 8, "micro_sequences": 2},
        "phases": [detour, decay],
        "deepspeed": str(ROOT / "ds_configs/zero2_bf16.json"),
        "validation": {"corpora": [{"prefix": corpus.prefix}], "sequences": 8},
    }


@pytest.fixture
def write_run(tmp_path):
    def write(raw: dict) -> str:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(raw, sort_keys=False))
        return str(path)

    return write
