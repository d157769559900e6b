"""Folders that are there whole or not at all: written aside, flushed, listed in a manifest, renamed."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError
from megatron_detour.files import aside_of, discard, file_facts, flush, remove_abandoned, retry
from megatron_detour.structured import parse_json

logger = logging.getLogger(__name__)

LISTING, RUN_STATE, TOKENIZER = "files.json", "run_state.json", "tokenizer.json"
NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
LEFTOVER = re.compile(r"\.step-\d+\.(writing|replaced)-.+")


class Broken(Exception):
    """A folder that does not hold what its listing says; the message says what is wrong."""


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder beside `folder`, then gives it its name, replacing whatever has it already.

    On any error nothing is left behind; where the disk was away for a moment it is all done again.
    """
    remove_abandoned(folder)
    retry(lambda: _publish(folder, write))


def _publish(folder: Path, write: Callable[[Path], None]) -> None:
    aside, replaced = aside_of(folder, "writing"), aside_of(folder, "replaced")
    for leftover in (aside, replaced):  # of a killed writer that had the same process number
        discard(leftover)
    aside.mkdir(parents=True)
    try:
        write(aside)
        facts = {path.name: file_facts(path) for path in sorted(aside.iterdir())}
        (aside / LISTING).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for path in [*aside.iterdir(), aside]:
            flush(path)
        if os.path.lexists(folder):
            folder.rename(replaced)
        try:
            aside.rename(folder)
        except OSError:
            if os.path.lexists(replaced):
                replaced.rename(folder)  # what was there stays there
            raise
        flush(folder.parent)
    finally:
        for leftover in (aside, replaced):
            discard(leftover)


def verify(folder: Path, needless: Container[str] = ()) -> None:
    """Checks a published folder against its listing, sizes first. Raises Broken.

    What the listing does not name is not ours and tells nothing; nor do files that are `needless` to the caller.
    """
    listed = {name: facts for name, facts in _listing(folder).items() if name not in needless}
    for name, facts in listed.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise Broken(f"{path} is missing or has the wrong size")
    for name, facts in listed.items():
        if file_facts(folder / name) != facts:
            raise Broken(f"{folder / name} has changed since it was written")


def _listing(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / LISTING
    try:
        listing = parse_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        if error.errno not in NOT_THERE:  # a disk that cannot be read is no reason to go on from an older one
            raise
        raise Broken(f"{path} is missing") from None
    except (DetourError, UnicodeDecodeError):
        raise Broken(f"{path} is unreadable") from None
    if not isinstance(listing, dict) or not listing:
        raise Broken(f"{path} lists no files")
    for name, facts in listing.items():
        if name != Path(name).name or not isinstance(facts, dict) or facts.keys() != {"bytes", "sha256"}:
            raise Broken(f"{path} does not list files with their bytes and sha256")
    return listing


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def find_checkpoints(checkpoints: Path) -> list[Path]:
    """Published checkpoints, oldest first. What a killed run left half-written has another name."""
    return sorted(path for path in checkpoints.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def latest(checkpoints: Path, needless: Container[str] = ()) -> Path | None:
    """The newest checkpoint that is whole; a broken one is passed over with a warning."""
    for folder in reversed(find_checkpoints(checkpoints)):
        try:
            retry(lambda folder=folder: verify(folder, needless))
            return folder
        except Broken as fault:
            logger.warning("%s is passed over: %s", folder, fault)
    return None


def prune(checkpoints: Path, newest: int, keep: int, is_kept: Callable[[int], bool]) -> None:
    """Removes what killed runs left behind, and checkpoints older than the `keep` up to step `newest`.

    Those whose step `is_kept` stay, and those that hold what no run has put there, or are links to another place.
    """
    known = [folder for folder in find_checkpoints(checkpoints) if step_of(folder) <= newest]  # a later one is broken
    for folder in known[:-keep]:
        if is_kept(step_of(folder)):
            continue
        foreign = _foreign(folder)
        if foreign:
            logger.info("%s stays: %s", folder, foreign)
        else:
            _remove(folder)
    remove_leftovers(checkpoints)


def _foreign(folder: Path) -> str | None:
    """What speaks against removing a checkpoint: it may be somebody's. Hidden files are of tools, not of people."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is not a folder of this run"
    try:
        ours = {LISTING, *_listing(folder)}
    except Broken:
        return None
    others = sorted(path.name for path in folder.iterdir() if path.name not in ours and path.name[0] != ".")
    return f"it holds {others[0]}, which the run has not written" if others else None


def remove_leftovers(checkpoints: Path) -> None:
    """Removes what killed runs have left half-written or half-removed, where it can be removed."""
    for leftover in checkpoints.glob(".step-*-*"):
        if LEFTOVER.fullmatch(leftover.name):
            discard(leftover)


def _remove(folder: Path) -> None:
    """Under its own name a folder is whole, even while it goes."""
    going = aside_of(folder, "replaced")
    folder.rename(going)
    discard(going, silent=False)
