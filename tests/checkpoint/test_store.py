"""Folders that are there whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def test_latest_passes_over_a_damaged_checkpoint_with_a_warning(tmp_path):
    for step in (1, 2, 10):
        store.publish(store.checkpoint_folder(tmp_path, step), write_numbers(step))
    (store.checkpoint_folder(tmp_path, 10) / "0.txt").write_text("")
    warnings: list[str] = []
    assert store.latest(tmp_path, warnings.append) == store.checkpoint_folder(tmp_path, 2)
    assert len(warnings) == 1 and "step-00000010" in warnings[0]
    assert store.latest(tmp_path / "empty", warnings.append) is None


def test_prune_keeps_the_newest_and_the_boundaries(tmp_path):
    for step in (0, 1, 2, 3, 4, 5):
        store.publish(store.checkpoint_folder(tmp_path, step), write_numbers(step))
    (tmp_path / ".step-00000004.writing-77").mkdir()
    store.publish(store.checkpoint_folder(tmp_path, 9), write_numbers(9))
    store.prune(tmp_path, 5, 2, {0, 3}.__contains__)
    assert [store.step_of(folder) for folder in store.find_checkpoints(tmp_path)] == [0, 3, 4, 5, 9]
    assert not list(tmp_path.glob(".*"))


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
def test_a_listing_that_is_none_is_a_broken_folder(tmp_path, listing):
    store.publish(tmp_path / "step-00000001", write_numbers(1))
    store.publish(tmp_path / "step-00000002", write_numbers(2))
    (tmp_path / "step-00000002" / store.LISTING).write_text(listing, encoding="latin-1")
    warnings: list[str] = []
    assert store.latest(tmp_path, warnings.append) == tmp_path / "step-00000001"
    assert len(warnings) == 1


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
