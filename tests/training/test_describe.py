"""What a run's environment.json says."""

from __future__ import annotations

import json
from types import SimpleNamespace

from megatron_detour.data.manifest import Manifest
from megatron_detour.training.describe import SOURCES_TOLD, _corpora


def test_a_corpus_of_a_hundred_thousand_files_is_told_in_a_few_lines():
    sources = [{"path": f"reports/{number:06}.txt", "bytes": number, "state": "s" * 60} for number in range(100_000)]
    files = {"bin": {"bytes": 1, "sha256": "0" * 64}}
    manifest = Manifest(documents=1, tokens=2, tokenizer={"sha256": "1" * 64}, files=files, sources=sources)
    (facts,) = _corpora(SimpleNamespace(prefixes=["a"], manifests=[manifest]), [1.0])
    assert len(json.dumps(facts)) < 10_000
    assert (len(facts["sources"]), facts["more_sources"]) == (SOURCES_TOLD, 100_000 - SOURCES_TOLD)
