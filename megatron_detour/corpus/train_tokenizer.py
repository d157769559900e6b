"""Training of a byte-level BPE tokenizer with ModernBERT's special tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_detour.corpus.documents import read_documents
from megatron_detour.corpus.sources import find_inputs
from megatron_detour.errors import DetourError
from megatron_detour.files import aside_of, remove_abandoned

SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}
MODEL_MAX_LENGTH = 8192
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(inputs: Sequence[Path], output: Path, vocab_size: int, text_key: str = "text") -> None:
    """Train on all documents of `inputs` and write the folder `output` for transformers' AutoTokenizer.

    The vocabulary has exactly `vocab_size` entries, special tokens first. The result is deterministic. Raises
    DetourError for invalid input, a non-empty `output`, and texts too short to fill the vocabulary.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DetourError(
            f"--vocab-size {vocab_size}: must be at least {SMALLEST_VOCABULARY}, for bytes and special tokens"
        )
    refuse_used(output)
    tokenizer = _train(inputs, vocab_size, text_key)
    reached = tokenizer.get_vocab_size()
    if reached != vocab_size:
        raise DetourError(
            f"the text fills only {reached} of {vocab_size} entries; add text or set --vocab-size to {reached} or less"
        )
    publish(
        tokenizer,
        output,
        {"tokenizer_config.json": _config(tokenizer), "special_tokens_map.json": _special_tokens_map()},
    )


def refuse_used(output: Path) -> None:
    """Raise DetourError unless `output` is new or an empty folder."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists():
        raise DetourError(f"{output}: exists and is not an empty folder; choose another --output or delete it")


def _documents(inputs: Sequence[Path], text_key: str, faults: list[DetourError]) -> Iterator[str]:
    """Yield all documents; an error ends the stream and is stored, as the trainer may wrap what its iterator raises."""
    try:
        for name in find_inputs([str(path) for path in inputs])[0]:
            yield from read_documents(Path(name), text_key)
    except DetourError as fault:
        faults.append(fault)


def _train(inputs: Sequence[Path], vocab_size: int, text_key: str) -> Tokenizer:
    tokenizer = _untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_added_tokens(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    faults: list[DetourError] = []
    tokenizer.train_from_iterator(_documents(inputs, text_key, faults), trainer)
    if faults:
        raise faults[0]
    # requires the ids
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:0 [SEP]:0",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _untrained() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _added_tokens() -> list[AddedToken]:
    """Return the special tokens. [MASK] absorbs the space before it, as the token it replaces includes that space."""
    return [
        AddedToken(token, lstrip=token == "[MASK]", rstrip=False, normalized=False, special=True)
        for token in SPECIAL_TOKENS.values()
    ]


def publish(tokenizer: Tokenizer, output: Path, files: dict[str, dict[str, object]]) -> None:
    """Write tokenizer.json and JSON `files` into a temporary folder and rename it: `output` is never incomplete."""
    remove_abandoned(output)
    part = aside_of(output, "writing")
    try:
        part.mkdir(parents=True)
        tokenizer.save(str(part / "tokenizer.json"))
        for name, content in files.items():
            _write_json(part / name, content)
        part.replace(output)
    except OSError as error:
        raise DetourError(f"{output}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _special_tokens_map() -> dict[str, object]:
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word")
    return {
        name: {field: getattr(token, field) for field in fields}
        for name, token in zip(SPECIAL_TOKENS, _added_tokens(), strict=True)
    }


def _config(tokenizer: Tokenizer) -> dict[str, object]:
    added = {
        str(tokenizer.token_to_id(token["content"])): token | {"special": True}
        for token in _special_tokens_map().values()
    }
    return {
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": False,
        **SPECIAL_TOKENS,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MODEL_MAX_LENGTH,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
