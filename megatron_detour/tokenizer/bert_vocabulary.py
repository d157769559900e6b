"""BERT's vocab.txt, a WordPiece a line, as the tokenizer that transformers makes of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_detour.errors import DetourError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE, SUFFIX = "vocab.txt", ".txt"
CAPITAL = re.compile("[A-Z]")
CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")  # that read the file alike


def to_tokenizer(path: Path, config: dict[str, Any], names: dict[str, str]) -> Tokenizer:
    """Return the tokenizer of a vocab.txt, by its tokenizer_config.json and the special tokens that are named, by role.

    Raises DetourError for the file of another tokenizer, and if only the config could say whether case matters.
    """
    from tokenizers import BertWordPieceTokenizer, Tokenizer

    kind = config.get("tokenizer_class") or CLASSES[0]
    if kind.removesuffix("Fast") not in CLASSES:
        raise DetourError(
            f"{path}: the vocabulary of a {kind}; open it with transformers, save_pretrained it and use that folder"
        )
    tokens = {role: names.get(role, f"[{role.upper()}]") for role in ("unk", "cls", "sep", "pad", "mask")}
    pieces = {*path.read_text(encoding="utf-8").splitlines()} - {*tokens.values()}
    if "do_lower_case" not in config and any(CAPITAL.search(piece) for piece in pieces):
        raise DetourError(
            f"{path}: has capital letters, but no tokenizer_config.json beside it says whether text is put in lower "
            'case; write one with {"do_lower_case": false} or true'
        )
    made = BertWordPieceTokenizer(
        str(path),
        **{f"{role}_token": token for role, token in tokens.items()},
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    return Tokenizer.from_str(made.to_str())
