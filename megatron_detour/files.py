"""Files that are there whole or as they were before, and what identifies them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes | Iterator[bytes]) -> None:
    """Writes a file beside `path`, brings it to the disk and gives it its name in one move."""
    if isinstance(content, str | bytes):
        content = iter([content.encode("utf-8") if isinstance(content, str) else content])
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:  # a write to a full disk does not say which file
        error.filename = error.filename or str(path)
        raise
    except Exception:  # of whoever makes the parts
        aside.unlink()
        raise


def flush(path: Path) -> None:
    """Brings a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_facts(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
