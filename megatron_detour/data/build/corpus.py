"""The whole build: texts into PREFIX.bin, PREFIX.idx and PREFIX.manifest.json, and PREFIX.rejects.jsonl where needed.

The input is cut into parts that depend on the input alone. Each worker turns parts into arrays of its own, and the
parts are joined in order, so the bytes do not depend on the number of workers, shards or interruptions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_detour.data.build.engines import Chosen, choose_engine, one_thread
from megatron_detour.data.build.join import join
from megatron_detour.data.build.journal import Journal
from megatron_detour.data.build.options import BuildOptions
from megatron_detour.data.build.run import run_parts
from megatron_detour.data.build.worker import Job
from megatron_detour.data.documents import read_stretch
from megatron_detour.data.indexed import bin_path, idx_path, token_type
from megatron_detour.data.manifest import Manifest, manifest_path, read_manifest
from megatron_detour.data.records import TextKeys
from megatron_detour.data.sources import HubDataset, Part, Stretch, find_inputs, plan_parts, plan_stretches
from megatron_detour.data.vocabulary import Vocabulary, find_tokenizer, load_tokenizer, load_vocabulary
from megatron_detour.errors import DetourError

SAMPLED_STRETCHES, SAMPLED_CHARACTERS, SAMPLED_TEXT = 16, 1 << 20, 1 << 13  # for the choice of the engine


def build_corpus(options: BuildOptions) -> Manifest | None:
    """Builds the corpus at options.output_prefix and returns its manifest, or None for a shard of it.

    Finished parts of a build that was broken off are not done again. Raises DetourError; then nothing new is at the
    prefix, and what is finished stays for the next attempt.
    """
    options.check()
    dataset = None
    if options.dataset:
        parts_of_it = (options.dataset, options.dataset_config, options.split, options.streaming, options.download)
        dataset = HubDataset(*parts_of_it)
    inputs = find_inputs(list(options.input))
    tokenizer_file = find_tokenizer(options.tokenizer, options.download)
    vocabulary = load_vocabulary(options.tokenizer, options.download)
    _check_template(tokenizer_file, vocabulary)
    stretches = plan_stretches(inputs, options.whole_files, options.split, dataset)
    one_thread()
    engine = choose_engine(options.engine, tokenizer_file, list(_sample(stretches, options)))
    shaping = [options.that_shape_the_corpus(), vocabulary.sha256, engine.name]
    parts = plan_parts(stretches, json.dumps(shaping))
    plan = hashlib.sha256("".join(part.key for part in parts).encode()).hexdigest()
    journal = Journal(options.output_prefix)
    built = _already_built(options, plan)
    if built:
        journal.remove()
        return built
    job = Job(options, engine.name, str(tokenizer_file), token_type(vocabulary.size).str)
    with journal.lock(options.shard_index):
        try:
            run_parts(_mine(parts, options), job, journal)
            if options.shard_index is not None:
                return None
            _check_unchanged(parts, stretches, json.dumps(shaping))
            about = _about(stretches, vocabulary, engine, options, plan)
            manifest = join(parts, journal, options, token_type(vocabulary.size), about)
        except OSError as error:
            place = error.filename or journal.folder
            raise DetourError(f"{place}: {error.strerror}; finished parts are kept, the same command goes on") from None
        finally:
            if options.shard_index is None and not journal.any_finished():
                journal.remove()
        journal.remove()
    return manifest


def _already_built(options: BuildOptions, plan: str) -> Manifest | None:
    """The manifest of the same build done before. Raises DetourError for another corpus that is in the way."""
    prefix = options.output_prefix
    there = [path for path in (manifest_path(prefix), bin_path(prefix), idx_path(prefix)) if path.exists()]
    if options.overwrite or not there:
        return None
    if there[0] == manifest_path(prefix):
        manifest = read_manifest(prefix)
        if manifest.plan == plan:
            return manifest
    raise DetourError(f"{there[0]}: a corpus is already there; choose another prefix or --overwrite")


def _check_template(tokenizer_file: Path, vocabulary: Vocabulary) -> None:
    """Raises DetourError for a tokenizer that knows [CLS] and [SEP] and does not put them around a text."""
    tokenizer = load_tokenizer(tokenizer_file)
    ids = tokenizer.encode("a").ids
    for expected, found in ((vocabulary.cls, ids[:1]), (vocabulary.sep, ids[-1:])):
        if expected is not None and [expected] != found:
            raise DetourError(
                f"{tokenizer_file}: the tokenizer does not put {tokenizer.id_to_token(expected)} around a text; give "
                "its post_processor the template [CLS] $A [SEP]"
            )


def _sample(stretches: list[Stretch], options: BuildOptions) -> Iterator[str]:
    """Beginnings of documents from stretches all over the input."""
    keys = TextKeys(options.text_key, options.text_separator)
    local = [stretch for stretch in stretches if stretch.kind != "streamed"]
    chosen = local[:: max(-(-len(local) // SAMPLED_STRETCHES), 1)]
    for stretch in chosen:
        left = SAMPLED_CHARACTERS // len(chosen)
        for block in islice(read_stretch(stretch, keys), 1):
            for text in block.texts:
                if left <= 0:
                    break
                beginning = text[:SAMPLED_TEXT]
                left -= len(beginning)
                yield beginning


def _mine(parts: list[Part], options: BuildOptions) -> list[Part]:
    return parts if options.shard_index is None else parts[options.shard_index :: options.num_shards]


def _check_unchanged(parts: list[Part], stretches: list[Stretch], under: str) -> None:
    for part, now in zip(parts, plan_parts(stretches, under), strict=True):
        if part.key != now.key:
            names = sorted({stretch.path for stretch in part.stretches})
            raise DetourError(f"{', '.join(names[:3])}: changed while it was read; build again once it is finished")


def _about(
    stretches: list[Stretch], vocabulary: Vocabulary, engine: Chosen, options: BuildOptions, plan: str
) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    for stretch in stretches:
        sizes[stretch.path] = sizes.get(stretch.path, 0) + stretch.size
    return {
        "sources": [{"path": path, "bytes": size} for path, size in sizes.items()],
        "tokenizer": vocabulary.to_dict(),
        "engine": dataclasses.asdict(engine),
        "options": options.that_shape_the_corpus(),
        "plan": plan,
    }
