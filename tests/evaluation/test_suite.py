"""Suites: what is done is not done again, kills lose what ran, faults come before any training, commands read well."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_detour.commands import evaluate as command
from megatron_detour.commands.parser import Parser
from megatron_detour.errors import DetourError
from megatron_detour.evaluation.finetuning.progress import SuiteProgress
from megatron_detour.evaluation.finetuning.protocol import KNOWN, load_protocol, packaged_protocols
from megatron_detour.evaluation.models import check_model
from megatron_detour.evaluation.results import Cell, add_result, predictions_path, read_results
from megatron_detour.evaluation.task import load_task, packaged_tasks
from megatron_detour.evaluation.task_types import TASK_TYPES
from tests.evaluation.small_tasks import write_small_tasks
from tests.evaluation.test_finetune import write_tiny_model
from tests.harness import ROOT, environment

pytestmark = pytest.mark.integration

FAST = ("learning_rate=3e-3", "epochs=1", "batch=8")
TIMES = ("seconds",)


@pytest.fixture(scope="module")
def workshop(tokenizer_folder, tmp_path_factory) -> Path:
    """A folder with two models, `first` and `second`, and tiny tasks under `tasks`."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / "tasks").mkdir()
    write_small_tasks(folder / "tasks")
    for name in ("first", "second"):
        write_tiny_model(folder / name, tokenizer_folder)
    config = json.loads((folder / "second" / "config.json").read_text())
    (folder / "second" / "config.json").write_text(json.dumps(config | {"local_attention": 16}))
    return folder


def arguments(workshop: Path, output: Path, *more: str, tasks=("classification", "token_classification"), seeds=2):
    files = [str(workshop / "tasks" / f"small_{task}.yaml") for task in tasks]
    return [
        *("--model", str(workshop / "first"), f"other={workshop / 'second'}", "--tasks", *files),
        *("--data", str(workshop / "tasks"), "--seeds", str(seeds), "--output", str(output), *more, "--set", *FAST),
    ]


def start(workshop: Path, output: Path, *more: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "evaluate.py"), *arguments(workshop, output, *more, **options)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def figures(output: Path) -> dict[Cell, dict]:
    """Results without their times, and the predictions, which have to be there."""
    found = {}
    for cell, result in read_results(output).items():
        kept = {key: value for key, value in result.items() if key not in TIMES}
        found[cell] = kept | {"predictions": json.loads(predictions_path(output, cell).read_text())}
    return found


@pytest.fixture(scope="module")
def unbroken(workshop, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("evaluations") / "unbroken"
    status, out, err = finish(start(workshop, output))
    assert status == 0, err
    assert "8/8  other, small_token_classification, seed 43: entity_f1" in err
    assert str(output / "report.html") in out and "small_classification" in out
    return output


def test_a_suite_writes_what_it_promises(unbroken):
    results = read_results(unbroken)
    assert [tuple(cell) for cell in results] == [
        (model, task, seed, False)
        for seed in (42, 43)
        for task in ("small_classification", "small_token_classification")
        for model in ("first", "other")
    ]
    for cell, result in results.items():
        predictions = json.loads(predictions_path(unbroken, cell).read_text())
        assert len(predictions["gold"]) == len(predictions["predicted"]) == result["examples"]["test"] == 20
        assert result["score"] == result["scores"][result["metric"]] and result["steps"] == 8
        assert result["protocol"] == "quick batch=8 epochs=1 learning_rate=0.003"
    assert {path.name for path in unbroken.iterdir()} >= {"report.html", "report.md", "scores.png", "summary.json"}
    assert not (unbroken / ".scratch").exists()


def test_kills_lose_nothing_that_was_finished(workshop, unbroken, tmp_path):
    """The parent alone is killed, or all; workers end with it; the numbers are those of the unbroken suite."""
    output, lines = tmp_path / "killed", []
    for everyone in (False, True):
        process = start(workshop, output)
        deadline = time.monotonic() + 120
        while len(read_results(output)) < len(lines) + 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(random.random() / 4)
        workers = _children(process.pid)
        os.killpg(process.pid, signal.SIGKILL) if everyone else os.kill(process.pid, signal.SIGKILL)
        process.wait()
        _await_end(workers)
        before, lines = lines, _whole_lines(output)
        assert lines[: len(before)] == before and len(before) + 2 <= len(lines) < 8
    status, _, err = finish(start(workshop, output))
    assert status == 0 and f"{len(lines)} of 8 fine-tunings are already finished" in err
    assert _whole_lines(output)[: len(lines)] == lines
    assert figures(output) == figures(unbroken)
    assert not (output / ".scratch").exists()


def _whole_lines(output: Path) -> list[str]:
    return (output / "results.jsonl").read_text().split("\n")[:-1]


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert found
    return [int(child) for child in found]


def _await_end(processes: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(_lives(pid) for pid in processes):
        assert time.monotonic() < deadline, "a worker outlives its parent"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_finished_suite_does_nothing_and_more_seeds_only_theirs(workshop, unbroken, tmp_path, capsys):
    before = (unbroken / "results.jsonl").read_bytes()
    command.run(_options(arguments(workshop, unbroken)))
    assert "8 of 8 fine-tunings are already finished" in capsys.readouterr().err
    assert (unbroken / "results.jsonl").read_bytes() == before


def _options(words: list[str]):
    parser = Parser()
    command.add_arguments(parser)
    return parser.read(words)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["epochs=2"], "contains results of protocol"),
        (["--seeds", "0"], "--seeds: must be at least 1 and at most 1,000, not 0"),
        (["--tasks", "hocc"], r"hocc.*did you mean 'hoc'"),
        (["epoch=2"], r"epoch=2: give key=value with a key of the protocol.*did you mean 'epochs'"),
        (["batch=8", "batch=9"], "batch=9: batch is given twice"),
        (["batch=many"], "batch=many: batch: must be an integer, not 'many'"),
        (["warmup=2"], "warmup: must be at least 0 and below 1, not 2"),
        (["--model", "/nowhere"], r"--model /nowhere: no such folder"),
        (["--model", "a=one/x", "a=two/x"], "a second model named 'a'"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_one_sentence(workshop, unbroken, change, told, capsys):
    words = arguments(workshop, unbroken)
    if change[0].startswith("--"):
        at = words.index(change[0])
        after = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
        words[at:after] = change
    else:
        key = change[0].partition("=")[0]
        words = [*(word for word in words if not word.startswith(f"{key}=")), *change]
    with pytest.raises(DetourError, match=told) as caught:
        command.run(_options(words))
    assert "\n" not in str(caught.value)


def test_models_without_weights_or_tokenizer_are_told_together(workshop, unbroken, tmp_path):
    for name, missing in (("bare", "tokenizer.json"), ("empty", "model.safetensors")):
        (tmp_path / name).mkdir()
        for path in (workshop / "first").iterdir():
            if path.name != missing:
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
    words = arguments(workshop, tmp_path / "out")
    words[1:3] = [str(tmp_path / "bare"), str(tmp_path / "empty")]
    with pytest.raises(DetourError, match="2 faults") as caught:
        command.run(_options(words))
    assert "no tokenizer.json" in str(caught.value) and "safetensors weights" in str(caught.value)
    assert not (tmp_path / "out").exists()
    words[words.index("--data") + 1] = str(tmp_path)
    with pytest.raises(DetourError, match=r"4 faults[\s\S]*small_classification: no such folder"):
        command.run(_options(words))


def test_a_result_of_other_weights_or_data_is_refused(workshop, unbroken, tmp_path):
    words = arguments(workshop, unbroken)
    words[1] = f"first={workshop / 'second'}"
    with pytest.raises(DetourError, match="first, small_classification, seed 42 differs in its model"):
        command.run(_options(words))
    data = tmp_path / "tasks"
    for path in (workshop / "tasks").glob("*/*"):
        (data / path.parent.name).mkdir(parents=True, exist_ok=True)
        (data / path.parent.name / path.name).write_bytes(path.read_bytes())
    train = data / "small_classification" / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:-1]))
    words = arguments(workshop, unbroken)
    words[words.index("--data") + 1] = str(data)
    with pytest.raises(DetourError, match="differs in its data"):
        command.run(_options(words))


def test_a_name_stands_for_one_model_and_options_add_up(workshop, unbroken, tmp_path):
    """Also on tasks and seeds that have no result yet."""
    words = arguments(workshop, unbroken, tasks=("multi_label",))
    words[1] = f"first={workshop / 'second'}"
    with pytest.raises(DetourError, match="small_classification, seed 42 differs in its model"):
        command.run(_options(words))
    kinds = (("modernbert-decoder", None, "a decoder"), ("x", "checkpoints", "a run directory"))
    for model_type, extra, told in kinds:
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        for name in ("model.safetensors", "tokenizer.json"):
            (folder / name).write_bytes((workshop / "first" / name).read_bytes())
        if extra:
            (folder / extra).mkdir()
        with pytest.raises(DetourError, match=told):
            check_model(folder)
    options = _options([*words, "--model", "a=x", "--tasks", "hoc", "--set", "epochs=3"])
    assert len(options.model) == 3 and options.tasks[-1] == "hoc" and options.set == [*FAST, "epochs=3"]
    with pytest.raises(DetourError, match="no such folder"):
        command.report(workshop / "nowhere", None)


def test_a_fault_of_one_job_stops_no_other(workshop, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (workshop / "first").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes(b"safetensors weights")
    words = arguments(workshop, tmp_path / "out", tasks=("classification",), seeds=1)
    words[1:3] = [str(broken), str(workshop / "second")]
    with pytest.raises(DetourError, match=r"broken, small_classification, seed 42: .*cannot load the model"):
        command.run(_options(words))
    assert list(read_results(tmp_path / "out")) == [Cell("second", "small_classification", 42)]


def test_the_help_names_every_command_and_run_may_be_left_out(tmp_path):
    def told(*words: str) -> tuple[int, str]:
        command = [sys.executable, str(ROOT / "tools" / "evaluate.py"), *words]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
        return done.returncode, done.stdout + done.stderr

    status, text = told("--help")
    assert status == 0 and all(f"\n    {name}" in text for name in ("run", "report", "tasks", "intrinsic"))
    status, text = told()
    assert status == 1 and "--model, --tasks, --data, --output" in text
    status, text = told(
        "--model", "/nowhere", "--tasks", "hoc", "--data", "/nowhere", "--output", str(tmp_path / "out")
    )
    assert status == 1 and "--model /nowhere: no such folder" in text and "Traceback" not in text


def result_of(seed: int, **changes) -> dict:
    return {"model": "m", "task": "t", "seed": seed, "shuffled": False, "score": 0.5} | changes


SCALARS = ("model", "task", "seed", "shuffled", "score", "seconds", "metric", "protocol", "title", "path", "device")
MAPPINGS = ("scores", "examples", "versions", "identity")
WRONG_RESULTS = [
    *("[]", "null", "3", "{", "[" * 100_000, '{"model": "m", "model": "n"}'),
    *(json.dumps(result_of(1) | {key: []}) for key in SCALARS),
    *(json.dumps(result_of(1) | {key: {"a": []}}) for key in MAPPINGS),
    *(json.dumps(result_of(1, model=name)) for name in ("", "..", "a/b", "\x1b[31m", "a\u202eb", "a\nb")),
]


def test_results_survive_a_torn_line_and_take_the_latest(tmp_path):
    for seed in (1, 2):
        add_result(tmp_path, result_of(seed), {"gold": []})
    path = tmp_path / "results.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert list(read_results(tmp_path)) == [Cell("m", "t", 1)]
    add_result(tmp_path, result_of(2, score=0.7), {"gold": []})
    add_result(tmp_path, result_of(1, score=0.9), {"gold": []})
    assert [r["score"] for r in read_results(tmp_path).values()] == [0.9, 0.7]
    assert len(path.read_text().splitlines()) == 3
    whole = path.read_bytes()
    path.write_bytes(whole + '{"model": "é'.encode()[:-1])
    assert len(read_results(tmp_path)) == 2
    for wrong in WRONG_RESULTS:
        path.write_text(wrong + "\n")
        with pytest.raises(DetourError, match=r"results.jsonl, line 1: .*remove the line") as caught:
            read_results(tmp_path)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    path.write_text('{"model": "m"}\n')
    with pytest.raises(DetourError, match=r"results.jsonl, line 1: not a result of"):
        read_results(tmp_path)


def test_protocols_hold_the_paper_s_figures():
    assert packaged_protocols() == ["paper-en", "paper-fr", "quick"]
    english, french = load_protocol("paper-en"), load_protocol("paper-fr")
    assert (english.seeds, french.seeds) == (tuple(range(42, 47)), tuple(range(42, 51)))
    assert {english.by_type[kind].learning_rate for kind in TASK_TYPES} == {5e-5}
    assert {english.by_type[kind].batch for kind in TASK_TYPES} == {16}
    assert english.by_type["token-classification"].epochs == 20 and english.by_type["classification"].epochs == 10
    assert english.by_type["classification"].select_by == "weighted_f1"
    entities, classes = french.by_type["token-classification"], french.by_type["multi-label"]
    assert (entities.ner_head, entities.steps, entities.batch) == ("span", 4000, 16)
    assert (entities.validate_every, entities.clip, entities.warmup) == (500, 10, 0.1)
    assert (entities.learning_rate, entities.head_learning_rate) == (5e-5, 1e-3)
    assert (classes.learning_rate, classes.batch, classes.epochs, classes.warmup) == (2e-5, 4, 15, 0.1)
    assert (classes.head, classes.max_length, classes.weight_decay) == ("linear", 4096, 0.01)


# The longest inputs by the paper's table, and the kinds of tasks.
LONGEST = {
    **dict.fromkeys(("meddialog", "fracco_30", "fracco_100", "cantemist", "distemist"), ("multi-label", 4096)),
    "diamed": ("classification", 2048),
    **dict.fromkeys(("quaero_emea", "quaero_medline"), ("token-classification", 1024)),
    **dict.fromkeys(
        ("cos", "social_history", "anatem", "bc5cdr", "jnlpba", "ncbi_disease"), ("token-classification", 512)
    ),
    **dict.fromkeys(("chemprot", "gad"), ("classification", 512)),
    "hoc": ("multi-label", 512),
    "deid": ("token-classification", 8192),
    "phenotype": ("multi-label", 8192),
}


@pytest.mark.parametrize("name", LONGEST)
def test_every_task_of_the_paper_is_cut_where_the_paper_cuts_it(name):
    task = load_task(name)
    settings = load_protocol(f"paper-{task.paper}").settings(task)
    assert (task.type, settings.max_length) == LONGEST[name]
    metric = "entity_f1" if task.type == "token-classification" else {"en": "weighted_f1", "fr": "macro_f1"}[task.paper]
    assert settings.select_by == metric == task.metric


def test_the_list_is_the_paper_s():
    assert set(LONGEST) == {name for name in packaged_tasks() if load_task(name).paper}


def test_a_protocol_can_differ_by_task(tmp_path):
    path = tmp_path / "mine.yaml"
    plain = "about: mine\nseeds: [1]\ndefaults: {learning_rate: 1.0e-4, batch: 4, max_length: 64}\n"
    path.write_text(f"{plain}tasks:\n  hoc: {{batch: 2, select_by: micro_f1}}\n  hocc: {{batch: 3}}\n")
    protocol, hoc, gad = load_protocol(str(path), ["epochs=9"]), load_task("hoc"), load_task("gad")
    assert [(protocol.settings(t).batch, protocol.settings(t).epochs) for t in (hoc, gad)] == [(2, 9), (4, 9)]
    assert load_protocol(str(path), ["batch=5"]).settings(hoc).batch == 5
    assert protocol.unused_sections((gad,)) == ["hocc"]
    with pytest.raises(DetourError, match=r"select_by: unknown metric 'micro_f1' for bc5cdr.*choose from entity_f1"):
        load_protocol(str(path), ["select_by=micro_f1"]).settings(load_task("bc5cdr"))
    path.write_text(f"{plain}tasks:\n  hoc: {{bach: 2}}\n")
    with pytest.raises(DetourError, match=r"tasks\.hoc\.bach: unknown setting \(did you mean 'batch'\?\)"):
        load_protocol(str(path))


WRONG = (
    "null",
    "[]",
    "{}",
    "true",
    "-1",
    "0",
    "x",
    ".nan",
    ".inf",
    "1e99",
    "[[1]]",
    "9" * 400,
    "!!python/object:os.x {}",
)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("section", ["", "defaults", "types", "tasks"])
def test_a_protocol_of_other_types_is_one_sentence_or_holds(wrong, section, tmp_path):
    """Every key with a value of another type: a sentence with the file, or settings that can be used."""
    keys = ("about", "seeds", "defaults", "types", "tasks") if not section else (*KNOWN, "classification")
    hoc = load_task("hoc")
    for key in keys:
        parts = {"about": "mine", "seeds": "[1]", "defaults": "{learning_rate: 1.0e-4, batch: 4, max_length: 64}"}
        if not section:
            parts[key] = wrong
        elif section == "defaults":
            parts["defaults"] = parts["defaults"][:-1].replace(f" {key}: ", " x: ") + f", {key}: {wrong}}}"
        else:
            parts[section] = f"{{{'multi-label' if section == 'types' else 'hoc'}: {{{key}: {wrong}}}}}"
        path = tmp_path / "p.yaml"
        path.write_text("".join(f"{name}: {value}\n" for name, value in parts.items()))
        try:
            protocol = load_protocol(str(path))
            assert min(protocol.seeds) >= 0 and math.isfinite(protocol.settings(hoc).learning_rate)
        except DetourError as fault:
            assert str(path) in str(fault) or "protocol p" in str(fault)
            assert "\n" not in str(fault).replace("\n  - ", "")  # a sentence, or a list of them


@pytest.mark.parametrize("seeds", ["[1, 1]", "[]", "[-1]", "[4294967296]", "[true]", "[1.5]"])
def test_seeds_that_cannot_be_are_refused(seeds, tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text(f"about: a\nseeds: {seeds}\ndefaults: {{learning_rate: 1.0e-4, batch: 4, max_length: 64}}\n")
    with pytest.raises(DetourError, match="seeds"):
        load_protocol(str(path))


def test_a_key_that_stands_twice_in_a_protocol_is_refused(tmp_path):
    path = tmp_path / "p.yaml"
    path.write_text("about: a\nseeds: [1]\nseeds: [2]\ndefaults: {learning_rate: 1.0e-4, batch: 4, max_length: 64}\n")
    with pytest.raises(DetourError, match="line 3: duplicate key 'seeds'"):
        load_protocol(str(path))


def test_seeds_go_on_after_the_protocol_s_own():
    quick = load_protocol("quick")
    assert [quick.first_seeds(n) for n in (None, 1, 5)] == [(42, 43, 44), (42,), (42, 43, 44, 45, 46)]


def test_a_protocol_of_one_s_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("about: mine\nseeds: [1]\ndefaults: {learning_rate: 1.0e-4, batch: 4, max_length: 64}\n")
    assert load_protocol(str(path)).name == "mine" and load_protocol(str(path)).by_type["similarity"].batch == 4
    with pytest.raises(DetourError, match="paper-de: neither a file nor one of paper-en, paper-fr, quick"):
        load_protocol("paper-de")
    for wrong, told in (
        ("about: mine\nseeds: [1]\ndefaults: {batch: 4, max_length: 64}\n", "learning_rate"),
        ("about: mine\nseeds: [1]\ndefaults: {}\ntypes: {ner: {}}\n", r"types\.ner: unknown task type"),
        ("about: mine\nseeds: [\n", "invalid YAML"),
    ):
        path.write_text(wrong)
        with pytest.raises(DetourError, match=told):
            load_protocol(str(path))


def test_groups_and_lists_of_tasks(workshop, capsys):
    assert len(command.chosen_tasks(["paper-en"], workshop)) == 11
    assert len(command.chosen_tasks(["paper-fr", "quaero_emea"], workshop)) == 8
    with pytest.raises(DetourError, match=r"--tasks all: .* has no folder with the name of a task"):
        command.chosen_tasks(["all"], workshop)
    command.list_tasks()
    assert "quaero_medline" in capsys.readouterr().out


def _job(name: str, seed: int, cost: float = 10.0):
    return SimpleNamespace(cell=Cell("m", name, seed), cost=cost)


def test_the_time_left_is_that_of_the_fine_tunings_not_of_the_clock(monkeypatch, capsys):
    """After a restart with most of it done, and with workers that load for long: 6 hours were told for 5 minutes."""
    jobs = [_job("small", n) for n in range(4)] + [_job("large", n, 100.0) for n in range(4)]
    took = {"small": 30.0, "large": 300.0}
    result = {"metric": "f1", "score": 0.5, "dev_score": 0.5, "device": "cpu"}
    done = {job.cell: result | {"seconds": took[job.cell.task]} for job in jobs[:-1]}
    with SuiteProgress(jobs, done, 1) as progress:
        assert progress.left() == "5m00s left"  # before anything is done in this session
        progress.show({jobs[-1].cell: 0.01})
        assert progress.left() == "4m57s left"
        progress.show({jobs[-1].cell: 0.5})
        assert progress.left() == "2m30s left"
        progress.finished(jobs[-1], result | {"seconds": 290.0})
        assert (
            progress.left() == ""
            and "8/8  m, large, seed 3: f1 0.500 (validation 0.500), 290 s\n" in capsys.readouterr().err
        )


def test_the_time_left_of_a_new_task_is_guessed_by_its_cost_and_shared_by_the_workers():
    jobs = [_job("small", 0), _job("large", 0, 100.0), _job("large", 1, 100.0)]
    result = {"metric": "f1", "score": 0.5, "dev_score": 0.5, "device": "cpu", "seconds": 60.0}
    with SuiteProgress(jobs, {}, 2) as progress:
        assert progress.left() == ""  # nothing is known
        progress.finished(jobs[0], result)
        assert progress.left() == "10m00s left"  # twice 10 minutes by two workers
        progress.finished(jobs[1], result | {"seconds": 120.0, "device": "gpu"})
        assert progress.left() == "2m00s left"  # what took long was another machine
