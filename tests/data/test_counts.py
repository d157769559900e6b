"""Pack counts beside a corpus: found by the next process, and of no consequence when they are not."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_detour.data import counts, pack
from megatron_detour.data.counts import CountsFile
from megatron_detour.data.pack import PackedCorpus
from tests.data.test_pack import RANDOM, as_lists

FACTS = (128, 42, 0, 4)


@pytest.fixture
def file(tmp_path, monkeypatch) -> CountsFile:
    """Of a corpus in so small windows that counting them is worth a file."""
    monkeypatch.setattr(pack, "WINDOW", 4)
    monkeypatch.setattr(counts, "WORTH", 10)
    return CountsFile(str(tmp_path / "corpus"), "0" * 64)


def opened(file: CountsFile, monkeypatch) -> tuple[PackedCorpus, list[int]]:
    """A reader and the list of the epochs that it counts."""
    packed, counted = PackedCorpus(RANDOM, 128, 42, file), []
    count = packed.count_epoch
    monkeypatch.setattr(packed, "count_epoch", lambda epoch: counted.append(epoch) or count(epoch))
    return packed, counted


def test_the_next_process_reads_what_one_counted(file, monkeypatch, tmp_path):
    first, counted = opened(file, monkeypatch)
    expected = as_lists(first.packs(np.array([130])))
    assert counted == [0]
    assert [path.name for path in tmp_path.iterdir()] == [file.path((128, 42, 0, first.window_size)).name]
    second, counted = opened(file, monkeypatch)
    assert as_lists(second.packs(np.array([130]))) == expected
    assert counted == []


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "folder", "gone"])
def test_a_damaged_one_does_not_matter(file, monkeypatch, damage):
    first, _ = opened(file, monkeypatch)
    expected = as_lists(first.packs(np.array([130])))
    path = file.path((128, 42, 0, first.window_size))
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        bit = bytes([content[60] ^ 4])
        path.write_bytes({"cut": content[:-9], "bit": content[:60] + bit + content[61:], "empty": b""}[damage])
    second, counted = opened(file, monkeypatch)
    assert as_lists(second.packs(np.array([130]))) == expected
    assert counted == [0]
    if damage != "folder":
        assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written_does_not_matter(file, monkeypatch):
    packed, counted = opened(CountsFile("/proc/corpus", "0" * 64), monkeypatch)
    assert len(packed.packs(np.array([130]))) == 1
    assert counted == [0]


def test_few_windows_are_not_worth_a_file(file, tmp_path):
    file.write(FACTS, [3] * 10)
    assert list(tmp_path.iterdir()) == []
    file.write(FACTS, [3] * 11)
    assert file.read(FACTS, 11) == [3] * 11
    assert file.read(FACTS, 12) is None


def test_everything_that_counts_depend_on_is_in_the_name(file):
    names = {file.path(FACTS), CountsFile(file.prefix, "1" * 64).path(FACTS)}
    for place in range(len(FACTS)):
        names.add(file.path(tuple(fact + (i == place) for i, fact in enumerate(FACTS))))
    assert len(names) == 2 + len(FACTS)
