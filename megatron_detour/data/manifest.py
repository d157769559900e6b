"""What a corpus is: PREFIX.manifest.json says which text, which tokenizer, how much, and what the two files must be.

It is written last, so that a corpus without one is a corpus that was never finished."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError

FORMAT = 2


@dataclass(frozen=True)
class Manifest:
    documents: int
    tokens: int
    tokenizer: dict[str, Any]  # Vocabulary.to_dict()
    files: dict[str, dict[str, Any]]  # "bin" and "idx": bytes, sha256
    records: int = 0  # of the input: documents + held_out + empty + rejects + removed
    empty: int = 0  # without text
    rejects: int = 0  # that are no documents, listed in PREFIX.rejects.jsonl
    removed: dict[str, int] = field(default_factory=dict)  # by the options: short, long, language, duplicate
    unknown: int = 0  # tokens that are [UNK], before duplicates and the held-out share were taken out
    held_out: int = 0  # documents of PREFIX.heldout
    sources: list[dict[str, Any]] = field(default_factory=list)  # path, bytes, state (size and time of change)
    passed_over: list[str] = field(default_factory=list)  # files of the input folders that are of no known kind
    engine: dict[str, Any] = field(default_factory=dict)  # what made the ids, and why others did not
    options: dict[str, Any] = field(default_factory=dict)  # those that shape the corpus
    versions: dict[str, str] = field(default_factory=dict)  # of packages that decide on ids and cleaning
    plan: str = ""  # SHA-256 over input, options, tokenizer and engine
    created: str = ""
    version: str = ""
    format: int = FORMAT

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def manifest_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.manifest.json")


def read_manifest(prefix: str | Path) -> Manifest:
    """Reads a corpus's manifest and checks the sizes of its files. Raises DetourError."""
    path = manifest_path(prefix)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DetourError(
            f"{path}: there is no such corpus; build it with tools/preprocess_data.py --output-prefix {prefix}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise DetourError(f"{path}: not a JSON file; build the corpus again") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DetourError(f"{path}: not a corpus manifest of format {FORMAT}; build the corpus again")
    try:
        manifest = Manifest(**raw)
    except TypeError:
        raise DetourError(f"{path}: keys are missing or unknown; build the corpus again") from None
    for kind, facts in manifest.files.items():
        file = Path(f"{prefix}.{kind}")
        actual = file.stat().st_size if file.exists() else None
        if actual != facts["bytes"]:
            found = "is missing" if actual is None else f"has {actual:,} bytes"
            raise DetourError(
                f"{file}: {found} where the manifest says {facts['bytes']:,}; build the corpus again, with --overwrite"
            )
    return manifest
