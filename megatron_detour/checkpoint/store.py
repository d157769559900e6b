"""Folders that are there whole or not at all: written aside, flushed, listed in a manifest, renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_detour.files import file_facts, flush

LISTING = "files.json"


class Broken(Exception):
    """A folder that does not hold what its listing says; the message says what is wrong."""


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder beside `folder`, then gives it its name, replacing a folder that has it already.

    On any error nothing is left behind.
    """
    aside = folder.parent / f".{folder.name}.writing-{os.getpid()}"
    replaced = folder.parent / f".{folder.name}.replaced-{os.getpid()}"
    for leftover in (aside, replaced):  # of a killed writer that had the same process number
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(aside)
        facts = {path.name: file_facts(path) for path in sorted(aside.iterdir())}
        (aside / LISTING).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for path in [*aside.iterdir(), aside]:
            flush(path)
        if folder.exists():
            folder.rename(replaced)
        aside.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def verify(folder: Path) -> None:
    """Checks a published folder against its listing, sizes first. Raises Broken."""
    try:
        listing = json.loads((folder / LISTING).read_text(encoding="utf-8"))
        sizes = {name: facts["bytes"] for name, facts in listing.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        raise Broken(f"{folder / LISTING} is missing or unreadable") from None
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise Broken(f"{path} is missing or has the wrong size")
    for path in sorted(folder.iterdir()):
        if path.name != LISTING and file_facts(path) != listing.get(path.name):
            raise Broken(f"{path} has changed since it was written")


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def find_checkpoints(checkpoints: Path) -> list[Path]:
    """Published checkpoints, oldest first. What a killed run left half-written has another name."""
    return sorted(path for path in checkpoints.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def latest(checkpoints: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; a broken one is passed over with a warning."""
    for folder in reversed(find_checkpoints(checkpoints)):
        try:
            verify(folder)
            return folder
        except Broken as fault:
            warn(f"{folder} is passed over: {fault}")
    return None


def prune(checkpoints: Path, newest: int, keep: int, is_kept: Callable[[int], bool]) -> None:
    """Removes what killed runs left behind, and checkpoints older than the `keep` up to step `newest`.

    Those whose step `is_kept` stay.
    """
    known = [folder for folder in find_checkpoints(checkpoints) if step_of(folder) <= newest]  # a later one is broken
    for folder in known[:-keep]:
        if not is_kept(step_of(folder)):
            _remove(folder)
    remove_leftovers(checkpoints)


def remove_leftovers(checkpoints: Path) -> None:
    """Removes what killed runs have left half-written or half-removed, where it can be removed."""
    for leftover in checkpoints.glob(".step-*-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Under its own name a folder is whole, even while it goes."""
    going = folder.parent / f".{folder.name}.replaced-{os.getpid()}"
    folder.rename(going)
    shutil.rmtree(going)
