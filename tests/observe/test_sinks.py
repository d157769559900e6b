from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_detour.errors import DetourError
from megatron_detour.observe.sinks import MetricsFile, TensorBoardSink, read_metrics, tensorboard_tag


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
    # An event file's name ends in its order within the second, so the second session sorts after the first.
    second = TensorBoardSink(tmp_path, 1)
    second.write(record(2, loss=9.0))
    second.close()

    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/tokens"}
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.0), (2, 9.0)]
    assert [event.step for event in events.Scalars("train/tokens")] == [1]
