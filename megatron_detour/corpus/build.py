"""The whole build: texts into PREFIX.bin, PREFIX.idx and PREFIX.manifest.json, and PREFIX.rejects.jsonl where needed.

The input is cut into parts that depend on the input alone. Each worker turns parts into arrays of its own, and the
parts are joined in order, so the bytes do not depend on the number of workers, shards or interruptions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_detour.corpus.documents import read_shard
from megatron_detour.corpus.engines import Chosen, choose_engine, one_thread, special_ids_around
from megatron_detour.corpus.filters import Cleaner
from megatron_detour.corpus.join import join
from megatron_detour.corpus.journal import Journal
from megatron_detour.corpus.lines import check_text_files
from megatron_detour.corpus.options import BuildOptions
from megatron_detour.corpus.progress import say
from megatron_detour.corpus.publish import finish_publishing, published, rejects_path
from megatron_detour.corpus.records import TextKeys
from megatron_detour.corpus.sources import (
    HubDataset,
    InputShard,
    Part,
    find_inputs,
    is_text,
    plan_parts,
    plan_shards,
    shown,
)
from megatron_detour.corpus.worker import Job
from megatron_detour.corpus.workers import run_parts
from megatron_detour.data.indexed import token_type
from megatron_detour.data.manifest import Manifest
from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import Vocabulary, find_tokenizer, load_tokenizer, load_vocabulary

BUILD_FORMAT = 1  # of parts and their journal: other numbers make other keys
SAMPLED_STRETCHES, SAMPLED_CHARACTERS, SAMPLED_TEXT = 16, 1 << 18, 1 << 13  # for the choice of the engine


@dataclass(frozen=True)
class Plan:
    """What is to be built, and from what."""

    stretches: list[InputShard]
    parts: list[Part]
    others: list[str]  # files of the input that are of no known kind
    under: str  # what, beside the input, decides on the bytes
    vocabulary: Vocabulary
    engine: Chosen
    job: Job

    @property
    def key(self) -> str:
        return hashlib.sha256("".join(part.key for part in self.parts).encode()).hexdigest()


def build_corpus(options: BuildOptions) -> Manifest | None:
    """Builds the corpus at options.output_prefix and returns its manifest, or None for a shard of it.

    Finished parts of a build that was broken off are not done again. Raises DetourError; then nothing new is at the
    prefix, and what is finished stays for the next attempt.
    """
    options.check()
    journal = Journal(options.output_prefix)
    try:
        plan = plan_build(options)
    except OSError as error:  # of a file system that is gone, or of what is no file
        raise DetourError(f"{shown(error.filename or 'the input')}: {error.strerror or error}") from None
    manifest = None
    with _sigterm_as_sigint(), journal.lock(options.shard_index):
        try:
            manifest = finish_publishing(journal.folder, options.output_prefix, plan.key) or published(
                options.output_prefix, plan.key, options.overwrite, bool(options.held_out)
            )
            if manifest:
                say(f"{options.output_prefix}: built before from the same input with the same options")
            else:
                manifest = _build(plan, options, journal)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; finished parts are kept in {journal.folder}, the same command goes on"
            ) from None
        except OSError as error:
            place = error.filename or journal.folder
            raise DetourError(
                f"{place}: {error.strerror or error}; finished parts are kept, the same command goes on"
            ) from None
        finally:
            if manifest or (options.shard_index is None and not journal.any_finished()):
                journal.remove()
    return manifest


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """A time limit ends a build as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _build(plan: Plan, options: BuildOptions, journal: Journal) -> Manifest | None:
    missing = sum(not journal.is_finished(part) for part in plan.parts)
    if missing < len(plan.parts):
        say(f"{len(plan.parts) - missing:,} of {len(plan.parts):,} parts are finished already")
    mine = plan.parts if options.shard_index is None else plan.parts[options.shard_index :: options.num_shards]
    run_parts(mine, plan.job, journal)
    if options.shard_index is not None:
        return None
    _check_unchanged(plan, options)
    return join(plan.parts, journal, options, token_type(plan.vocabulary.size), _about(plan, options))


def plan_build(options: BuildOptions) -> Plan:
    """Finds the input, the tokenizer and the engine. Raises DetourError."""
    tokenizer_file = find_tokenizer(options.tokenizer, options.download)
    vocabulary = load_vocabulary(options.tokenizer, options.download)
    _check_template(tokenizer_file, vocabulary)
    Cleaner(options)  # tells here, and not in a worker, what it lacks
    stretches, others = _find(options, first=True)
    one_thread()
    engine = choose_engine(options.engine, tokenizer_file, list(_sample(stretches, options)))
    under = json.dumps(
        [BUILD_FORMAT, options.that_shape_the_corpus(), vocabulary.sha256, engine.name, _versions(engine, options)]
    )
    special = sum(map(len, special_ids_around(load_tokenizer(tokenizer_file))))
    job = Job(options, engine.name, str(tokenizer_file), token_type(vocabulary.size).str, special, vocabulary.unk)
    return Plan(stretches, plan_parts(stretches, under), others, under, vocabulary, engine, job)


def _find(options: BuildOptions, first: bool = False) -> tuple[list[InputShard], list[str]]:
    inputs, others = find_inputs(list(options.input), (rejects_path(options.output_prefix),))
    if first and not options.whole_files and not options.lines:
        check_text_files([name for name in inputs if is_text(name)], say)
    dataset = None
    if options.dataset:
        chosen = (options.dataset, options.dataset_config, options.split, options.streaming, options.download)
        dataset = HubDataset(*chosen)
    return plan_shards(inputs, options.whole_files, options.split, dataset), others


def _versions(engine: Chosen, options: BuildOptions) -> dict[str, str]:
    """Of the packages that decide on ids and on what is left out."""
    packages = {engine.name, "tokenizers"}
    packages |= {"py3langid"} if options.language else set()
    packages |= {"rensa"} if options.deduplicate == "near" else set()
    found = {}
    for package in sorted(packages):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def _check_template(tokenizer_file: Path, vocabulary: Vocabulary) -> None:
    """Raises DetourError for a tokenizer that knows [CLS] and [SEP] and does not put them around a text."""
    tokenizer = load_tokenizer(tokenizer_file)
    before, after = special_ids_around(tokenizer)
    for expected, found in ((vocabulary.cls, before[:1]), (vocabulary.sep, after[-1:])):
        if expected is not None and [expected] != found:
            raise DetourError(
                f"{tokenizer_file}: the tokenizer does not put {tokenizer.id_to_token(expected)} around a text; give "
                "its post_processor the template [CLS] $A [SEP]"
            )


def _sample(stretches: list[InputShard], options: BuildOptions) -> Iterator[str]:
    """Beginnings of documents from stretches all over the input."""
    keys = TextKeys(options.text_key, options.text_separator)
    local = [stretch for stretch in stretches if stretch.kind != "streamed"]
    chosen = local[:: max(-(-len(local) // SAMPLED_STRETCHES), 1)]
    for stretch in chosen:
        left = SAMPLED_CHARACTERS // len(chosen)
        for block in islice(read_shard(stretch, keys), 1):
            for text in block.texts:
                if left <= 0:
                    break
                beginning = text[:SAMPLED_TEXT]
                left -= len(beginning)
                yield beginning


def _check_unchanged(plan: Plan, options: BuildOptions) -> None:
    now = {part.key for part in plan_parts(_find(options)[0], plan.under)}
    changed = [part for part in plan.parts if part.key not in now]
    if changed or len(now) != len(plan.parts):
        names = sorted({stretch.path for part in changed for stretch in part.stretches}) or ["the input"]
        raise DetourError(f"{', '.join(names[:3])}: changed while it was read; build again once it is finished")


def _about(plan: Plan, options: BuildOptions) -> dict[str, Any]:
    sources: dict[str, dict[str, Any]] = {}
    for stretch in plan.stretches:
        size = Path(stretch.path).stat().st_size if Path(stretch.path).is_file() else stretch.size
        entry = sources.setdefault(stretch.path, {"path": shown(stretch.path), "bytes": 0, "state": stretch.state})
        entry["bytes"] = size if Path(stretch.path).is_file() else entry["bytes"] + size
    return {
        "sources": list(sources.values()),
        "passed_over": list(map(shown, plan.others)),
        "tokenizer": plan.vocabulary.to_dict(),
        "engine": dataclasses.asdict(plan.engine),
        "options": {
            "input": list(map(shown, options.input)),
            "dataset": options.dataset,
            **options.that_shape_the_corpus(),
        },
        "versions": _versions(plan.engine, options),
        "plan": plan.key,
    }
