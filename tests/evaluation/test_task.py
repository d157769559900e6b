"""Tasks: the packaged ones are whole and stand in the docs, a user's own is read, and what is wrong is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.examples import Dataset, read_dataset
from megatron_detour.evaluation.task import FOLDER, Task, load_task, packaged_tasks
from megatron_detour.evaluation.task_types import TASK_TYPES
from megatron_detour.settings import settings_of
from tests.evaluation.small_tasks import SIZES, write_small_tasks

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/tasks.md").read_text(encoding="utf-8")
SHARED = ROOT / "../shared/data/tasks"
PAPER = {
    "en": "anatem bc5cdr chemprot cos deid gad hoc jnlpba ncbi_disease phenotype social_history",
    "fr": "cantemist diamed distemist fracco_100 fracco_30 meddialog quaero_emea quaero_medline",
}
MINE = "name: mine\nlanguage: en\ntype: classification\n"


NEEDS_NO_ACCESS = (
    "anatem bc2gm bc5cdr bionlp13cg biosses casimedicos_mcq_en casimedicos_mcq_fr chemprot frenchmedmcqa hoc jnlpba "
    "medical_abstracts morfitt mts_dialog ncbi_disease pubmedqa quaero_emea quaero_medline rct_sections scicite"
)
PUBLIC = NEEDS_NO_ACCESS.split()


@pytest.fixture
def own(tmp_path):
    """Writes a YAML file of one's own and loads it."""

    def load(content: str) -> Task:
        (tmp_path / "mine.yaml").write_text(content, encoding="utf-8")
        return load_task(str(tmp_path / "mine.yaml"))

    return load


@pytest.mark.parametrize("name", packaged_tasks())
def test_packaged_tasks_are_whole(name):
    task = load_task(name)
    assert task.name == name
    assert task.language in ("en", "fr") and task.paper in ("", task.language)
    assert task.metrics[0] == task.metric and set(task.metrics) == set(task.kind.metric_names)
    assert task.title and task.license and task.source
    assert bool(task.access) == (name not in PUBLIC)


def test_the_papers_tasks():
    of_paper = {"en": [], "fr": []}
    for name in packaged_tasks():
        if paper := load_task(name).paper:
            of_paper[paper].append(name)
    assert {paper: " ".join(names) for paper, names in of_paper.items()} == PAPER


def test_every_type_has_a_packaged_task():
    assert {load_task(name).type for name in packaged_tasks()} == set(TASK_TYPES)


def test_the_page_names_every_task_with_its_facts():
    rows = {row[0].strip("`"): row[1:] for row in (re.split(r" \| ", line[2:-2]) for line in _table_lines())}
    assert list(rows) == packaged_tasks()
    for name, (language, kind, metric, paper, license, how) in rows.items():
        task = load_task(name)
        assert (language, kind, metric, license) == (task.language, task.type, task.metric, task.license), name
        assert paper == ("yes" if task.paper else ""), name
        assert how == task.source, name
        assert task.access in " ".join(PAGE.split()), name


def _table_lines() -> list[str]:
    return [line for line in PAGE.rpartition("## All tasks")[2].splitlines() if line.startswith("| `")]


def test_the_pages_example_of_ones_own_and_lines_are_read(own, tmp_path):
    """The YAML of the page, and the example line of each type, as they stand."""
    (yaml,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    task = own(yaml)
    assert (task.name, task.metric) == ("ward", "macro_f1")
    lines = dict(re.findall(r"^\*\*([a-z-]+)\*\*.*?```json\n(.*?)\n```", PAGE, re.DOTALL | re.MULTILINE))
    assert set(lines) == set(TASK_TYPES)
    for kind, line in lines.items():
        (tmp_path / kind).mkdir()
        other = json.loads(line) | {"label": "another"} if kind == "classification" else json.loads(line)
        for split in ("train", "dev", "test"):
            (tmp_path / kind / f"{split}.jsonl").write_text(f"{line}\n{json.dumps(other)}\n", encoding="utf-8")
        assert len(read_dataset(own(f"name: {kind}\nlanguage: en\ntype: {kind}\n"), tmp_path).train) == 2


def test_a_short_file_is_filled_up(own):
    assert own(MINE) == Task(
        "mine", "en", "classification", "mine", "macro_f1", ("macro_f1", "weighted_f1", "micro_f1", "accuracy")
    )
    task = own(f"{MINE}metric: accuracy\nmetrics: [weighted_f1]\nlabels: ['yes', 'no']\nfields: {{label: class}}\n")
    assert (task.metric, task.metrics) == ("accuracy", ("accuracy", "weighted_f1"))
    assert (task.labels, task.fields) == (("yes", "no"), {"label": "class"})
    assert own(f"{MINE}licence: MIT\n").license == own(f"{MINE}license: MIT\n").license == "MIT"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "must be a mapping with name, language, type, title, "),
        ("a: b: c", "invalid YAML"),
        (f"{MINE}type: similarity\n", "line 4: duplicate key 'type'"),
        (f"{MINE}title: 'a\u202eb'\n", "title: must be non-empty text of printable characters"),
        ("language: en\ntype: similarity\n", "name: this key is required"),
        ("name: a\ntype: similarity\n", "language: this key is required"),
        ("name: a\nlanguage: en\n", "type: this key is required"),
        (f"{MINE}metrik: accuracy\n", r"metrik: unknown key \(did you mean 'metric'\?\)"),
        (f"{MINE}1: 2\n", "1: unknown key"),
        (
            "name: 5\nlanguage: en\ntype: similarity\n",
            "name: must be text, in quotes where YAML takes it for something else, not 5",
        ),
        ("name: a/b\nlanguage: en\ntype: similarity\n", "name: must be a folder name of letters, .*, not 'a/b'"),
        ("name: ..\nlanguage: en\ntype: similarity\n", "name: must be a folder name of letters, .*, not '..'"),
        ("name: a\nlanguage: no\ntype: similarity\n", "language: must be text, in quotes .*, not False"),
        (
            "name: a\nlanguage: English\ntype: similarity\n",
            "language: must be a language code such as en or fr, not 'English'",
        ),
        ("name: a\nlanguage: en\ntype: ner\n", "type: must be one of classification, .*, not 'ner'"),
        ("name: a\nlanguage: en\ntype: multilabel\n", "type: must be one of .*, not 'multilabel' .*mean 'multi-label'"),
        (f"{MINE}title: ' '\n", "title: must be non-empty text"),
        (f"{MINE}paper: de\n", "paper: must be one of en, fr, not 'de'"),
        (f"{MINE}metric: entity_f1\n", "metric: classification has no 'entity_f1'.*; choose from macro_f1"),
        (f"{MINE}metrics: [accurracy]\n", "metrics: classification has no 'accurracy' .*did you mean 'accuracy'"),
        (f"{MINE}metrics: accuracy\n", "metrics: must be a list, not 'accuracy'"),
        (f"{MINE}labels: [a, yes]\n", "labels.1: must be text, in quotes .*, not True"),
        (f"{MINE}labels: [a, b, a]\n", "labels: must be a list without repetitions"),
        ("name: a\nlanguage: en\ntype: similarity\nlabels: [a]\n", "labels: tasks of type similarity have no labels"),
        (f"{MINE}fields: [a]\n", "fields: must be a mapping, not \\['a'\\]"),
        (f"{MINE}fields: {{labels: a}}\n", "fields: classification has no 'labels' .*did you mean 'label'"),
        (f"{MINE}fields: {{label: 1}}\n", "fields.label: must be text, in quotes .*, not 1"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(own, tmp_path, content, says):
    with pytest.raises(DetourError, match=says) as caught:
        own(content)
    assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}: ")
    assert "\n" not in str(caught.value)


def test_an_unknown_task_is_named_with_the_nearest(tmp_path):
    with pytest.raises(
        DetourError, match=r"task bc5cd: neither packaged \(docs/tasks.md\) nor .*did you mean 'bc5cdr'"
    ):
        load_task("bc5cd")
    with pytest.raises(DetourError, match="neither packaged"):
        load_task(str(tmp_path))  # a folder


def test_small_tasks_of_all_types(tmp_path):
    names = write_small_tasks(tmp_path)
    assert names.keys() == TASK_TYPES.keys()
    for kind, name in names.items():
        task = load_task(str(tmp_path / f"{name}.yaml"))
        dataset = read_dataset(task, tmp_path)
        assert task.type == kind
        assert {split: len(getattr(dataset, split)) for split in SIZES} == SIZES
        assert list(dataset.labels) == {
            "token-classification": ["O", "B-Drug", "I-Drug", "B-Finding", "I-Finding"],
            "classification": ["drug", "finding"],
            "multi-label": ["drug", "surgery", "woman"],
        }.get(kind, [])


def test_small_tasks_are_the_same_every_time(tmp_path):
    hashes = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        names = write_small_tasks(folder)
        hashes.append([read_dataset(load_task(str(folder / f"{name}.yaml")), folder).sha256 for name in names.values()])
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == len(TASK_TYPES)


def _counts(dataset: Dataset) -> dict[str, int]:
    counts: dict[str, int] = {}
    for example in (*dataset.train, *dataset.dev, *dataset.test):
        single = [example["label"]] if "label" in example else []
        for label in [*example.get("tags", ()), *example.get("labels", ()), *single]:
            counts[label] = counts.get(label, 0) + 1
    return counts


def _train_test_duplicates(dataset: Dataset) -> int:
    """How many different inputs of the test split are in the training split too, whatever their answers."""
    keys = {"tokens", "text", "text_b", "question"}
    train, test = (
        {json.dumps({key: value for key, value in example.items() if key in keys}) for example in split}
        for split in (dataset.train, dataset.test)
    )
    return len(train & test)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there; small tasks of all types are read anyway")
@pytest.mark.parametrize("name", PUBLIC)
def test_real_tasks_have_the_counts_of_their_makers(name):
    meta = json.loads((SHARED / name / "meta.json").read_text(encoding="utf-8"))
    task = load_task(name)
    dataset = read_dataset(task, SHARED)
    assert {split: len(getattr(dataset, split)) for split in SIZES} == meta["n"]
    assert _counts(dataset) == meta["labels"]
    assert set(dataset.labels) >= set(meta["labels"])
    assert _train_test_duplicates(dataset) == meta["train_test_duplicates"]
    assert task.language == meta["lang"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")
def test_every_folder_of_the_real_data_is_a_task():
    assert sorted(path.name for path in SHARED.iterdir() if path.is_dir()) == PUBLIC
    assert set(PUBLIC) <= {path.stem for path in FOLDER.glob("*.yaml")}


WRONG = ("null", "[]", "{}", "true", "-1", "1e99", "[[1]]", "[null]", "{a: []}", "9" * 400, "!!python/object:os.x {}")


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("key", [setting.name for setting in settings_of(Task)])
def test_a_task_of_other_types_is_one_sentence_or_holds(key, wrong, own):
    parts = {"name": "mine", "language": "en", "type": "classification"} | {key: wrong}
    try:
        assert isinstance(own("".join(f"{name}: {value}\n" for name, value in parts.items())), Task)
    except DetourError as fault:
        assert "mine.yaml" in str(fault) and "\n" not in str(fault)
