"""A tiny task of each type, with words from which a small model can learn it."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import WORDS

SIZES = {"train": 60, "dev": 20, "test": 20}
DRUGS = ("metformin", "amlodipine", "the dose")
FINDINGS = ("a fever of 38.5 °C", "some pain", "une toux sèche", "an œdema")


def write_small_tasks(folder: Path) -> dict[str, str]:
    """Writes FOLDER/NAME.yaml and FOLDER/NAME/{train,dev,test}.jsonl[.gz] of a task a type; returns names by type."""
    return {kind: _write_task(folder, kind, make) for kind, make in MAKERS.items()}


def _write_task(folder: Path, kind: str, make: Callable[[random.Random], dict[str, Any]]) -> str:
    name = f"small_{kind.replace('-', '_')}"
    (folder / name).mkdir(parents=True)
    yaml = f"name: {name}\ntitle: A tiny {kind} task\nlanguage: en\ntype: {kind}\n{FIELDS.get(kind, '')}"
    (folder / f"{name}.yaml").write_text(yaml, encoding="utf-8")
    rng = random.Random(kind)
    for split, size in SIZES.items():
        lines = [json.dumps(make(rng), ensure_ascii=False) + "\n" for _ in range(size)]
        content = "".join(lines).encode()
        if split == "test":
            (folder / name / "test.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
        else:
            (folder / name / f"{split}.jsonl").write_bytes(content)
    return name


def _parts(rng: random.Random) -> dict[str, str]:
    parts = {key: rng.choice(group) for key, group in WORDS.items()}
    return parts | {"what": rng.choice(rng.choice((DRUGS, FINDINGS)))}  # as many drugs as findings


def _sentence(parts: dict[str, str]) -> str:
    return f"{' '.join(parts[key] for key in WORDS)}."


def _token_classification(rng: random.Random) -> dict[str, Any]:
    """The words of a drug or a finding are an entity; a full stop is a word."""
    parts = _parts(rng)
    kind = "Drug" if parts["what"] in DRUGS else "Finding"
    tokens, tags = [], []
    for key in WORDS:
        words = parts[key].split()
        tokens += words
        tags += [f"B-{kind}"] + [f"I-{kind}"] * (len(words) - 1) if key == "what" else ["O"] * len(words)
    return {"tokens": [*tokens, "."], "tags": [*tags, "O"]}


def _classification(rng: random.Random) -> dict[str, Any]:
    parts = _parts(rng)
    return {"text": _sentence(parts), "label": "drug" if parts["what"] in DRUGS else "finding"}


def _multi_label(rng: random.Random) -> dict[str, Any]:
    """None, one or several of three labels, a word for each."""
    parts = _parts(rng)
    words = {"drug": parts["what"] in DRUGS, "surgery": parts["when"] == "after surgery"}
    words["woman"] = parts["who"] in ("the nurse", "la patiente")
    return {"text": _sentence(parts), "labels": [label for label, there in words.items() if there]}


def _similarity(rng: random.Random) -> dict[str, Any]:
    """The more of the two texts name a drug, the higher: 0, 2 or 4."""
    first, second = _parts(rng), _parts(rng)
    score = 2.0 * ((first["what"] in DRUGS) + (second["what"] in DRUGS))
    return {"text_a": _sentence(first), "text_b": _sentence(second), "score": score}


def _multiple_choice(rng: random.Random) -> dict[str, Any]:
    """One drug among findings; a list of options, and the right one's number."""
    options = [rng.choice(DRUGS), *rng.sample(FINDINGS, rng.choice((2, 3)))]
    right = options[0]
    rng.shuffle(options)
    return {
        "question": f"What does {rng.choice(WORDS['who'])} take?",
        "options": options,
        "answers": options.index(right),
    }


def _multiple_answer(rng: random.Random) -> dict[str, Any]:
    """One, two or three drugs among findings; options by letters, as in FrenchMedMCQA."""
    drugs = rng.sample(DRUGS, rng.choice((1, 2, 3)))
    texts = [*drugs, *rng.sample(FINDINGS, 5 - len(drugs))]
    rng.shuffle(texts)
    options = dict(zip("abcde", texts, strict=True))
    answers = [letter for letter, text in options.items() if text in drugs]
    return {"question": f"What does {rng.choice(WORDS['who'])} take?", "options": options, "answers": answers}


FIELDS = {"similarity": "fields: {text: text_a}\n"}
MAKERS = {
    "token-classification": _token_classification,
    "classification": _classification,
    "multi-label": _multi_label,
    "similarity": _similarity,
    "multiple-choice": _multiple_choice,
    "multiple-answer": _multiple_answer,
}
