"""Loading a tokenizer from a file, a folder or a hub id, and its properties that training needs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_detour.errors import DetourError, brief
from megatron_detour.structured import read_json_object
from megatron_detour.tokenizer import MAX_VOCABULARY, bert_vocabulary
from megatron_detour.tokenizer import sentencepiece_model as spm

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG = "tokenizer_config.json"
COMPANIONS = ("special_tokens_map.json", CONFIG)  # the latter counts where both name a token
PROBES = 1_000  # tokens to try in search of a text that yields a token
SPELLINGS = {  # by role, for a tokenizer that does not name its special tokens
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "unk": ("[UNK]", "<unk>"),
}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as training sees it: its size, its special ids and a fingerprint of everything that affects ids."""

    size: int  # the largest id plus one
    special_ids: tuple[int, ...]  # including unused ids below `size`
    mask: int | None
    pad: int | None
    cls: int | None
    sep: int | None
    unk: int | None
    sha256: str

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer, names: dict[str, str] | None = None) -> Vocabulary:
        """Create from a tokenizer. `names` are special tokens by role ("mask", ...), as its configuration names them.

        Raises DetourError for a tokenizer without tokens or with excessive ids.
        """
        ids = tokenizer.get_vocab(with_added_tokens=True)
        size = max(ids.values(), default=-1) + 1
        if not 0 < size <= MAX_VOCABULARY:
            fault = f"the id {size - 1:,} but only {len(ids):,} tokens" if size else "no tokens"
            raise DetourError(f"the tokenizer has {fault}; use one with ids from 0, without large gaps")
        added = tokenizer.get_added_tokens_decoder()
        roles = _roles(tokenizer, ids, names or {})
        special = {i for i, token in added.items() if token.special} | {i for i in roles.values() if i is not None}
        unused = np.ones(size, dtype=bool)
        unused[list(ids.values())] = False
        special |= set(np.flatnonzero(unused).tolist())
        return cls(size, tuple(sorted(special)), **roles, sha256=fingerprint(tokenizer))

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Vocabulary:
        return cls(**{**raw, "special_ids": tuple(raw["special_ids"])})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def names(self, tokenizer: Tokenizer) -> dict[str, str]:
        """Return the special tokens as a tokenizer_config.json names them: {"mask_token": ..., ...}."""
        ids = {role: getattr(self, role) for role in SPELLINGS}
        return {f"{role}_token": tokenizer.id_to_token(number) for role, number in ids.items() if number is not None}

    def special(self) -> np.ndarray:
        """Return bool [size]: true for ids that represent no text."""
        flags = np.zeros(self.size, dtype=bool)
        flags[list(self.special_ids)] = True
        return flags

    def ordinary(self) -> np.ndarray:
        """Return int32 [size - specials]: the ids that represent text, from which random replacements are drawn."""
        return np.flatnonzero(~self.special()).astype(np.int32)


def _roles(tokenizer: Tokenizer, ids: dict[str, int], names: dict[str, str]) -> dict[str, int | None]:
    """Return special ids by role: of `names`, else as the tokenizer uses them, else by the usual spellings."""
    roles = {role: next((ids[name] for name in usual if name in ids), None) for role, usual in SPELLINGS.items()}
    model = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_id", ids.get(model.get("unk_token")))
    if unknown is not None:
        roles["unk"] = unknown
    with suppress(DetourError):  # of a tokenizer without ordinary tokens
        before, after = special_ids_around(tokenizer)
        if before or after:
            roles |= {"cls": next(iter(before), None), "sep": next(reversed(after), None)}
    return roles | {role: ids[name] for role, name in names.items() if name in ids}


def special_ids_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special ids before and after a text. Raises DetourError for a tokenizer that encodes no text."""
    for text in _probes(tokenizer):
        with suppress(DetourError), library_faults("a text cannot be tokenized"):
            encoding = tokenizer.encode(text)
            inside = [number for number, special in enumerate(encoding.special_tokens_mask) if not special]
            if inside:
                return encoding.ids[: inside[0]], encoding.ids[inside[-1] + 1 :]
    raise DetourError("the tokenizer turns no text into tokens; check that its vocabulary has ordinary tokens")


def _probes(tokenizer: Tokenizer) -> Iterator[str]:
    """Yield texts, at least one of which should yield a token."""
    yield "a"
    special = tokenizer.get_added_tokens_decoder()
    ids = sorted(number for number in tokenizer.get_vocab().values() if number not in special)
    for number in ids[:PROBES]:
        with suppress(DetourError), library_faults("an id cannot be decoded"):
            yield tokenizer.decode([number])


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 of everything that affects ids; truncation, padding and the notation of merges do not."""
    whole = json.loads(tokenizer.to_str())
    for key in ("version", "truncation", "padding"):
        whole.pop(key, None)
    model = whole["model"]
    if "merges" in model:
        model["merges"] = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def find_tokenizer(name: str | Path, download: bool = False) -> Path:
    """Return the tokenizer.json, SentencePiece model or vocab.txt of a file, a folder or a hub id.

    Raises DetourError.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        for file in ("tokenizer.json", bert_vocabulary.FILE):
            if (path / file).is_file():
                return path / file
        raise DetourError(f"{path}: no tokenizer.json in this folder; save a fast tokenizer into it with transformers")
    return hub_file(str(name), "tokenizer.json", download, "tokenizer")


@contextmanager
def library_faults(what: str, kind: type[DetourError] = DetourError) -> Iterator[None]:
    """Turn what the tokenizers library raises into a DetourError: Exceptions, and panics, which are none."""
    try:
        yield
    except DetourError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: {brief(error)}") from None


def load_tokenizer(name: str | Path, download: bool = False) -> Tokenizer:
    """Load a tokenizer without truncation and padding. Raises DetourError."""
    from tokenizers import Tokenizer

    path = find_tokenizer(name, download)
    if path.suffix in spm.SUFFIXES:
        return spm.to_tokenizer(path)
    if path.suffix == bert_vocabulary.SUFFIX:
        files = companions(path)
        config = files.get(path.with_name(CONFIG), {})
        with library_faults(f"{path}: not BERT's vocab.txt"):
            return bert_vocabulary.to_tokenizer(path, config, special_tokens(files))
    with library_faults(f"{path}: not a tokenizer.json"):
        tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def load_vocabulary(name: str | Path, download: bool = False) -> Vocabulary:
    """Load the vocabulary of a tokenizer, whose companions name the special tokens. Raises DetourError."""
    path = find_tokenizer(name, download)
    names = spm.special_tokens(path) if path.suffix in spm.SUFFIXES else {}
    if path.suffix == ".json":
        read_json_object(path)  # refuses duplicate keys, of which the library silently uses the last
    names |= special_tokens(companions(name, download))
    try:
        return Vocabulary.from_tokenizer(load_tokenizer(path), names)
    except DetourError as fault:
        raise fault if str(path) in str(fault) else DetourError(f"{path}: {fault}") from None


def companions(name: str | Path, download: bool = False) -> dict[Path, dict[str, Any]]:
    """Return the content of the JSON files beside a tokenizer, all of them optional. Raises DetourError."""
    path, found = Path(name), {}
    for file in COMPANIONS:
        if path.exists():
            beside = (path if path.is_dir() else path.parent) / file
        else:
            try:
                beside = hub_file(str(name), file, download, "tokenizer")
            except DetourError:
                continue
        if beside.is_file():
            found[beside] = read_json_object(beside)
    return found


def special_tokens(files: dict[Path, dict[str, Any]]) -> dict[str, str]:
    """Return the special tokens that a tokenizer's companions name, by role. Raises DetourError."""
    names = {}
    for (file, content), role in product(files.items(), SPELLINGS):
        token = content.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise DetourError(f"{file}: {role}_token must be a string or an object with a string as content")
        names |= {} if token is None else {role: token}
    return names


def hub_file(name: str, file: str, download: bool, what: str) -> Path:
    """Return a file of a hub repository, from the local cache unless `download`. Raises DetourError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(name, file, local_files_only=not download))
    except HFValidationError:
        raise DetourError(f"{name}: no such {what} file or folder") from None
    except Exception as error:
        if download:
            raise DetourError(f"{name}: cannot download {file} from the hub: {error}") from None
        raise DetourError(
            f"{name}: no such {what} folder, and {file} is not in the hub's local cache; set a folder, or allow the "
            "download (model.download=true in a run file, --download for a command)"
        ) from None
