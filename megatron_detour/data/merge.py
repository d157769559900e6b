"""Several corpora of one tokenizer into one, in constant memory."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_detour import __version__
from megatron_detour.data.build.join import Corpus
from megatron_detour.data.indexed import IndexedCorpus, bin_path, idx_path
from megatron_detour.data.manifest import Manifest, manifest_path, read_manifest
from megatron_detour.errors import DetourError


def merge_corpora(prefixes: list[str], output: str, overwrite: bool = False) -> str:
    """Joins corpora in order into `output` and returns a line about it. Raises DetourError."""
    if output in prefixes:
        raise DetourError(f"--output-prefix {output}: it is one of the corpora to join")
    there = [path for path in (manifest_path(output), bin_path(output), idx_path(output)) if path.exists()]
    if there and not overwrite:
        raise DetourError(f"{there[0]}: a corpus is already there; choose another prefix or --overwrite")
    manifests = [read_manifest(prefix) for prefix in prefixes]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest.tokenizer["sha256"] != manifests[0].tokenizer["sha256"]:
            raise DetourError(f"{prefix}: built with another tokenizer than {prefixes[0]}; build it again to join them")
    folder = Path(output).parent / f".{Path(output).name}.merging"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        corpora = [IndexedCorpus(prefix) for prefix in prefixes]
        merged = Corpus(folder, "corpus", corpora[0].dtype)
        for prefix, corpus in zip(prefixes, corpora, strict=True):
            with bin_path(prefix).open("rb") as ids:
                merged.append(ids, corpus.lengths)
        manifest = merged.close(_joined(prefixes, manifests))
        manifest_path(output).unlink(missing_ok=True)
        merged.publish(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return f"{output}: {manifest.documents:,} documents, {manifest.tokens:,} tokens of {len(prefixes)} corpora"


def _joined(prefixes: list[str], manifests: list[Manifest]) -> dict[str, Any]:
    engines = {str(m.engine): m.engine for m in manifests}
    return {
        **{name: sum(getattr(m, name) for m in manifests) for name in ("records", "empty", "rejects", "held_out")},
        "removed": dict(sum((Counter(m.removed) for m in manifests), Counter())),
        "sources": [source for manifest in manifests for source in manifest.sources],
        "tokenizer": manifests[0].tokenizer,
        "engine": manifests[0].engine if len(engines) == 1 else {"name": "several", "of": list(engines.values())},
        "options": {"merged": [{"prefix": p, **m.files} for p, m in zip(prefixes, manifests, strict=True)]},
        "plan": hashlib.sha256("".join(m.plan for m in manifests).encode()).hexdigest(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
    }
