"""Whether a corpus is still the one that was built: told by hash, of the text a sample where the start cannot wait."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from megatron_detour.data.indexed import bin_path, idx_path
from megatron_detour.data.manifest import Manifest
from megatron_detour.errors import DetourError
from megatron_detour.files import file_facts

SAMPLE_BLOCKS, BLOCK_BYTES = 64, 1 << 16


def sample_sha256(path: Path) -> str:
    """Return the SHA-256 of evenly spaced blocks of a file, including the first and the last."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for number in range(SAMPLE_BLOCKS):
            file.seek(max(size - BLOCK_BYTES, 0) * number // (SAMPLE_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def refuse_changed(prefix: str, manifest: Manifest) -> None:
    """Raise DetourError if the hash of the index, or of a sample of the text, differs from the manifest.

    Manifests of earlier versions have no sample. `verify` checks the entire text.
    """
    state = tuple((path, *_state(path)) for path in (idx_path(prefix), bin_path(prefix)))
    changed = _changed(state, manifest.files["idx"]["sha256"], manifest.files["bin"].get("sample"))
    if changed:
        raise DetourError(
            f"{' and '.join(map(str, changed))}: does not match the manifest, so it has changed since the corpus was "
            "built; restore the files or rebuild the corpus"
        )


@lru_cache  # the phases of a run and its validation open the same corpora
def _changed(state: tuple, index_sha256: str, text_sample: str | None) -> list[Path]:
    (index, *_), (text, *_) = state
    changed = [index] if file_facts(index)["sha256"] != index_sha256 else []
    return changed if text_sample in (None, sample_sha256(text)) else [*changed, text]


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
