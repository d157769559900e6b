"""PREFIX.manifest.json describes a corpus: its sources, tokenizer, sizes, and the hashes of its two files.

It is written last: a corpus without a manifest is unfinished. Reading validates every value against its type, as
manifests are untrusted input.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict, get_type_hints

import msgspec

from megatron_detour.errors import DetourError
from megatron_detour.structured import read_json_object
from megatron_detour.tokenizer import MAX_VOCABULARY

MANIFEST_FORMAT = 2
SHOWN_SOURCES = 5
SHOWN_CHARACTERS = 120  # of a fault, which may quote the file

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Some = Annotated[int, msgspec.Meta(ge=1, lt=1 << 62)]
Id = Annotated[int, msgspec.Meta(ge=0, lt=MAX_VOCABULARY)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class FileFacts(TypedDict):
    bytes: Count
    sha256: Sha256
    sample: NotRequired[Sha256]  # of evenly spaced blocks (data/integrity.py)


class TokenizerFacts(TypedDict):
    """As returned by Vocabulary.to_dict()."""

    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_VOCABULARY)]
    special_ids: list[Id]
    mask: Id | None
    pad: Id | None
    cls: Id | None
    sep: Id | None
    unk: Id | None
    sha256: Sha256


class Source(TypedDict):
    path: str
    bytes: Count
    state: NotRequired[str]  # size and modification time
    sha256: NotRequired[Sha256]  # of a corpus that was merged into this one


class EngineFacts(TypedDict):
    """Which engine produced the ids, and why others were skipped."""

    name: str
    version: str
    judged: NotRequired[Count]
    passed_over: NotRequired[dict[str, str]]


class Options(TypedDict, total=False):
    """Options of the build that affect the corpus's bytes; only those that other modules read are listed."""

    language: list[str]
    normalize: str | None
    deduplicate: str | None
    min_chars: Count
    max_chars: Count | None
    held_out: float


@dataclass(frozen=True)
class Manifest:
    documents: Some
    tokens: Some
    tokenizer: TokenizerFacts
    files: Annotated[dict[Literal["bin", "idx"], FileFacts], msgspec.Meta(min_length=2)]
    records: Count = 0  # of the input: documents + held_out + empty + rejects + removed
    empty: Count = 0  # records without text
    rejects: Count = 0  # invalid records, listed in PREFIX.rejects.jsonl
    removed: dict[str, Count] = field(default_factory=dict)  # by reason: short, long, language, excluded, duplicate
    unknown: Count = 0  # [UNK] tokens, before duplicates and held-out documents were removed
    held_out: Count = 0  # documents of PREFIX.heldout
    sources: list[Source] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)  # files of the input folders with an unsupported extension
    engine: EngineFacts = field(default_factory=lambda: EngineFacts(name="unknown", version=""))
    options: Options = field(default_factory=lambda: Options())
    versions: dict[str, str] = field(default_factory=dict)  # of packages that affect ids and cleaning
    plan: str = ""  # SHA-256 over input, options, tokenizer and engine
    created: str = ""
    version: str = ""
    format: Literal[2] = MANIFEST_FORMAT

    def input_summary(self) -> dict[str, Any]:
        """Return number and total size of the source files, and the first of them: there may be 100,000."""
        some = [{"path": source["path"], "bytes": source["bytes"]} for source in self.sources[:SHOWN_SOURCES]]
        return {
            "sources": some,
            "source_files": len(self.sources),
            "source_bytes": sum(s["bytes"] for s in self.sources),
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def held_out_prefix(prefix: str | Path) -> str:
    """Return the prefix of the corpus that is held out of another."""
    return f"{prefix}.heldout"


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def read_manifest(prefix: str | Path) -> Manifest:
    """Read a corpus's manifest and check it and the sizes of its files. Raises DetourError."""
    path = manifest_path(prefix)
    try:
        raw = read_json_object(path)
    except FileNotFoundError:
        whole = str(prefix).removesuffix(held_out_prefix(""))
        held_out = " --held-out 0.01" if whole != str(prefix) else ""
        raise DetourError(
            f"{path}: no such corpus; build it with megatron-detour preprocess --output-prefix {whole}{held_out}"
        ) from None
    if raw.get("format") != MANIFEST_FORMAT:
        raise DetourError(f"{path}: not a corpus manifest of format {MANIFEST_FORMAT}; rebuild the corpus")
    faults = list(_faults(raw))
    if faults:
        raise DetourError(f"{path}: {'; '.join(faults)}; copy or rebuild the corpus")
    manifest = Manifest(**raw)
    for kind, facts in manifest.files.items():
        _check_size(Path(f"{prefix}.{kind}"), facts["bytes"])
    return manifest


def _faults(raw: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with a manifest."""
    kinds = get_type_hints(Manifest, include_extras=True)
    if unknown := sorted(raw.keys() - kinds.keys()):
        yield f"unknown keys: {', '.join(unknown)[:SHOWN_CHARACTERS]}"
    if missing := sorted({"documents", "tokens", "tokenizer", "files"} - raw.keys()):
        yield f"missing keys: {', '.join(missing)}"
    wrong = [f"{name}: {fault}" for name in kinds if name in raw and (fault := _fault(raw[name], kinds[name], name))]
    yield from wrong
    tokenizer = raw.get("tokenizer")
    if not wrong and tokenizer:
        roles = (tokenizer[role] for role in ("mask", "pad", "cls", "sep", "unk"))
        if any(number is not None and number >= tokenizer["size"] for number in (*tokenizer["special_ids"], *roles)):
            yield "tokenizer: a special id is not below size"


def _fault(value: Any, kind: Any, name: str) -> str | None:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        return str(error).replace("`$", f"`{name}")[:SHOWN_CHARACTERS]
    return None


def _check_size(file: Path, expected: int) -> None:
    actual = file.stat().st_size if file.exists() else None
    if actual != expected:
        state = "missing" if actual is None else f"{actual:,} bytes instead of {expected:,}"
        raise DetourError(f"{file}: {state}; rebuild the corpus with --overwrite")
