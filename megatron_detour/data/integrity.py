"""Whether a corpus is still the one that was built: told by hash, of the text a sample where the start cannot wait."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_detour.data.indexed import bin_path, idx_path
from megatron_detour.data.manifest import Manifest
from megatron_detour.errors import DetourError
from megatron_detour.files import file_facts

BLOCKS, BLOCK_BYTES = 64, 1 << 16  # of a sample


def sample_sha256(path: Path) -> str:
    """SHA-256 of evenly spaced blocks of a file, the first and the last among them."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for number in range(BLOCKS):
            file.seek(max(size - BLOCK_BYTES, 0) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def refuse_changed(prefix: str, manifest: Manifest) -> None:
    """Raises DetourError where the index, or a sample of the text, is not what the manifest says.

    Manifests of earlier versions have no sample; `verify` reads the whole text.
    """
    index, text = idx_path(prefix), bin_path(prefix)
    changed = [index] if file_facts(index)["sha256"] != manifest.files["idx"]["sha256"] else []
    sample = manifest.files["bin"].get("sample")
    if sample is not None and sample_sha256(text) != sample:
        changed.append(text)
    if changed:
        raise DetourError(
            f"{' and '.join(map(str, changed))}: not as the manifest says, so something has changed since the corpus "
            "was built; bring the files back or build the corpus again"
        )
