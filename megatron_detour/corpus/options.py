"""Options of the corpus builder: each field is a flag of megatron-detour preprocess."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from megatron_detour.corpus.engines import ENGINES
from megatron_detour.corpus.sources import KINDS
from megatron_detour.errors import DetourError
from megatron_detour.settings import AnyText, Choice, Faults, Flag, Range, validate

SOURCE, CLEANING, WORK = Flag(group="input"), Flag(group="cleaning"), Flag(group="build")
COUNT = Range(least=0)
EXCLUDE_WORDS = 13  # as GPT-3's training text was cleaned (Brown et al., 2020, appendix C)


@dataclass(frozen=True)
class BuildOptions:
    output_prefix: Annotated[AnyText, Flag("P"), "the corpus to write: P.bin, P.idx, P.manifest.json"]
    tokenizer: Annotated[AnyText, "a folder, a tokenizer.json, a SentencePiece model, BERT's vocab.txt or a hub id"]
    input: Annotated[
        tuple[AnyText, ...],
        Flag("FILE", "input"),
        f"files ({', '.join(KINDS)}), folders, globs, saved datasets",
    ] = ()
    dataset: Annotated[
        AnyText | None, SOURCE, "a dataset of the Hugging Face hub, or a folder that load_dataset opens"
    ] = None
    dataset_config: Annotated[AnyText | None, SOURCE, "configuration of the dataset"] = None
    split: Annotated[AnyText, SOURCE, "the split of a dataset"] = "train"
    streaming: Annotated[bool, SOURCE, "read the dataset from the network during the build, without a copy"] = False
    text_key: Annotated[tuple[AnyText, ...], SOURCE, "key of the text, a.b for b inside a; several are joined"] = (
        "text",
    )
    text_separator: Annotated[AnyText, SOURCE, "separator between the texts of several keys"] = "\n"
    whole_files: Annotated[bool, SOURCE, "each .txt file is one document; several .txt files need this or --lines"] = (
        False
    )
    lines: Annotated[bool, SOURCE, "each line of a .txt file is one document"] = False
    engine: Annotated[str, Choice(("auto", *ENGINES)), WORK, "tokenization engine"] = "auto"
    workers: Annotated[int, Range(least=1), WORK, "processes"] = 1
    max_rejects: Annotated[int, COUNT, WORK, "skip up to N invalid records, and list them in P.rejects.jsonl"] = 0
    normalize: Annotated[
        str | None, Choice(("NFC", "NFKC", "NFD", "NFKD")), CLEANING, "Unicode normalization form, applied first"
    ] = None
    min_chars: Annotated[int, COUNT, CLEANING, "drop documents with fewer characters"] = 0
    max_chars: Annotated[int | None, Range(least=1), CLEANING, "drop documents with more characters"] = None
    language: Annotated[
        tuple[AnyText, ...],
        Flag("CODE", "cleaning"),
        "keep only documents in these languages, such as en fr (py3langid)",
    ] = ()
    deduplicate: Annotated[
        str | None,
        Choice(("exact", "near")),
        CLEANING,
        "keep the first of equal (exact) or also of similar (near) documents",
    ] = None
    similarity: Annotated[
        float, Range(above=0, most=1), CLEANING, "minimum fraction of common word 5-grams of similar documents"
    ] = 0.8
    exclude: Annotated[
        tuple[AnyText, ...],
        Flag("FILE", "cleaning"),
        "drop documents that share words in a row with a text of these files, or of folders' files named test.*",
    ] = ()
    exclude_words: Annotated[
        int, Range(least=1), CLEANING, "number of words in a row that a document may not share with --exclude"
    ] = EXCLUDE_WORDS
    held_out: Annotated[
        float, Range(least=0, below=1), CLEANING, "fraction of documents, by hash of the text, to hold out as P.heldout"
    ] = 0.0
    num_shards: Annotated[int, Range(least=1), WORK, "processes that divide the build, each with its --shard-index"] = 1
    shard_index: Annotated[int | None, COUNT, WORK, "build only this shard; a final run without it joins them"] = None
    engine_cluster: Annotated[str | None, Choice(("ray",)), WORK, "cluster to run the parts on, as tasks"] = None
    overwrite: Annotated[bool, WORK, "replace a corpus of the same prefix"] = False
    download: Annotated[bool, WORK, "allow downloads of files that are not in the hub's local cache"] = False

    def check(self) -> None:
        """Raise DetourError with all invalid values."""
        validate(self, _check)

    def shaping(self) -> dict[str, Any]:
        """Return the options that determine the corpus's bytes, as JSON types."""
        raw = {name: getattr(self, name) for name in SHAPING}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in raw.items()}


# The input is not among them: it is identified by its files. Nor is --exclude: by its sequences of words.
SHAPING = (
    *("text_key", "text_separator", "whole_files", "normalize", "min_chars", "max_chars", "language"),
    *("deduplicate", "similarity", "held_out"),
)


def _check(options: BuildOptions, faults: Faults) -> None:
    near, shares = options.deduplicate == "near", options.num_shards
    folder = _folder_fault(options.output_prefix)
    wrong = {  # key: (whether it is invalid, message)
        "output_prefix": (folder, folder),
        "input": (not options.input and not options.dataset, "set --input or --dataset"),
        "max_chars": (
            options.max_chars is not None and options.max_chars < options.min_chars,
            f"{options.max_chars} is below --min-chars, so no document is left",
        ),
        "similarity": (options.similarity != 0.8 and not near, "requires --deduplicate near"),
        "exclude_words": (options.exclude_words != EXCLUDE_WORDS and not options.exclude, "requires --exclude"),
        "lines": (options.whole_files and options.lines, "a .txt file is read with --whole-files or --lines, not both"),
        "dataset": (
            options.input and options.dataset,
            "cannot be combined with --input; build two corpora and merge them",
        ),
        "streaming": (options.streaming and not options.dataset, "requires --dataset"),
        "dataset_config": (options.dataset_config and not options.dataset, "requires --dataset"),
        "shard_index": (
            options.shard_index is not None and options.shard_index >= shares,
            f"{options.shard_index} is not below --num-shards {shares}",
        ),
        "num_shards": (
            shares > 1 and options.shard_index is None,
            "each process needs its --shard-index; omit both to join the shards",
        ),
        "engine_cluster": (
            options.engine_cluster and options.shard_index is not None,
            "cannot be combined with --num-shards: a cluster divides the work itself",
        ),
    }
    for key, (fault, remedy) in wrong.items():
        if fault:
            faults.add(key, remedy)


def check_prefix(prefix: str) -> None:
    """Raise DetourError for an invalid prefix."""
    if fault := _folder_fault(prefix):
        raise DetourError(f"--output-prefix: {fault}")


def _folder_fault(prefix: str) -> str | None:
    if Path(prefix).name and not prefix.endswith("/") and not Path(prefix).is_dir():
        return None
    return f"{prefix or '.'} is a folder; add the corpus's name, as in {prefix.rstrip('/') or '.'}/notes"
