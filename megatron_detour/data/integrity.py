"""Opening a corpus: whether it is there, whole, still the one that was built, and of the run's tokenizer."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from megatron_detour.data.indexed import IndexedCorpus, bin_path, idx_path
from megatron_detour.data.manifest import Manifest, read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.files import file_facts
from megatron_detour.tokenizer.vocabulary import Vocabulary

SAMPLE_BLOCKS, BLOCK_BYTES = 64, 1 << 16


def sample_sha256(path: Path) -> str:
    """Return the SHA-256 of evenly spaced blocks of a file, including the first and the last."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        for number in range(SAMPLE_BLOCKS):
            file.seek(max(size - BLOCK_BYTES, 0) * number // (SAMPLE_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def open_corpus(prefix: str, vocabulary: Vocabulary | None) -> tuple[Manifest, IndexedCorpus]:
    """Opens a corpus of text in the ids of `vocabulary` (None: of any). Raises DetourError with the reason why not."""
    manifest = read_manifest(prefix)
    built_with = manifest.tokenizer
    if vocabulary and built_with["sha256"] != vocabulary.sha256:
        raise DetourError(
            f"{prefix}: built with another tokenizer (sha256 {built_with['sha256'][:12]}, {built_with['size']:,} ids) "
            f"than the run's (sha256 {vocabulary.sha256[:12]}, {vocabulary.size:,} ids); build it again with the run's "
            "tokenizer, or set model.tokenizer to the corpus's"
        )
    corpus = IndexedCorpus(prefix)  # which compares the sizes of the files before their content is read
    refuse_changed(prefix, manifest)
    return manifest, corpus


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
