"""Builders of token ids from JSON lines, each run in a separate process: python builders.py '{"builder": ...}'.

A job specifies the builder, the input (JSON lines with "text"), the tokenizer.json, an empty output folder, and for how
many documents to `show` ids. The last line of the output is JSON: documents, tokens, wall-clock and CPU seconds
(including child processes) from the builder's call to its last write, without imports, and the ids shown. Imports are
lazy, even of this project: a peer may be installed in another environment.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH_CHARACTERS = 500_000  # for the engine alone: as much as our builder reads at a time
BATCH_DOCUMENTS = 1_000  # of encode_batch and datasets.map

Result = dict[str, Any]


class Clock:
    """Total seconds between `start` and `stop`."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def start(self) -> None:
        self.seconds -= time.perf_counter()
        self.cpu_seconds -= _cpu_seconds()

    def stop(self) -> None:
        self.seconds += time.perf_counter()
        self.cpu_seconds += _cpu_seconds()


def _cpu_seconds() -> float:
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def ours(job: dict[str, Any]) -> Result:
    """This project's builder."""
    from megatron_detour.corpus import BuildOptions, build_corpus
    from megatron_detour.data.indexed import IndexedCorpus

    prefix = str(Path(job["folder"]) / "corpus")
    options = BuildOptions(prefix, job["tokenizer"], tuple(job["input"]), workers=job["workers"])
    clock = Clock()
    clock.start()
    manifest = build_corpus(options)
    clock.stop()
    corpus = IndexedCorpus(prefix)
    shown = [corpus.tokens(i, 0, int(corpus.lengths[i])).tolist() for i in range(job["show"])]
    return _result(manifest.documents, manifest.tokens, clock, shown) | {"engine": manifest.engine["name"]}


def engine(job: dict[str, Any]) -> Result:
    """The engine of our builder on documents in memory, each processed once; only the engine's calls are timed.

    The ids shown are those of the builder's adapter, which adds special tokens to sentencepiece's ids.
    """
    from megatron_detour.corpus.engines import ENGINES

    encode, count = RAW[job["engine"]](job["tokenizer"])
    documents = tokens = 0
    clock = Clock()
    for texts in _batches(job["input"][0]):
        clock.start()
        encoded = encode(texts)
        clock.stop()
        documents, tokens = documents + len(texts), tokens + count(encoded)
    shown = []
    if job["show"]:
        texts = list(itertools.islice(_texts(job["input"][0]), job["show"]))
        ids, begins = ENGINES[job["engine"]](Path(job["tokenizer"])).encode(texts)
        shown = [ids[begins[i] : begins[i + 1]].tolist() for i in range(len(texts))]
    return _result(documents, tokens, clock, shown)


def _fastokens(tokenizer_file: str) -> tuple[Callable, Callable]:
    import fastokens

    flat = fastokens.Tokenizer.from_json_str(Path(tokenizer_file).read_text(encoding="utf-8")).encode_batch_flat
    return lambda texts: flat(texts, add_special_tokens=True), lambda encoded: len(encoded[0]) // 4


def _sentencepiece(tokenizer_file: str) -> tuple[Callable, Callable]:
    from sentencepiece import SentencePieceProcessor

    from megatron_detour.tokenizer import sentencepiece_model as spm

    model = spm.to_model(json.loads(Path(tokenizer_file).read_text(encoding="utf-8")))
    processor = SentencePieceProcessor(model_proto=model)
    return lambda texts: processor.encode(texts, out_type=int, num_threads=1), lambda rows: sum(map(len, rows))


def _tokenizers(tokenizer_file: str) -> tuple[Callable, Callable]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(tokenizer_file).encode_batch_fast, lambda rows: sum(len(row.ids) for row in rows)


RAW = {"fastokens": _fastokens, "sentencepiece": _sentencepiece, "tokenizers": _tokenizers}


def encode_batch(job: dict[str, Any]) -> Result:
    """The obvious loop: lines, Tokenizer.encode_batch, ids into a file."""
    import numpy as np
    from tokenizers import Tokenizer

    clock = Clock()
    clock.start()
    tokenizer = Tokenizer.from_file(job["tokenizer"])
    dtype = np.dtype(_id_type(tokenizer))
    target = Path(job["folder"]) / "ids.bin"
    lengths: list[int] = []
    texts = _texts(job["input"][0])
    with target.open("wb") as out:
        while batch := list(itertools.islice(texts, BATCH_DOCUMENTS)):
            rows = [encoding.ids for encoding in tokenizer.encode_batch(batch)]
            lengths += map(len, rows)
            out.write(np.array(list(itertools.chain.from_iterable(rows)), dtype).data)
    np.array(lengths, "<i4").tofile(target.with_suffix(".lengths"))
    clock.stop()
    ids, ends = np.fromfile(target, dtype), np.cumsum(lengths)
    shown = [part.tolist() for part in np.split(ids, ends)[: job["show"]]]
    return _result(len(lengths), sum(lengths), clock, shown)


def datasets(job: dict[str, Any]) -> Result:
    """datasets: JSON lines, map with the same tokenizer in one process, save_to_disk; without caching."""
    from datasets import Dataset, Features, Sequence, Value, disable_caching, disable_progress_bars, load_from_disk
    from tokenizers import Tokenizer

    disable_caching()
    disable_progress_bars()
    folder = Path(job["folder"])
    clock = Clock()
    clock.start()
    tokenizer = Tokenizer.from_file(job["tokenizer"])
    features = Features({"ids": Sequence(Value(_id_type(tokenizer)))})
    lines = Dataset.from_json(job["input"][0], cache_dir=str(folder / "cache"))
    encoded = lines.map(
        lambda batch: {"ids": [encoding.ids for encoding in tokenizer.encode_batch(batch["text"])]},
        batched=True,
        batch_size=BATCH_DOCUMENTS,
        remove_columns=lines.column_names,
        features=features,
        new_fingerprint="ids",
    )
    encoded.save_to_disk(str(folder / "saved"), num_proc=None)
    clock.stop()
    saved = load_from_disk(str(folder / "saved"))
    tokens = sum(len(column.values) for column in saved.data.column("ids").chunks)
    return _result(len(saved), tokens, clock, saved[: job["show"]]["ids"] if job["show"] else [])


def datatrove(job: dict[str, Any]) -> Result:
    """datatrove: JsonlReader and DocumentTokenizer, one task in this process, documents in order."""
    import numpy as np
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer
    from tokenizers import Tokenizer

    source, folder = Path(job["input"][0]), Path(job["folder"])
    clock = Clock()
    clock.start()
    reader = JsonlReader(str(source.parent), glob_pattern=source.name)
    writer = DocumentTokenizer(str(folder / "ids"), job["tokenizer"], shuffle_documents=False)
    LocalPipelineExecutor([reader, writer], tasks=1, workers=1, logging_dir=str(folder / "logs")).run()
    clock.stop()
    (target,) = (folder / "ids").glob("*.ds")
    ends = np.fromfile(f"{target}.index", "<u8").astype(np.int64)
    ids = np.fromfile(target, _id_type(Tokenizer.from_file(job["tokenizer"])))
    shown = [part.tolist() for part in np.split(ids, ends)[: job["show"]]]
    return _result(len(ends), len(ids), clock, shown)


BUILDERS = {builder.__name__: builder for builder in (ours, engine, encode_batch, datasets, datatrove)}
NEEDS = {"encode_batch": "tokenizers", "datasets": "tokenizers datasets", "datatrove": "tokenizers datatrove orjson"}


def _texts(path: str) -> Iterator[str]:
    with Path(path).open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def _batches(path: str) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in _texts(path):
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _id_type(tokenizer) -> str:
    return "uint16" if tokenizer.get_vocab_size() <= 1 << 16 else "uint32"


def _result(documents: int, tokens: int, clock: Clock, shown: list[list[int]]) -> Result:
    return {
        "documents": documents,
        "tokens": tokens,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "shown": shown,
    }


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps(BUILDERS[job["builder"]](job)))
