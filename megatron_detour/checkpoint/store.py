"""Publish folders atomically: write to a temporary name, flush, list the files in a manifest, rename."""

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
MISSING_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
LEFTOVER = re.compile(r"\.step-\d+\.(writing|replaced)-.+")


class Broken(Exception):
    """A folder does not match its listing; the message says how."""


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, then rename it to `folder`, replacing what exists.

    An error leaves nothing behind; a transient disk error is retried.
    """
    remove_abandoned(folder)
    retry(lambda: _publish(folder, write))


def _publish(folder: Path, write: Callable[[Path], None]) -> None:
    aside, replaced = aside_of(folder, "writing"), aside_of(folder, "replaced")
    for leftover in (aside, replaced):  # from a killed writer with the same process id
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
                replaced.rename(folder)  # keep the old folder
            raise
        flush(folder.parent)
    finally:
        for leftover in (aside, replaced):
            discard(leftover)


def verify(folder: Path, needless: Container[str] = ()) -> None:
    """Check a published folder against its listing, sizes first. Raise Broken.

    Files that are not listed are ignored, and so are those that the caller does not need (`needless`).
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
        if error.errno not in MISSING_ERRORS:  # an unreadable disk must not make a run resume from an older one
            raise
        raise Broken(f"{path} is missing") from None
    except (DetourError, UnicodeDecodeError):
        raise Broken(f"{path} is unreadable") from None
    if not isinstance(listing, dict) or not listing:
        raise Broken(f"{path} lists no files")
    for name, facts in listing.items():
        if name != Path(name).name or not isinstance(facts, dict) or facts.keys() != {"bytes", "sha256"}:
            raise Broken(f"{path} does not list each file's bytes and sha256")
    return listing


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def find_checkpoints(checkpoints: Path) -> list[Path]:
    """Return published checkpoints, oldest first. Unfinished ones of a killed run have other names."""
    return sorted(path for path in checkpoints.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def latest(checkpoints: Path, needless: Container[str] = ()) -> Path | None:
    """Return the newest intact checkpoint, skipping broken ones with a warning."""
    for folder in reversed(find_checkpoints(checkpoints)):
        try:
            retry(lambda folder=folder: verify(folder, needless))
            return folder
        except Broken as fault:
            logger.warning("skipping %s: %s", folder, fault)
    return None


def prune(checkpoints: Path, newest: int, keep: int, is_kept: Callable[[int], bool]) -> None:
    """Remove leftovers of killed runs, and all but the `keep` newest checkpoints up to step `newest`.

    Checkpoints whose step `is_kept`, that hold files of a user, or that are links stay.
    """
    folders = [folder for folder in find_checkpoints(checkpoints) if step_of(folder) <= newest]  # a later one is broken
    for folder in folders[:-keep]:
        if is_kept(step_of(folder)):
            continue
        foreign = _foreign(folder)
        if foreign:
            logger.info("keeping %s: %s", folder, foreign)
        else:
            _remove(folder)
    remove_leftovers(checkpoints)


def _foreign(folder: Path) -> str | None:
    """Return why a checkpoint must not be removed, if it may hold a user's data; hidden files do not count."""
    if folder.is_symlink() or not folder.is_dir():
        return "not a folder of this run"
    try:
        ours = {LISTING, *_listing(folder)}
    except Broken:
        return None
    extra = sorted(path.name for path in folder.iterdir() if path.name not in ours and path.name[0] != ".")
    return f"it contains {extra[0]}, which the run did not write" if extra else None


def leftovers(checkpoints: Path) -> list[Path]:
    """Return what killed runs left half-written or half-removed."""
    return [path for path in checkpoints.glob(".step-*-*") if LEFTOVER.fullmatch(path.name)]


def remove_leftovers(checkpoints: Path) -> None:
    """Remove them, if possible."""
    for leftover in leftovers(checkpoints):
        discard(leftover)


def _remove(folder: Path) -> None:
    """Rename a folder before deleting it, so that no partial folder ever has a checkpoint's name."""
    going = aside_of(folder, "replaced")
    folder.rename(going)
    discard(going, silent=False)
