from __future__ import annotations

import errno
import json
import resource
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_detour import files
from megatron_detour.errors import DetourError
from megatron_detour.observe.sinks import MetricsFile, TensorBoardSink, WandbSink, read_metrics, tensorboard_tag


def record(step: int, **fields: object) -> dict[str, object]:
    return {"step": step, "loss": 1.0 + step, **fields}


def steps(path: Path) -> list[int]:
    return [entry["step"] for entry in read_metrics(path)]


def test_each_record_is_one_flushed_line(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    sink = MetricsFile(path, 0)
    sink.write(record(1, phase="détour\nA"))
    sink.write(record(2))
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [record(1, phase="détour\nA"), record(2)]
    assert lines[-1] == ""
    sink.close()
    sink.close()


def test_resuming_removes_the_later_steps_and_keeps_the_bytes_of_the_earlier(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 0,  "val_mlm_loss": 2.50}\n{"step": 1, "loss": 1e0}\n{"step":2}\n'
    path.write_bytes(kept + b'{"step": 3}\n{"step": 4}\n')
    sink = MetricsFile(path, 2)
    assert path.read_bytes() == kept
    sink.write(record(3))
    sink.close()
    assert steps(path) == [0, 1, 2, 3]
    assert read_metrics(path)[-1] == record(3)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "lo', b'{"step": 3, "phase": "d\xc3', b"\x00\x00\x00", b'{"step": 3, "x": 1\n', b"{}\n"]
)
def test_a_torn_last_line_is_ignored_and_removed(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole + tail)
    assert steps(path) == [1, 2]
    sink = MetricsFile(path, 5)
    sink.write(record(3))
    sink.close()
    assert path.read_bytes().startswith(whole)
    assert steps(path) == [1, 2, 3]


def test_a_whole_last_line_without_a_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    sink = MetricsFile(path, 2)
    sink.write(record(3))
    sink.close()
    assert steps(path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("there", "kept", "missing"),
    [
        ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5], ""),
        ([1, 2, 3, 3, 4, 4, 5], [1, 2, 3, 4, 5], ""),
        ([1, 2, 3, 4, 5, 1, 2], [1, 2, 3, 4, 5], ""),
        ([0, 1, 3, 4, 5], [0, 1, 3, 4, 5], "2"),
        ([0, 3], [0, 3], "1-2, 4-5"),
        ([], [], "1-5"),
        (None, [], "1-5"),
    ],
)
def test_what_a_resumed_run_lacks_is_told_and_what_is_double_goes(tmp_path: Path, there, kept, missing) -> None:
    path = tmp_path / "metrics.jsonl"
    if there is not None:
        path.write_text("".join(json.dumps(record(step, place=place)) + "\n" for place, step in enumerate(there)))
    sink = MetricsFile(path, 5)
    assert sink.missing == missing
    sink.write(record(6))
    sink.close()
    assert steps(path) == [*kept, 6]
    last = {step: place for place, step in enumerate(there or [])}
    assert [entry["place"] for entry in read_metrics(path)[:-1]] == [last[step] for step in kept]


def test_a_run_that_begins_lacks_nothing(tmp_path: Path) -> None:
    assert MetricsFile(tmp_path / "metrics.jsonl", -1).missing == ""


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EAGAIN])
def test_a_line_whose_write_failed_halfway_is_written_once(tmp_path: Path, monkeypatch, number: int) -> None:
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))
    sink = MetricsFile(tmp_path / "metrics.jsonl", 0)
    honest = sink._file

    class Hiccups:
        """Writes three bytes, then fails, then writes."""

        calls = 0

        def write(self, data: bytes) -> int:
            self.calls += 1
            if self.calls % 3 == 2:
                raise OSError(number, "away")
            return honest.write(data[:3])

    sink._file = Hiccups()
    sink.write(record(1))
    sink.write(record(2))
    honest.close()
    assert read_metrics(sink.path) == [record(1), record(2)]


def test_an_unreadable_line_in_the_middle_is_a_fault_and_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    content = b'{"step": 1}\n{"ste\n{"step": 3}\n'
    path.write_bytes(content)
    with pytest.raises(DetourError, match="line 2"):
        MetricsFile(path, 3)
    assert path.read_bytes() == content


def test_a_missing_file_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DetourError, match="missing"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_figure_that_is_not_finite_is_refused_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = MetricsFile(path, 0)
    sink.write(record(1))
    with pytest.raises(ValueError, match="step 2: loss"):
        sink.write(record(2, loss=value))
    with pytest.raises(ValueError, match="JSON"):
        sink.write(record(2, nested=[value]))
    sink.close()
    assert steps(path) == [1]


def test_a_record_without_a_step_is_refused(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl", 0)
    with pytest.raises(ValueError, match="step"):
        sink.write({"loss": 1.0})
    sink.close()


@pytest.mark.parametrize(
    ("field", "tag"),
    [
        ("loss", "train/loss"),
        ("lr", "train/lr"),
        ("grad_norm", "train/grad_norm"),
        ("tokens_per_second", "speed/tokens_per_second"),
        ("val_mlm_loss", "val/mlm_loss"),
        ("padding_share", "data/padding_share"),
        ("mfu", "speed/mfu"),
        ("model_tflops", "speed/model_tflops"),
        ("val_mlm_loss/notes", "val/mlm_loss/notes"),
    ],
)
def test_tags_are_grouped(field: str, tag: str) -> None:
    assert tensorboard_tag(field) == tag


def test_tensorboard_holds_each_numeric_field_and_hides_what_a_resumption_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = TensorBoardSink(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(record(step, phase="detour", val_mlm_loss=None, resumed=False, tokens=512 * step))
    first.close()
    second = TensorBoardSink(tmp_path, 1)
    second.write(record(2, loss=9.0))
    second.close()

    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/tokens", "train/skipped", "train/spike"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 9.0)]
    assert [event.step for event in events.Scalars("train/tokens")] == [1]
    assert not [path for path in tmp_path.iterdir() if socket.gethostname() in path.name]


def test_text_is_left_out_of_tensorboard_and_guards_are_counted_across_sessions(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, folder = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    guards: dict[int, dict[str, str]] = {2: {"skipped": "the loss is nan"}, 4: {"skipped": "again"}, 5: {"spike": "s"}}
    for resume_step, last in ((0, 4), (3, 5)):
        metrics = MetricsFile(path, resume_step)
        board = TensorBoardSink(folder, resume_step, metrics.counts)
        for step in range(resume_step + 1, last + 1):
            for sink in (metrics, board):
                sink.write(record(step, **guards.get(step, {})))
        metrics.close()
        board.close()
    events = EventAccumulator(str(folder)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/skipped")] == [
        (1, 0),
        (2, 1),
        (3, 1),
        (4, 2),
        (5, 2),
    ]
    assert events.Scalars("train/spike")[-1].value == 1


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files grow to `size` bytes and no further, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_is_told_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = MetricsFile(path, 0)
    sink.write(record(1))
    with largest_file(path.stat().st_size + 10):
        with pytest.raises(OSError, match=r"metrics\.jsonl") as fault:
            sink.write(record(2))
        sink.close()
    assert (fault.value.errno, fault.value.filename) == (errno.EFBIG, str(path))
    assert steps(path) == [1]
    assert sink.close() is None
    with largest_file(5), pytest.raises(OSError, match=r"metrics\.jsonl"):
        MetricsFile(path, 1)


def test_a_disk_that_takes_no_more_is_told_by_tensorboard_too(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path / "tensorboard", 0)
    with largest_file(200):
        with pytest.raises(OSError, match="tensorboard"):
            for step in range(1, 2000):
                sink.write(record(step))
        with pytest.raises(OSError, match="tensorboard"):
            sink.close()


class Wandb(SimpleNamespace):
    """What the sink uses of wandb, by its documentation: https://docs.wandb.ai/ref/python."""

    class Error(Exception):
        pass

    @staticmethod
    def Settings(**settings: Any) -> dict[str, Any]:
        return settings

    def __init__(self) -> None:
        super().__init__(runs=[], fault=None)

    def init(self, **arguments: Any) -> WandbRun:
        if self.fault:
            raise self.fault
        self.runs.append(WandbRun(arguments))
        return self.runs[-1]


class WandbRun:
    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self.settings: dict[str, Any] = {}
        self.config = self
        self.metrics: dict[str, dict[str, Any]] = {}
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def update(self, values: dict[str, Any], allow_val_change: bool = False) -> None:
        if not allow_val_change and self.settings.keys() & values.keys():
            raise Wandb.Error("a value of the config changes")
        self.settings |= values

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics[name] = options

    def log(self, figures: dict[str, Any]) -> None:
        self.logged.append(figures)

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Wandb:
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_figures_over_the_steps_of_the_run(wandb: Wandb, tmp_path: Path) -> None:
    sink = WandbSink({"project": "notes", "mode": "offline", "tags": ["a"]}, tmp_path / "run", "detour", -1)
    sink.write({"step": 0, "val_mlm_loss/notes": 2.5})
    sink.write({"step": 1, "phase": "detour", "loss": None, "lr": 1e-4, "mfu": 0.4, "skipped": "the loss is nan"})
    sink.close()
    (run,) = wandb.runs
    given = {key: run.arguments[key] for key in ("project", "mode", "tags", "name", "resume", "dir")}
    assert given == {
        "project": "notes",
        "mode": "offline",
        "tags": ["a"],
        "name": "detour",
        "resume": "allow",
        "dir": str(tmp_path / "run"),
    }
    assert run.arguments["settings"]["console"] == "off" and run.arguments["settings"]["disable_code"]
    assert run.metrics["*"] == {"step_metric": "step"}
    assert run.logged == [
        {"step": 0, "val/mlm_loss/notes": 2.5},
        {"step": 1, "train/lr": 1e-4, "speed/mfu": 0.4, "train/skipped": 1, "train/spike": 0},
    ]
    assert run.finished


def test_a_resumed_run_goes_on_in_the_same_wandb_run(wandb: Wandb, tmp_path: Path) -> None:
    WandbSink({}, tmp_path / "a", "detour", -1).close()
    WandbSink({"name": "another", "id": "mine"}, tmp_path / "a", "detour", 40, {"skipped": 3}).write(record(41))
    WandbSink({}, tmp_path / "b", "detour", -1).close()
    first, second, other = wandb.runs
    assert first.arguments["id"] == second.arguments["id"] != other.arguments["id"]
    assert second.arguments["name"] == "another"
    assert [run.settings["resumed_after_step"] for run in (first, second)] == [0, 40]
    assert second.logged[0]["train/skipped"] == 3


def test_faults_of_wandb_are_sentences(wandb: Wandb, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.fault = Wandb.Error("no API key")
    with pytest.raises(DetourError, match="no API key; correct its settings, or set mode: offline"):
        WandbSink({}, tmp_path, "detour", 0)
    wandb.fault = TypeError("init() got an unexpected keyword argument 'projet'")
    with pytest.raises(DetourError, match="projet"):
        WandbSink({"projet": "x"}, tmp_path, "detour", 0)
    wandb.fault = ValueError("1 validation error\nmode\n  Input should be 'online'")
    with pytest.raises(DetourError, match="1 validation error mode Input should be 'online'; correct"):
        WandbSink({"mode": "x"}, tmp_path, "detour", 0)
    for content in (
        "",
        "[]",
        "{}",
        "null",
        "3",
        '{"id": null}',
        '{"id": ["a"]}',
        '{"id": 3}',
        '{"id": ""}',
        "[" * 10**5,
    ):
        (tmp_path / "wandb.json").write_text(content)
        with pytest.raises(DetourError, match=r"wandb\.json: .*; restore it, or remove it"):
            WandbSink({}, tmp_path, "detour", 0)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(DetourError, match="pip install wandb"):
        WandbSink({}, tmp_path, "detour", 0)
