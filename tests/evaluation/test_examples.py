"""Data sets: every form is read into one, and a line that does not fit is named with its file and number."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.examples import Dataset, read_dataset
from megatron_detour.evaluation.task import Task, load_task
from megatron_detour.evaluation.task_types import TASK_TYPES

GOOD = {
    "token-classification": {"tokens": ["some", "pain"], "tags": ["O", "B-Finding"]},
    "classification": {"text": "some pain", "label": "finding"},
    "multi-label": {"text": "some pain", "labels": ["finding"]},
    "similarity": {"text": "some pain", "text_b": "a fever", "score": 1.5},
    "multiple-choice": {"question": "Which?", "options": {"a": "pain", "b": "dose"}, "answers": ["b"]},
    "multiple-answer": {"question": "Which?", "options": {"a": "pain", "b": "dose"}, "answers": ["b", "a"]},
}
OTHER = {"text": "the dose", "label": "drug"}  # a second class


def task_of(kind: str, **settings) -> Task:
    return Task("small", "en", kind, **settings)


def lines(*records) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write(data: Path, kind: str, **contents: bytes) -> Path:
    """Writes splits; those that are not given hold good lines."""
    folder = data / "small"
    folder.mkdir(exist_ok=True)
    good = [GOOD[kind], OTHER] if kind == "classification" else [GOOD[kind]]
    for split in ("train", "dev", "test"):
        (folder / f"{split}.jsonl").write_bytes(contents.get(split, lines(*good)))
    return data


def read(data: Path, kind: str, settings: dict | None = None, **contents: bytes) -> Dataset:
    return read_dataset(task_of(kind, **(settings or {})), write(data, kind, **contents))


@pytest.mark.parametrize(
    ("kind", "example", "labels"),
    [
        ("token-classification", GOOD["token-classification"], ("O", "B-Finding", "I-Finding")),
        ("classification", GOOD["classification"] | {"text_b": None}, ("drug", "finding")),
        ("multi-label", GOOD["multi-label"] | {"text_b": None}, ("finding",)),
        ("similarity", GOOD["similarity"], ()),
        ("multiple-choice", {"question": "Which?", "options": ["pain", "dose"], "answers": [1]}, ()),
        ("multiple-answer", {"question": "Which?", "options": ["pain", "dose"], "answers": [0, 1]}, ()),
    ],
)
def test_every_type_is_read(tmp_path, kind, example, labels):
    dataset = read(tmp_path, kind)
    assert [dataset.train[0], dataset.dev[0], dataset.test[0]] == [example] * 3
    assert dataset.labels == labels


@pytest.mark.parametrize("kind", GOOD)
def test_other_keys_by_the_tasks_fields(tmp_path, kind):
    renamed = [{f"my_{key}": value for key, value in record.items()} for record in (GOOD[kind], OTHER)]
    content = lines(*(renamed if kind == "classification" else renamed[:1]))
    fields = {key: f"my_{key}" for key in TASK_TYPES[kind].fields if key in GOOD[kind]}
    dataset = read(tmp_path, kind, {"fields": fields}, train=content, dev=content, test=content)
    assert dataset.train == read(tmp_path, kind).train


def test_pairs_of_texts(tmp_path):
    pair = GOOD["classification"] | {"text_b": "a fever"}
    content = lines(pair, OTHER | {"text_b": "today"})
    dataset = read(tmp_path, "classification", train=content, dev=content, test=content)
    assert [example["text_b"] for example in dataset.dev] == ["a fever", "today"]
    with pytest.raises(DetourError, match=r"dev.jsonl, line 1: no key 'text_b' \(did you mean 'text'\?\)"):
        read(tmp_path, "classification", train=content)
    with pytest.raises(DetourError, match=r"dev.jsonl, line 2: has a second text 'text_b', but the first line"):
        read(tmp_path, "classification", dev=lines(OTHER, pair))
    with pytest.raises(DetourError, match=r"train.jsonl, line 1: no key 'second'"):
        read(tmp_path, "classification", {"fields": {"text_b": "second"}})
    assert read(tmp_path, "classification", dev=lines(OTHER | {"text_b": None})).dev[0]["text_b"] is None


def test_line_ends_blank_lines_and_byte_order_mark(tmp_path):
    text = "one\r\ntwo\u2028three\x85"
    written = lines(GOOD["classification"] | {"text": text}, OTHER).replace(b"\n", b"\r\n")
    dataset = read(tmp_path, "classification", train=b"\xef\xbb\xbf\r\n" + written + b"\n \n")
    assert [example["text"] for example in dataset.train] == [text, "the dose"]


def test_compressed_and_other_endings_are_the_same_data(tmp_path):
    plain = read(tmp_path, "classification")
    folder = tmp_path / "small"
    (folder / "train.jsonl.gz").write_bytes(gzip.compress((folder / "train.jsonl").read_bytes()))
    with pytest.raises(DetourError, match=r"small: both train.jsonl and train.jsonl.gz exist; keep one"):
        read_dataset(task_of("classification"), tmp_path)
    (folder / "train.jsonl").unlink()
    (folder / "dev.jsonl").rename(folder / "dev.json")
    assert read_dataset(task_of("classification"), tmp_path) == plain
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(lines(*[OTHER] * 99, GOOD["classification"]))[:-20])
    with pytest.raises(DetourError, match=r"train.jsonl.gz: cannot read the whole file"):
        read_dataset(task_of("classification"), tmp_path)
    (folder / "train.jsonl.gz").write_bytes(b"nothing")
    with pytest.raises(DetourError, match=r"train.jsonl.gz: cannot read the whole file: Not a gzipped file"):
        read_dataset(task_of("classification"), tmp_path)


def test_the_hash_is_that_of_all_three_splits(tmp_path):
    content = lines(GOOD["classification"], OTHER)
    hashes = {read(tmp_path, "classification").sha256}
    for split in ("train", "dev", "test"):
        hashes.add(read(tmp_path, "classification", **{split: content + lines(OTHER)}).sha256)
    assert len(hashes) == 4
    assert read(tmp_path, "classification").sha256 in hashes


def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(DetourError, match=r"small: no such folder; put train.jsonl, dev.jsonl"):
        read_dataset(task_of("similarity"), tmp_path)
    (tmp_path / "small").mkdir()
    with pytest.raises(DetourError, match=r"small: none of train.jsonl, .* exists; the folder is empty"):
        read_dataset(task_of("similarity"), tmp_path)
    write(tmp_path, "similarity")
    (tmp_path / "small/dev.jsonl").rename(tmp_path / "small/validation.jsonl")
    with pytest.raises(DetourError, match=r"none of dev.jsonl, .*contains test.jsonl, train.jsonl, validation.jsonl"):
        read_dataset(task_of("similarity"), tmp_path)


def changed(kind: str, **values) -> bytes:
    return json.dumps(GOOD[kind] | values).encode()


@pytest.mark.parametrize(
    ("kind", "line", "says"),
    [
        ("similarity", b"{", r"invalid JSON: Expecting"),
        ("similarity", b'{"text": "a", "text": "b"}', "duplicate key 'text'"),
        ("similarity", b"[" * 100_000, "not a JSON object; write one object per line"),
        ("similarity", b'{"a": ' + b"[" * 100_000, "nested too deep"),
        ("similarity", b"[{}, {}]", "not a JSON object; write one object per line"),
        ("similarity", b"[{}, ", "not a JSON object; write one object per line, not a list"),
        ("similarity", b"5", "not a JSON object"),
        ("similarity", b"\xff", "not UTF-8"),
        ("similarity", rb'{"text": "\ud800"}', "contains a lone surrogate"),
        ("similarity", b'{"txt": "a"}', r"no key 'text' \(did you mean 'txt'\?\); if .* fields: {text: KEY}"),
        ("similarity", changed("similarity", text=None), "'text' is null, not a string"),
        ("similarity", changed("similarity", text=["a"]), "'text' is a list, not a string"),
        ("similarity", changed("similarity", text=" "), "'text' is blank"),
        ("similarity", changed("similarity", score="high"), "'score' is a string, not a number"),
        ("similarity", changed("similarity", score=True), "'score' is true, not a number"),
        ("similarity", changed("similarity", score=None), "'score' is null, not a number"),
        ("similarity", changed("similarity", score=float("nan")), "'score' is NaN, not a number"),
        ("similarity", changed("similarity", score=10**400), "'score' is 1000"),
        ("classification", changed("classification", label=None), "'label' is null, not a name or an integer"),
        ("classification", changed("classification", label=1.5), "'label' is 1.5, not a name"),
        ("classification", changed("classification", label=True), "'label' is true, not a name"),
        ("classification", changed("classification", label=""), "'label' is an empty string, not a name"),
        ("classification", b'{"text": "a"}', "no key 'label'; if"),
        ("multi-label", changed("multi-label", labels="finding"), "'labels' is a string, not a list"),
        ("multi-label", changed("multi-label", labels=["a", "b", "a"]), "duplicate 'a' in 'labels'"),
        ("multi-label", changed("multi-label", labels=[["a"]]), "'labels' is a list, not a name"),
        (
            "token-classification",
            changed("token-classification", tags=["O"]),
            "2 values in 'tokens', but 1 in 'tags'",
        ),
        (
            "token-classification",
            changed("token-classification", tags=["O", "Finding"]),
            "invalid BIO tag 'Finding'",
        ),
        ("token-classification", changed("token-classification", tags=["O", "B-"]), "invalid BIO tag 'B-'"),
        (
            "token-classification",
            changed("token-classification", tags=["O", "E-Finding"]),
            "invalid BIO tag 'E-Finding'",
        ),
        (
            "token-classification",
            changed("token-classification", tags=["O", 3]),
            "'tags' must contain only strings",
        ),
        (
            "token-classification",
            changed("token-classification", tokens="a b"),
            "'tokens' is a string, not a list",
        ),
        ("token-classification", b'{"tokens": [], "tags": []}', "'tokens' is empty; omit"),
        ("multiple-choice", changed("multiple-choice", options={"a": "pain"}), "1 options; give at least two"),
        ("multiple-choice", changed("multiple-choice", options="ab"), "'options' is neither an object nor a list"),
        ("multiple-choice", changed("multiple-choice", options=["a", ""]), "'options' is blank"),
        (
            "multiple-choice",
            changed("multiple-choice", answers=["c"]),
            "the answer 'c' is not an option; choose from a, b",
        ),
        (
            "multiple-choice",
            changed("multiple-choice", options=["x", "y"], answers=[2]),
            "'2' is not an option; choose from 0, 1",
        ),
        (
            "multiple-choice",
            changed("multiple-choice", answers=[]),
            "0 right answers; multiple-choice needs exactly one",
        ),
        (
            "multiple-choice",
            changed("multiple-choice", answers=["a", "b"]),
            "2 right answers; multiple-choice needs exactly",
        ),
        ("multiple-answer", changed("multiple-answer", answers=["a", "a"]), "duplicate 'a' in 'answers'"),
        (
            "multiple-answer",
            changed("multiple-answer", answers=[]),
            "no right answer; multiple-answer needs at least one",
        ),
        ("multiple-answer", changed("multiple-answer", answers=[None]), "'answers' is null, not a name"),
    ],
)
def test_a_bad_line_is_named(tmp_path, kind, line, says):
    with pytest.raises(DetourError, match=says) as caught:
        read(tmp_path, kind, dev=b"\n" + lines(GOOD[kind]) + line + b"\n")
    assert str(caught.value).startswith(f"{tmp_path / 'small/dev.jsonl'}, line 3: ")
    assert "\n" not in str(caught.value)


def test_messages_hold_no_text_of_the_data(tmp_path):
    secret = "Mrs Example of Ward 5"
    for value in (secret, [secret], {"a": secret}):
        with pytest.raises(DetourError) as caught:
            read(tmp_path, "similarity", dev=changed("similarity", score=value))
        assert "Mrs" not in str(caught.value)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_an_empty_split_is_refused(tmp_path, split):
    with pytest.raises(DetourError, match=rf"{split}.jsonl: no examples"):
        read(tmp_path, "similarity", **{split: b"\n"})


@pytest.mark.parametrize(
    ("kind", "known", "new", "label"),
    [
        ("classification", {}, {"label": "findings"}, "label 'findings'"),
        ("multi-label", {}, {"labels": ["finding", "drug"]}, "label 'drug'"),
        ("token-classification", {}, {"tags": ["O", "I-Drug"]}, "entity type 'Drug'"),
    ],
)
def test_a_label_that_train_lacks(tmp_path, kind, known, new, label):
    content = lines(GOOD[kind], GOOD[kind] | new)
    for split in ("dev", "test"):
        with pytest.raises(DetourError, match=rf"{split}.jsonl, line 2: the {label} is not in the training split"):
            read(tmp_path, kind, **{split: content})
    # a task that lists it takes it, and one that lists others refuses it in every split
    listed = ("finding", "findings", "drug", "Finding", "Drug")
    assert len(read(tmp_path, kind, {"labels": listed}, test=content).test) == 2
    with pytest.raises(DetourError, match=rf"train.jsonl, line 2: the {label} is missing from the task's labels"):
        read(tmp_path, kind, {"labels": ("finding", "Finding")}, train=content)


def test_listed_labels_are_the_data_sets(tmp_path):
    assert read(tmp_path, "classification", {"labels": ("z", "finding", "drug")}).labels == ("drug", "finding", "z")
    labels = read(tmp_path, "token-classification", {"labels": ("Finding", "Drug")}).labels
    assert labels == ("O", "B-Drug", "I-Drug", "B-Finding", "I-Finding")


def test_nothing_to_learn_is_told(tmp_path):
    with pytest.raises(DetourError, match=r"train.jsonl: only the label 'finding', so there is nothing to learn"):
        read(tmp_path, "classification", train=lines(GOOD["classification"]))
    with pytest.raises(DetourError, match=r"train.jsonl: no labels, so"):
        read(tmp_path, "multi-label", train=lines(GOOD["multi-label"] | {"labels": []}))
    with pytest.raises(DetourError, match=r"train.jsonl: no labels, so"):
        read(tmp_path, "token-classification", train=lines(GOOD["token-classification"] | {"tags": ["O", "O"]}))


def test_bio_is_kept_as_it_is(tmp_path):
    tags = ["I-Finding", "B-Finding"]
    dataset = read(tmp_path, "token-classification", dev=changed("token-classification", tags=tags))
    assert dataset.dev[0]["tags"] == tags
    tags = ["B-Multi-tissue_structure", "I-gène p53"]  # types may hold hyphens and spaces
    dataset = read(
        tmp_path,
        "token-classification",
        train=lines(GOOD["token-classification"] | {"tags": tags}),
        **{split: changed("token-classification", tags=tags) for split in ("dev", "test")},
    )
    assert dataset.labels[1:] == ("B-Multi-tissue_structure", "I-Multi-tissue_structure", "B-gène p53", "I-gène p53")


def test_whole_numbers_are_labels_and_answers(tmp_path):
    content = lines({"text": "a", "label": 0}, {"text": "b", "label": 1})
    dataset = read(tmp_path, "classification", train=content, dev=content, test=content)
    assert dataset.labels == ("0", "1") and dataset.test[1]["label"] == "1"
    question = {"question": "Which?", "options": {"1": "pain", "2": "dose"}, "answers": 2}
    content = lines(question)
    assert read(tmp_path, "multiple-choice", train=content, dev=content, test=content).dev[0]["answers"] == [1]


# ------------------------------------------------------------------------------------------------ look-alikes


def labeled(folder: Path, kind: str, values: list, labels: str = "") -> Dataset:
    """Reads a task whose examples have these labels, the same in all splits."""
    key = "label" if kind == "classification" else "labels"
    (folder / "mine").mkdir()
    for split in ("train", "dev", "test"):
        lines = [json.dumps({"text": f"text {n}", key: value}) + "\n" for n, value in enumerate(values)]
        (folder / "mine" / f"{split}.jsonl").write_text("".join(lines))
    (folder / "mine.yaml").write_text(f"name: mine\nlanguage: en\ntype: {kind}\n{labels}")
    return read_dataset(load_task(str(folder / "mine.yaml")), folder)


def one_hot(number: int, zero, one) -> list[list]:
    return [[one if at == row % number else zero for at in range(number)] for row in range(8)]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 20])
@pytest.mark.parametrize(("zero", "one"), [(0, 1), ("0", "1"), (0.0, 1.0), (False, True)])
def test_vectors_of_zero_and_one_are_no_names(length, zero, one, tmp_path):
    values = [[zero], [one]] * 4 if length == 1 else one_hot(length, zero, one)
    with pytest.raises(DetourError, match="labels look like a vector of 0 and 1"):
        labeled(tmp_path, "multi-label", values)


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        ([[0], [1], [0, 1], []], "", ("0", "1")),
        ([[0, 1], [2], [1, 2]], "", ("0", "1", "2")),
        ([[0, 1], [1, 0]], "labels: ['0', '1']\n", ("0", "1")),
    ],
)
def test_numbers_of_labels_are_names(values, labels, expected, tmp_path):
    assert labeled(tmp_path, "multi-label", values, labels).labels == expected


@pytest.mark.parametrize("kind", ["classification", "multi-label"])
@pytest.mark.parametrize(
    ("one", "other", "told"),
    [
        (1, "1", r"the label '1' is a number in one line and a string in another"),
        ("yes", "yes ", "the labels 'yes' and 'yes ' look alike"),
        ("a b", "a  b", "the labels .* look alike"),
        ("é", "e\u0301", "the labels .* look alike"),
        ("a", "a\u200b", "the labels .* look alike"),
        ("a", " ", "not a name or an integer"),
        ("a", True, "not a name or an integer|a vector of 0 and 1"),
        ("a", None, "not a name or an integer"),
        ("a", 1.0, "not a name or an integer|a vector of 0 and 1"),
    ],
)
def test_labels_that_look_alike_are_refused(kind, one, other, told, tmp_path):
    values = [one, other] if kind == "classification" else [[one], [other], []]
    with pytest.raises(DetourError, match=told) as caught:
        labeled(tmp_path, kind, values)
    assert str(caught.value).isprintable()


WRONG = [None, [], {}, True, -1, 1e308, "", " ", "x", [[]], [None], {"a": {}}, "\x1b[31m"]


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_a_value_of_another_type_is_one_sentence_or_holds(kind, tmp_path):
    """Every part of an example of every type, with every kind of wrong value."""
    (tmp_path / kind).mkdir()
    (tmp_path / "t.yaml").write_text(f"name: {kind}\nlanguage: en\ntype: {kind}\n")
    task = load_task(str(tmp_path / "t.yaml"))
    whole = {"tokens": ["a"], "tags": ["B-X"], "text": "a", "text_b": "b", "label": "x", "labels": ["x"], "score": 1.5,
             "question": "q", "options": ["a", "b"], "answers": [0]}  # fmt: skip
    for key, value in itertools.product(TASK_TYPES[kind].fields, WRONG):
        records = [whole, whole | {"label": "y"}, whole | {key: value}]
        for split in ("train", "dev", "test"):
            (tmp_path / kind / f"{split}.jsonl").write_bytes(lines(*records))
        try:
            read_dataset(task, tmp_path)
        except DetourError as fault:
            assert "jsonl" in str(fault) and "\n" not in str(fault)
