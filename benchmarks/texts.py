"""The same texts for all builders: JSON lines of a given size, from any input of the corpus builder or synthetic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from megatron_detour.corpus.documents import read_shard
from megatron_detour.corpus.records import TextKeys
from megatron_detour.corpus.sources import find_inputs, plan_shards
from megatron_detour.errors import DetourError

FEW = 200  # documents whose ids are compared
LINK_BYTES = 100_000_000  # of text in the file that a folder of hard links repeats
ZIPF = 1.3  # exponent: a few words make up half of a text, and new words keep occurring
MEDIAN_WORDS, SPREAD = 200, 0.8  # of the log-normal lengths of synthetic documents
SYLLABLES = [a + b for a in "bdfglmnprstv" for b in "aeioué"]


@dataclass
class Slice:
    """A file of JSON lines; `bytes` counts the texts in UTF-8, without the JSON around them."""

    path: Path
    limit: float  # bytes of text, at least one document
    most: float = float("inf")  # documents
    bytes: int = 0
    documents: int = 0

    @property
    def megabytes(self) -> float:
        return self.bytes / 1e6

    def is_full(self) -> bool:
        return self.bytes >= self.limit or self.documents >= self.most


@dataclass
class Texts:
    """Beginnings of the same texts: all, a part for the slower peers, a few to compare ids, one to measure startup."""

    whole: Slice
    peers: Slice
    few: Slice
    one: Slice
    passes: int = 1  # over the input

    def slices(self) -> list[Slice]:
        return [self.whole, self.peers, self.few, self.one]


def write_texts(
    folder: Path, inputs: tuple[str, ...], text_key: str, megabytes: float, peer_megabytes: float, seed: int
) -> Texts:
    """Write the slices into `folder`; without `inputs` the documents are synthetic. Raises DetourError."""
    texts = Texts(
        Slice(folder / "whole.jsonl", megabytes * 1e6),
        Slice(folder / "peers.jsonl", min(megabytes, peer_megabytes) * 1e6),
        Slice(folder / "few.jsonl", megabytes * 1e6, FEW),
        Slice(folder / "one.jsonl", 1, 1),
    )
    files = [each.path.open("w", encoding="utf-8") for each in texts.slices()]
    try:
        for text, texts.passes in _documents(inputs, text_key, seed):
            for each, file in zip(texts.slices(), files, strict=True):
                _add(each, file, text)
            if texts.whole.is_full():
                break
    finally:
        for file in files:
            file.close()
    return texts


def _add(each: Slice, file: TextIO, text: str) -> None:
    if not each.is_full():
        file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        each.bytes += len(text.encode())
        each.documents += 1


def _documents(inputs: tuple[str, ...], text_key: str, seed: int) -> Iterator[tuple[str, int]]:
    """Yield documents endlessly, with the number of the pass over the input."""
    if not inputs:
        yield from ((text, 1) for text in invented(seed))
    shards, keys = plan_shards(find_inputs(list(inputs))[0]), TextKeys((text_key,))
    number = 0
    while True:
        number, has_text = number + 1, False
        for shard in shards:
            for block in read_shard(shard, keys):
                has_text = has_text or bool(block.texts)
                yield from ((text, number) for text in block.texts)
        if not has_text:
            raise DetourError(f"--input: {', '.join(inputs)}: no document has a text under {text_key!r}")


def invented(seed: int) -> Iterator[str]:
    """Yield documents of synthetic words endlessly; frequent words are shorter."""
    generator = np.random.default_rng(seed)
    words: dict[int, str] = {}
    while True:
        length = max(int(generator.lognormal(np.log(MEDIAN_WORDS), SPREAD)), 1)
        ranks = np.minimum(generator.zipf(ZIPF, length), 10**9).tolist()
        stops = (generator.random(length) < 0.06).tolist()
        drawn = [words.get(rank) or words.setdefault(rank, _word(rank)) for rank in ranks]
        yield " ".join(word + "." if stop else word for word, stop in zip(drawn, stops, strict=True)).capitalize()
        if len(words) > 1_000_000:
            words.clear()


def _word(rank: int) -> str:
    word = ""
    while rank:
        rank, digit = divmod(rank, len(SYLLABLES))
        word += SYLLABLES[digit]
    return word


def link_many(source: Slice, folder: Path, gigabytes: float) -> tuple[Path, float]:
    """Create a folder of hard links to one file, with about this much text in total; return it and the exact bytes.

    To the builder each link is a separate input, while the text is on disk only once.
    """
    some = Slice(folder / "texts.jsonl", min(LINK_BYTES, gigabytes * 1e9))
    with source.path.open(encoding="utf-8") as lines, some.path.open("w", encoding="utf-8") as out:
        for line in lines:
            _add(some, out, json.loads(line)["text"])
    links = folder / "links"
    links.mkdir()
    count = max(round(gigabytes * 1e9 / some.bytes), 1)
    for number in range(count):
        (links / f"{number:06}.jsonl").hardlink_to(
            some.path
        )  # the builder would read a file behind symbolic links once
    return links, count * some.bytes
