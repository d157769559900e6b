"""Merging corpora of one tokenizer, in constant memory."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

from megatron_detour import __version__
from megatron_detour.corpus.journal import Journal
from megatron_detour.corpus.options import check_prefix
from megatron_detour.corpus.publish import CorpusWriter, existing_corpus, finish_publishing, publish
from megatron_detour.corpus.sources import printable
from megatron_detour.data.indexed import IndexedCorpus, bin_path
from megatron_detour.data.manifest import Manifest, held_out_prefix, read_manifest
from megatron_detour.errors import DetourError


def merge_corpora(prefixes: list[str], output: str, overwrite: bool = False) -> str:
    """Merge corpora in order into `output` and return a summary line. Raises DetourError."""
    check_prefix(output)
    paths = [Path(prefix).absolute() for prefix in prefixes]
    if Path(output).absolute() in paths:
        raise DetourError(f"--output-prefix {output}: is one of the corpora to merge; choose another prefix")
    if len(set(paths)) < len(paths):
        raise DetourError(f"merge: {max(prefixes, key=prefixes.count)} is given twice")
    for prefix in prefixes:
        if Path(held_out_prefix(prefix)).absolute() in paths:
            raise DetourError(f"{held_out_prefix(prefix)}: was held out of {prefix}, do not merge the two")
    manifests = [read_manifest(prefix) for prefix in prefixes]
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest.tokenizer["sha256"] != manifests[0].tokenizer["sha256"]:
            raise DetourError(f"{prefix}: built with another tokenizer than {prefixes[0]}; rebuild it to merge them")
    plan = hashlib.sha256("".join(m.files["bin"]["sha256"] for m in manifests).encode()).hexdigest()
    journal = Journal(output)
    with journal.lock():
        try:
            manifest = finish_publishing(journal.folder, output, plan) or existing_corpus(output, plan, overwrite)
            manifest = manifest or _merge(prefixes, manifests, output, plan, journal.folder)
        finally:
            if not journal.any_finished():
                journal.remove()
    return f"{output}: {manifest.documents:,} documents, {manifest.tokens:,} tokens of {len(prefixes)} corpora"


def _merge(prefixes: list[str], manifests: list[Manifest], output: str, plan: str, folder: Path) -> Manifest:
    corpora = [IndexedCorpus(prefix) for prefix in prefixes]
    merged = CorpusWriter(folder, "corpus", corpora[0].dtype)
    for prefix, corpus, source in zip(prefixes, corpora, manifests, strict=True):
        digest = hashlib.sha256()
        with bin_path(prefix).open("rb") as ids:
            merged.add(ids, corpus.lengths, digest=digest)
        if digest.hexdigest() != source.files["bin"]["sha256"]:
            raise DetourError(f"{bin_path(prefix)}: its SHA-256 differs from its manifest's; copy or rebuild it")
    manifest = merged.close(_manifest_fields(prefixes, manifests, plan))
    publish(folder, output, plan, merged.renames(output))
    return manifest


def _manifest_fields(prefixes: list[str], manifests: list[Manifest], plan: str) -> dict[str, Any]:
    engines = {m.engine.get("name"): m.engine for m in manifests}
    return {
        "records": sum(m.documents for m in manifests),
        "sources": [
            {"path": printable(prefix), **m.files["bin"]} for prefix, m in zip(prefixes, manifests, strict=True)
        ],
        "tokenizer": manifests[0].tokenizer,
        "engine": manifests[0].engine
        if len(engines) == 1
        else {"name": "several", "version": ", ".join(map(str, engines))},
        "plan": plan,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": __version__,
    }
