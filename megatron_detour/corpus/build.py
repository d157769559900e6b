"""Building a corpus: texts into PREFIX.bin, PREFIX.idx and PREFIX.manifest.json, and PREFIX.rejects.jsonl if needed.

The input is split into parts that depend only on the input. Workers turn parts into files, which are joined in order,
so the result does not depend on the number of workers, shards or interruptions.
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
from megatron_detour.corpus.engines import EngineChoice, choose_engine, one_thread
from megatron_detour.corpus.exclusion import Exclusion
from megatron_detour.corpus.filters import Cleaner
from megatron_detour.corpus.join import join
from megatron_detour.corpus.journal import Journal
from megatron_detour.corpus.lines import check_text_files
from megatron_detour.corpus.options import BuildOptions
from megatron_detour.corpus.progress import say
from megatron_detour.corpus.publish import existing_corpus, finish_publishing, rejects_path
from megatron_detour.corpus.records import TextKeys
from megatron_detour.corpus.sources import (
    HubDataset,
    InputShard,
    Part,
    find_inputs,
    is_text,
    plan_parts,
    plan_shards,
    printable,
)
from megatron_detour.corpus.worker import Job
from megatron_detour.corpus.workers import run_parts
from megatron_detour.data.indexed import token_type
from megatron_detour.data.manifest import Manifest
from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import (
    Vocabulary,
    find_tokenizer,
    load_tokenizer,
    load_vocabulary,
    special_ids_around,
)

BUILD_FORMAT = 1  # of parts and their journal; part of their keys
SAMPLED_SHARDS, SAMPLED_CHARACTERS, SAMPLED_TEXT = 16, 1 << 18, 1 << 13  # for choosing the engine


@dataclass(frozen=True)
class BuildPlan:
    """What to build, and from what."""

    shards: list[InputShard]
    parts: list[Part]
    unsupported: list[str]  # files of the input with another extension
    under: str  # everything besides the input that affects the bytes
    vocabulary: Vocabulary
    engine: EngineChoice
    job: Job
    cleaning: dict[str, Any]  # options that affect the bytes, and the identity of excluded texts
    exclusion: Exclusion | None = None

    @property
    def key(self) -> str:
        return hashlib.sha256("".join(part.key for part in self.parts).encode()).hexdigest()


def build_corpus(options: BuildOptions) -> Manifest | None:
    """Build the corpus at options.output_prefix; return its manifest, or None for a shard of the build.

    Finished parts of an interrupted build are reused. On a DetourError nothing at the prefix has changed, and finished
    parts are kept for the next attempt.
    """
    options.check()
    journal = Journal(options.output_prefix)
    try:
        plan = plan_build(options)
    except OSError as error:  # the file system is gone, or an input is not a file
        raise DetourError(f"{printable(error.filename or 'the input')}: {error.strerror or error}") from None
    manifest = None
    with _sigterm_as_sigint(), journal.lock(options.shard_index):
        try:
            manifest = finish_publishing(journal.folder, options.output_prefix, plan.key) or existing_corpus(
                options.output_prefix, plan.key, options.overwrite, bool(options.held_out)
            )
            if manifest:
                say(f"{options.output_prefix}: already built from the same input with the same options")
            else:
                manifest = _build(plan, options, journal)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"stopped; finished parts are kept in {journal.folder}, run the same command to resume"
            ) from None
        except OSError as error:
            place = error.filename or journal.folder
            raise DetourError(
                f"{place}: {error.strerror or error}; finished parts are kept, run the same command to resume"
            ) from None
        finally:
            if manifest or (options.shard_index is None and not journal.any_finished()):
                journal.remove()
    return manifest


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """A job's time limit stops a build in the same way as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _build(plan: BuildPlan, options: BuildOptions, journal: Journal) -> Manifest | None:
    if plan.exclusion:
        plan.exclusion.save(journal.folder)
        facts = plan.exclusion.facts()
        say(f"--exclude: {facts['exclude_sequences']:,} sequences of {facts['exclude_words']} words")
    parts = plan.parts if options.shard_index is None else plan.parts[options.shard_index :: options.num_shards]
    run_parts(parts, plan.job, journal)
    if options.shard_index is not None:
        return None
    _check_unchanged(plan, options)
    return join(plan.parts, journal, options, token_type(plan.vocabulary.size), _manifest_fields(plan, options))


def plan_build(options: BuildOptions) -> BuildPlan:
    """Find the input, the tokenizer and the engine. Raises DetourError."""
    tokenizer_file = find_tokenizer(options.tokenizer, options.download)
    vocabulary = load_vocabulary(options.tokenizer, options.download)
    _check_template(tokenizer_file, vocabulary)
    Cleaner(options)  # raises here, not in a worker, if a package is missing
    shards, unsupported = _find(options, first=True)
    exclusion = Exclusion.read(options.exclude, options.exclude_words) if options.exclude else None
    cleaning = options.shaping() | (exclusion.facts() if exclusion else {})
    one_thread()
    engine = choose_engine(options.engine, tokenizer_file, list(_sample(shards, options)))
    under = json.dumps([BUILD_FORMAT, cleaning, vocabulary.sha256, engine.name, _versions(engine, options)])
    special = sum(map(len, special_ids_around(load_tokenizer(tokenizer_file))))
    dtype, excluded = token_type(vocabulary.size).str, exclusion.identity if exclusion else None
    job = Job(options, engine.name, str(tokenizer_file), dtype, special, vocabulary.unk, excluded)
    parts = plan_parts(shards, under)
    return BuildPlan(shards, parts, unsupported, under, vocabulary, engine, job, cleaning, exclusion)


def _find(options: BuildOptions, first: bool = False) -> tuple[list[InputShard], list[str]]:
    inputs, unsupported = find_inputs(list(options.input), (rejects_path(options.output_prefix),))
    if first and not options.whole_files and not options.lines:
        check_text_files([name for name in inputs if is_text(name)], say)
    dataset = None
    if options.dataset:
        chosen = (options.dataset, options.dataset_config, options.split, options.streaming, options.download)
        dataset = HubDataset(*chosen)
    return plan_shards(inputs, options.whole_files, options.split, dataset), unsupported


def _versions(engine: EngineChoice, options: BuildOptions) -> dict[str, str]:
    """Return the versions of the packages that affect ids or filtering."""
    packages = {engine.name, "tokenizers"}
    packages |= {"py3langid"} if options.language else set()
    packages |= {"rensa"} if options.deduplicate == "near" else set()
    versions = {}
    for package in sorted(packages):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def _check_template(tokenizer_file: Path, vocabulary: Vocabulary) -> None:
    """Raise DetourError for a tokenizer that has tokens for the two ends of a text but does not add them."""
    tokenizer = load_tokenizer(tokenizer_file)
    before, after = special_ids_around(tokenizer)
    for expected, actual in ((vocabulary.cls, before[:1]), (vocabulary.sep, after[-1:])):
        if expected is not None and [expected] != actual:
            raise DetourError(
                f"{tokenizer_file}: the tokenizer does not add {tokenizer.id_to_token(expected)} to a text; set its "
                "post_processor to the template [CLS] $A [SEP]"
            )


def _sample(shards: list[InputShard], options: BuildOptions) -> Iterator[str]:
    """Yield beginnings of documents from evenly spaced shards of the input."""
    keys = TextKeys(options.text_key, options.text_separator)
    local = [shard for shard in shards if shard.kind != "streamed"]
    chosen = local[:: max(-(-len(local) // SAMPLED_SHARDS), 1)]
    for shard in chosen:
        left = SAMPLED_CHARACTERS // len(chosen)
        for block in islice(read_shard(shard, keys), 1):
            for text in block.texts:
                if left <= 0:
                    break
                beginning = text[:SAMPLED_TEXT]
                left -= len(beginning)
                yield beginning


def _check_unchanged(plan: BuildPlan, options: BuildOptions) -> None:
    now = {part.key for part in plan_parts(_find(options)[0], plan.under)}
    changed = [part for part in plan.parts if part.key not in now]
    if changed or len(now) != len(plan.parts):
        names = sorted({shard.path for part in changed for shard in part.shards}) or ["the input"]
        raise DetourError(f"{', '.join(names[:3])}: changed during the build; run it again once the input is complete")


def _manifest_fields(plan: BuildPlan, options: BuildOptions) -> dict[str, Any]:
    sources: dict[str, dict[str, Any]] = {}
    for shard in plan.shards:
        size = Path(shard.path).stat().st_size if Path(shard.path).is_file() else shard.size
        entry = sources.setdefault(shard.path, {"path": printable(shard.path), "bytes": 0, "state": shard.state})
        entry["bytes"] = size if Path(shard.path).is_file() else entry["bytes"] + size
    return {
        "sources": list(sources.values()),
        "passed_over": list(map(printable, plan.unsupported)),
        "tokenizer": plan.vocabulary.to_dict(),
        "engine": dataclasses.asdict(plan.engine),
        "options": {
            "input": list(map(printable, options.input)),
            "dataset": options.dataset,
            "exclude": list(map(printable, options.exclude)),
            **plan.cleaning,
        },
        "versions": _versions(plan.engine, options),
        "plan": plan.key,
    }
