"""What a build is told: each field is a flag of megatron-detour preprocess."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_detour.corpus.engines import ENGINES
from megatron_detour.corpus.sources import KINDS
from megatron_detour.errors import DetourError


def _flag(default: Any, help: str, **arguments: Any) -> Any:
    return field(default=default, metadata={"help": help, **arguments})


@dataclass(frozen=True)
class BuildOptions:
    output_prefix: str = _flag("", "the corpus to write: P.bin, P.idx, P.manifest.json", metavar="P", required=True)
    tokenizer: str = _flag("", "a folder, a tokenizer.json, a SentencePiece model or a hub id", required=True)
    input: tuple[str, ...] = _flag((), f"files ({', '.join(KINDS)}), folders, globs, saved datasets", metavar="FILE")
    dataset: str | None = _flag(None, "a dataset of the Hugging Face hub, or a folder that load_dataset opens")
    dataset_config: str | None = _flag(None, "its configuration")
    split: str = _flag("train", "the split of a dataset (train)")
    streaming: bool = _flag(False, "read the dataset from the network while the build goes on, without a copy")
    text_key: tuple[str, ...] = _flag(("text",), "key of the text (text), a.b for b inside a; several are joined")
    text_separator: str = _flag("\n", "what stands between the texts of several keys (a line end)")
    whole_files: bool = _flag(False, "each .txt file is one document; several such files need this or --lines")
    lines: bool = _flag(False, "each line of a .txt file is one document")
    engine: str = _flag("auto", "the tokenising engine", choices=("auto", *ENGINES))
    workers: int = _flag(1, "processes (1)", metavar="N")
    max_rejects: int = _flag(
        0, "go on with up to N records that are no document, listed in P.rejects.jsonl (0)", metavar="N"
    )
    normalize: str | None = _flag(None, "Unicode normal form to bring texts to", choices=("NFC", "NFKC", "NFD", "NFKD"))
    min_chars: int = _flag(0, "leave out documents of fewer characters (0)", metavar="N")
    max_chars: int | None = _flag(None, "leave out documents of more characters", metavar="N")
    language: tuple[str, ...] = _flag(
        (), "keep documents in these languages only, as en fr (py3langid)", metavar="CODE"
    )
    deduplicate: str | None = _flag(
        None, "keep the first of equal, or of similar, documents", choices=("exact", "near")
    )
    similarity: float = _flag(0.8, "share of common word 5-grams from which documents are similar (0.8)", metavar="S")
    held_out: float = _flag(
        0.0, "share of documents, by hash of the text, that go to P.heldout instead (0)", metavar="S"
    )
    num_shards: int = _flag(1, "processes that share the build, each with its --shard-index (1)", metavar="K")
    shard_index: int | None = _flag(
        None, "do this share of the build only; a last run without it joins them", metavar="I"
    )
    engine_cluster: str | None = _flag(None, "run the parts as tasks of a cluster", choices=("ray",))
    overwrite: bool = _flag(False, "replace a corpus of the same prefix")
    download: bool = _flag(False, "allow the network: fetch what is not in the hub's local cache")

    def check(self) -> None:
        """Raises DetourError for a value that cannot be."""
        if not self.input and not self.dataset:
            raise DetourError("--input or --dataset: a build needs one of them")
        check_prefix(self.output_prefix)
        for name, least in (("workers", 1), ("max_rejects", 0), ("min_chars", 0), ("num_shards", 1)):
            if getattr(self, name) < least:
                raise DetourError(f"{flag(name)}: at least {least} is needed, it is {getattr(self, name)}")
        if self.max_chars is not None and self.max_chars < max(self.min_chars, 1):
            raise DetourError(f"--max-chars: {self.max_chars} leaves out every document")
        if not 0 <= self.held_out < 1:
            raise DetourError(f"--held-out: a share from 0 to below 1 is needed, it is {self.held_out}")
        if not 0 < self.similarity <= 1:
            raise DetourError(f"--similarity: a share above 0 and at most 1 is needed, it is {self.similarity}")
        if self.similarity != 0.8 and self.deduplicate != "near":
            raise DetourError("--similarity: it is for --deduplicate near only")
        if self.whole_files and self.lines:
            raise DetourError("--whole-files and --lines: a .txt file is read in one of the two ways; give one")
        if self.input and self.dataset:
            raise DetourError("--dataset: it does not go with --input; build two corpora and merge them")
        if (self.streaming or self.dataset_config) and not self.dataset:
            raise DetourError("--streaming and --dataset-config: they are for --dataset only")
        if self.shard_index is not None and not 0 <= self.shard_index < self.num_shards:
            raise DetourError(f"--shard-index: {self.shard_index} is not below --num-shards {self.num_shards}")
        if self.num_shards > 1 and self.shard_index is None:
            raise DetourError("--num-shards: each process needs its --shard-index; to join them, leave both out")
        if self.engine_cluster and self.shard_index is not None:
            raise DetourError("--engine-cluster: a cluster shares out the work itself, leave --num-shards out")

    def that_shape_the_corpus(self) -> dict[str, Any]:
        """The options that decide on the bytes, in JSON's types; the others only on how they are made."""
        raw = dataclasses.asdict(self)
        return {name: list(raw[name]) if isinstance(raw[name], tuple) else raw[name] for name in SHAPING}


# The input itself is told by its files.
SHAPING = (
    *("text_key", "text_separator", "whole_files", "normalize", "min_chars", "max_chars", "language"),
    *("deduplicate", "similarity", "held_out"),
)


def check_prefix(prefix: str) -> None:
    """Raises DetourError for what cannot be the beginning of file names."""
    if not Path(prefix).name or prefix.endswith("/") or Path(prefix).is_dir():
        named = f"{prefix.rstrip('/') or '.'}/notes"
        raise DetourError(f"--output-prefix {prefix}: that is a folder; name the corpus in it, too, as {named}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Gives a parser the flags of BuildOptions."""
    for option in dataclasses.fields(BuildOptions):
        arguments = dict(option.metadata)
        if isinstance(option.default, bool):
            arguments["action"] = "store_true"
        elif isinstance(option.default, tuple):
            arguments |= {"nargs": "+", "default": option.default}
        else:
            kinds = {int: int, float: float}
            declared = int if option.name in ("max_chars", "shard_index") else str
            arguments |= {"default": option.default, "type": kinds.get(type(option.default), declared)}
        parser.add_argument(flag(option.name), **arguments)


def options_of(arguments: argparse.Namespace) -> BuildOptions:
    """BuildOptions from parsed flags."""
    values = {option.name: getattr(arguments, option.name) for option in dataclasses.fields(BuildOptions)}
    return BuildOptions(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
