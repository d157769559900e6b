"""How much text there is to train on, before or after a corpus is built of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour.corpus.documents import read_shard
from megatron_detour.corpus.records import TextKeys
from megatron_detour.corpus.sources import InputShard, find_inputs, is_text, plan_shards
from megatron_detour.data.manifest import held_out_prefix, read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import load_tokenizer

COUNTED_BYTES, COUNTED_TEXTS = 64 << 20, 1000  # sample from which the number of tokens is estimated
CHARACTERS_PER_TOKEN = 4  # if the tokenizer is not downloaded yet
HELD_OUT = 100  # documents for validation


@dataclass(frozen=True)
class Texts:
    """The texts to train on."""

    prefix: str  # of the corpus, whether or not it is built
    built: bool
    documents: int  # estimated
    tokens: int  # estimated
    flags: tuple[str, ...] = ()  # further flags of preprocess

    @classmethod
    def read(cls, path: str, name: str, tokenizer: str | None) -> Texts:
        """Count the tokens of a corpus, or estimate those of texts from a sample. Raises DetourError."""
        prefix = path.removesuffix(".manifest.json").removesuffix(".bin").removesuffix(".idx")
        if Path(f"{prefix}.manifest.json").exists():
            manifest = read_manifest(prefix)
            return cls(prefix, True, manifest.documents, manifest.tokens)
        inputs, _ = find_inputs([path])
        key = _text_key(inputs[0])
        whole = len(inputs) > 1 and all(map(is_text, inputs))  # then each file is one document
        documents, tokens = _estimate(plan_shards(inputs, whole), TextKeys((key,)), tokenizer)
        flags = (*(["--whole-files"] if whole else []), *(["--text-key", key] if key != "text" else []))
        return cls(f"data/{name}", False, documents, tokens, flags)

    @property
    def held_out(self) -> float:
        return max(0.01, min(0.2, round(HELD_OUT / self.documents, 3)))

    @property
    def validation(self) -> str | None:
        """The prefix of the held-out corpus, or None."""
        prefix = held_out_prefix(self.prefix)
        return prefix if not self.built or Path(f"{prefix}.manifest.json").exists() else None


def _text_key(path: str) -> str:
    """Return the key of the text in a file: "text", or that of the longest string in the first record."""
    record: dict[str, Any] = {}
    if path.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile

        record = next(ParquetFile(path).iter_batches(1)).to_pylist()[0]
    elif path.endswith(".jsonl"):
        with Path(path).open("rb") as file:
            try:
                record = json.loads(file.readline(COUNTED_BYTES))
            except ValueError:
                return "text"
    texts = {key: value for key, value in record.items() if isinstance(value, str)}
    return "text" if "text" in texts or not texts else max(texts, key=lambda key: len(texts[key]))


def _estimate(shards: list[InputShard], keys: TextKeys, tokenizer: str | None) -> tuple[int, int]:
    """Estimate the number of documents and tokens from evenly spaced shards."""
    size = sum(shard.size for shard in shards)
    every = max(1, size // COUNTED_BYTES)
    chosen = shards[::every]
    texts = [text for shard in chosen for block in read_shard(shard, keys) for text in block.texts]
    if not texts:
        raise DetourError(f"{shards[0].path}: no text under the key {keys.keys[0]!r}; build the corpus first")
    scale = size / max(sum(shard.size for shard in chosen), 1)
    sample = texts[:: max(1, len(texts) // COUNTED_TEXTS)]
    per_character = 1 / CHARACTERS_PER_TOKEN
    if tokenizer:
        encoded = load_tokenizer(tokenizer).encode_batch(sample)
        per_character = sum(len(one.ids) for one in encoded) / sum(map(len, sample))
    return max(1, int(scale * len(texts))), max(1, int(scale * sum(map(len, texts)) * per_character))
