"""Folders that are there whole or not at all."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_detour import files
from megatron_detour.checkpoint import store
from tests.harness import ROOT


def write_numbers(number: int):
    return lambda folder: [(folder / f"{i}.txt").write_text(f"{number} {i}") for i in range(3)]


def test_a_published_folder_is_whole_and_replaces_the_one_before(tmp_path):
    target = tmp_path / "deep" / "step-00000001"
    for number in (1, 2):
        store.publish(target, write_numbers(number))
        store.verify(target)
        assert (target / "2.txt").read_text() == f"{number} 2"
        assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_failing_writer_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half.txt").write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        store.publish(tmp_path / "a", fail)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["changed", "shorter", "missing", "listing"])
def test_verify_finds_damage(tmp_path, damage):
    folder = tmp_path / "a"
    store.publish(folder, write_numbers(1))
    if damage == "changed":
        (folder / "1.txt").write_text("1 9")
    elif damage == "shorter":
        (folder / "1.txt").write_text("1")
    elif damage == "missing":
        (folder / "1.txt").unlink()
    else:
        (folder / store.LISTING).write_text("{")
    with pytest.raises(store.Broken):
        store.verify(folder)


def test_latest_passes_over_a_damaged_checkpoint_with_a_warning(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    for step in (1, 2, 10):
        store.publish(store.checkpoint_folder(tmp_path, step), write_numbers(step))
    (store.checkpoint_folder(tmp_path, 10) / "0.txt").write_text("")
    assert store.latest(tmp_path) == store.checkpoint_folder(tmp_path, 2)
    assert len(caplog.messages) == 1 and "step-00000010" in caplog.messages[0]
    assert store.latest(tmp_path / "empty") is None


def test_prune_keeps_the_newest_and_the_boundaries(tmp_path):
    for step in (0, 1, 2, 3, 4, 5):
        store.publish(store.checkpoint_folder(tmp_path, step), write_numbers(step))
    (tmp_path / ".step-00000004.writing-some-host.org-77").mkdir()
    store.publish(store.checkpoint_folder(tmp_path, 9), write_numbers(9))
    (tmp_path / ".step-00000004.copy-of-mine").mkdir()
    store.prune(tmp_path, 5, 2, {0, 3}.__contains__)
    assert [store.step_of(folder) for folder in store.find_checkpoints(tmp_path)] == [0, 3, 4, 5, 9]
    assert [path.name for path in tmp_path.glob(".*")] == [".step-00000004.copy-of-mine"]


PUBLISHER = """
import sys
from pathlib import Path
from megatron_detour.checkpoint import store

def write(folder):
    for i in range(40):
        (folder / f"{i}.bin").write_bytes(bytes([number % 256]) * 200_000)

for number in range(10_000):
    store.publish(Path(sys.argv[1]) / "step-00000001", write)
    print(number, flush=True)
"""


def test_a_kill_leaves_the_old_folder_or_the_new_one(tmp_path):
    for attempt in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", PUBLISHER, str(tmp_path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        process.stdout.readline()
        time.sleep(0.013 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        # Between the two renames the old one has its other name; a run then goes on from the checkpoint before.
        found: list[Path] = store.find_checkpoints(tmp_path)
        for folder in found:
            store.verify(folder)
        assert found or list(tmp_path.glob(".step-*.replaced-*"))
        store.prune(tmp_path, 1, 1, lambda step: False)


@pytest.mark.parametrize("listing", ["{}", "[]", "null", "3", '{"0.bin": 3}', '{"0.bin": {"bxtes": 1}}', "\xff"])
def test_a_listing_that_is_none_is_a_broken_folder(tmp_path, listing, caplog):
    caplog.set_level(logging.INFO)
    store.publish(tmp_path / "step-00000001", write_numbers(1))
    store.publish(tmp_path / "step-00000002", write_numbers(2))
    (tmp_path / "step-00000002" / store.LISTING).write_text(listing, encoding="latin-1")
    assert store.latest(tmp_path) == tmp_path / "step-00000001"
    assert len(caplog.messages) == 1


def test_every_flipped_bit_of_a_listing_is_found(tmp_path):
    store.publish(tmp_path / "step-00000001", write_numbers(1))
    listing = tmp_path / "step-00000001" / store.LISTING
    content = listing.read_bytes()
    meaning = json.loads(content)
    for place in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            listing.write_bytes(flipped)
            try:
                store.verify(listing.parent)
            except store.Broken:
                continue
            assert json.loads(flipped) == meaning  # white space, or a letter of a number's other spelling


def put_file(folder: Path, name: str) -> Path:
    (folder / name).write_text("x")
    return folder / name


def put_folder(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    put_file(folder / name, "inside")
    return folder / name


STRAY = [
    (put_file, ".DS_Store"),
    (put_file, ".nfs000000000001"),
    (put_file, "README.md"),
    (put_folder, ".cache"),
    (put_folder, ".ipynb_checkpoints"),
    (put_folder, "notes"),
]


@pytest.mark.parametrize(("put", "name"), STRAY)
def test_what_the_listing_does_not_name_is_no_damage(tmp_path, put, name):
    store.publish(tmp_path / "step-00000001", write_numbers(1))
    put(tmp_path / "step-00000001", name)
    store.verify(tmp_path / "step-00000001")


@pytest.mark.parametrize(("put", "name"), STRAY)
def test_pruning_takes_no_file_of_somebody_with_it(tmp_path, put, name, caplog):
    caplog.set_level(logging.INFO)
    for step in (1, 2):
        store.publish(store.checkpoint_folder(tmp_path, step), write_numbers(step))
    there = put(store.checkpoint_folder(tmp_path, 1), name)
    store.prune(tmp_path, 2, 1, lambda step: False)
    assert there.exists() == bool(caplog.messages) == (not name.startswith("."))  # hidden ones are of tools


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_file(path: Path) -> None:
    path.write_text("x")


def a_folder_in_place_of_a_file(path: Path) -> None:
    store.publish(path, write_numbers(1))
    (path / "1.txt").unlink()
    (path / "1.txt").mkdir()


def a_folder_in_place_of_the_listing(path: Path) -> None:
    (path / store.LISTING).mkdir(parents=True)


@pytest.mark.parametrize(
    "make",
    [a_dangling_link, a_link_to_itself, a_file, a_folder_in_place_of_a_file, a_folder_in_place_of_the_listing],
)
def test_what_is_no_checkpoint_is_passed_over_and_replaced(tmp_path, make, caplog):
    caplog.set_level(logging.INFO)
    store.publish(tmp_path / "step-00000001", write_numbers(1))
    make(tmp_path / "step-00000002")
    assert store.latest(tmp_path) == tmp_path / "step-00000001"
    assert len(caplog.messages) == 1
    store.publish(tmp_path / "step-00000002", write_numbers(2))
    store.verify(tmp_path / "step-00000002")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_linked_checkpoint_is_one_and_what_it_points_to_stays(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "elsewhere").mkdir()
    store.publish(tmp_path / "elsewhere" / "moved", write_numbers(1))
    for step in (2, 3):
        store.publish(store.checkpoint_folder(tmp_path, step), write_numbers(step))
    store.checkpoint_folder(tmp_path, 1).symlink_to(tmp_path / "elsewhere" / "moved")
    store.verify(store.checkpoint_folder(tmp_path, 1))
    store.prune(tmp_path, 3, 1, lambda step: False)
    assert len(caplog.messages) == 1 and "step-00000001: not a folder of this run" in caplog.messages[0]
    store.publish(store.checkpoint_folder(tmp_path, 1), write_numbers(9))
    store.verify(tmp_path / "elsewhere" / "moved")


def test_what_a_killed_writer_left_aside_goes_and_a_living_one_s_stays(tmp_path):
    host = socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = tmp_path / f".model.writing-{host}-{os.getppid()}"
    far, old = tmp_path / ".model.writing-node-7.cluster-5", tmp_path / ".model.writing-77"
    mine = tmp_path / ".model.backup-2024"
    for left in (tmp_path / f".model.writing-{host}-{dead.pid}", living, far, old, mine):
        left.mkdir()
    os.utime(old, (1.0, 1.0))
    os.utime(mine, (1.0, 1.0))
    store.publish(tmp_path / "model", write_numbers(1))
    assert {path.name for path in tmp_path.iterdir()} == {living.name, far.name, mine.name, "model"}


@pytest.mark.parametrize("number", sorted(files.TRANSIENT))
def test_a_disk_that_is_away_for_a_moment_costs_a_moment(tmp_path, monkeypatch, number):
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0, 0.0))
    failures = iter([OSError(number, os.strerror(number))] * 3)

    def write(folder):
        write_numbers(1)(folder)
        for failure in failures:
            raise failure

    store.publish(tmp_path / "a", write)
    store.verify(tmp_path / "a")
    failures = iter([OSError(number, os.strerror(number))] * 4)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        store.publish(tmp_path / "b", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_cannot_be_read_is_not_a_damaged_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PAUSES", ())
    store.publish(tmp_path / "step-00000001", write_numbers(1))

    def fail(*arguments, **options):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(OSError, match="Stale"):
        store.latest(tmp_path)


def test_what_was_there_stays_where_the_new_one_cannot_get_its_name(tmp_path, monkeypatch):
    store.publish(tmp_path / "a", write_numbers(1))
    honest = Path.rename

    def rename(path, target):
        if "writing" in path.name:
            raise OSError(errno.EPERM, "not permitted")
        return honest(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="not permitted"):
        store.publish(tmp_path / "a", write_numbers(2))
    store.verify(tmp_path / "a")
    assert (tmp_path / "a" / "0.txt").read_text() == "1 0"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
