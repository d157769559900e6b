"""The tokens of windows beside a corpus: found by the next process, and of no consequence when they are not."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_detour.data import stream, window_cache
from megatron_detour.data.stream import DocumentStream
from megatron_detour.data.window_cache import WindowCache
from tests.data.test_stream import RANDOM, as_list

FACTS = (42, 0, 4)
FAR = (9_000, 9_500)


@pytest.fixture
def file(tmp_path, monkeypatch) -> WindowCache:
    """Of a corpus in so small windows that counting them is worth a file."""
    monkeypatch.setattr(stream, "WINDOW_DOCUMENTS", 4)
    monkeypatch.setattr(window_cache, "MIN_WINDOWS", 10)
    return WindowCache(str(tmp_path / "corpus"), "0" * 64)


def opened(file: WindowCache, monkeypatch) -> tuple[DocumentStream, list[int]]:
    """A reader and the list of the epochs that it counts."""
    of, counted = DocumentStream(RANDOM, 128, 42, file), []
    count = of.count
    monkeypatch.setattr(of, "count", lambda epoch: counted.append(epoch) or count(epoch))
    return of, counted


def test_the_next_process_reads_what_one_counted(file, monkeypatch, tmp_path):
    first, counted = opened(file, monkeypatch)
    expected = as_list(first.between(*FAR))
    assert counted == [0]
    assert [path.name for path in tmp_path.iterdir()] == [file.path((42, 0, first.window_size)).name]
    second, counted = opened(file, monkeypatch)
    assert as_list(second.between(*FAR)) == expected
    assert counted == []


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "folder", "gone"])
def test_a_damaged_one_does_not_matter(file, monkeypatch, damage):
    first, _ = opened(file, monkeypatch)
    expected = as_list(first.between(*FAR))
    path = file.path((42, 0, first.window_size))
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        bit = bytes([content[60] ^ 4])
        path.write_bytes({"cut": content[:-9], "bit": content[:60] + bit + content[61:], "empty": b""}[damage])
    second, counted = opened(file, monkeypatch)
    assert as_list(second.between(*FAR)) == expected
    assert counted == [0]
    if damage != "folder":
        assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_does_not_matter(file, monkeypatch):
    of, counted = opened(WindowCache("/proc/corpus", "0" * 64), monkeypatch)
    assert len(of.between(*FAR)) > 1
    assert counted == [0]


def test_few_windows_are_not_worth_a_file(file, tmp_path):
    file.write(FACTS, np.full(10, 3))
    assert list(tmp_path.iterdir()) == []
    file.write(FACTS, np.full(11, 3))
    assert file.read(FACTS, 11).tolist() == [3] * 11
    assert file.read(FACTS, 12) is None


def test_everything_that_counts_depend_on_is_in_the_name(file):
    names = {file.path(FACTS), WindowCache(file.prefix, "1" * 64).path(FACTS)}
    for place in range(len(FACTS)):
        names.add(file.path(tuple(fact + (i == place) for i, fact in enumerate(FACTS))))
    assert len(names) == 2 + len(FACTS)
