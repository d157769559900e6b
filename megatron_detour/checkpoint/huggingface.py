"""Read and write Hugging Face folders (config.json, safetensors, tokenizer files), and a run's state beside them."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_detour.checkpoint.pickled import read_pickle
from megatron_detour.checkpoint.source import PICKLES, WEIGHTS, Source, StoredWeights
from megatron_detour.checkpoint.state import TrainingState
from megatron_detour.checkpoint.store import RUN_STATE, TOKENIZER
from megatron_detour.errors import DetourError, brief
from megatron_detour.model.families import Family, family_of, family_to_initialize, read_shape
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.parallel.state import ParallelState
from megatron_detour.structured import read_json_object
from megatron_detour.tokenizer.vocabulary import CONFIG as TOKENIZER_CONFIG
from megatron_detour.tokenizer.vocabulary import Vocabulary, find_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

OPTIMIZER = "optimizer.safetensors"
NEW_HEAD = "new_head"  # key of run_state.json: the start model had no prediction head
STEP = "step"  # key prefix of the step counts, stored beside the optimizer's states
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json")
TOLERANCE = 1e-4  # largest difference of fp32 logits, relative to the largest logit
COMPARED_TOKENS, COMPARED_TOGETHER = 1024, 5  # tokens per text and texts per padded batch: logits are large
# Keys of tokenizer_config.json and special_tokens_map.json that affect ids or their use; paths and code are left out.
TOKENIZER_KEYS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    "additional_special_tokens",
    *("add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "clean_up_tokenization_spaces"),
    *("do_lower_case", "errors", "extra_special_tokens", "keep_accents", "legacy", "model_input_names"),
    *("model_max_length", "padding_side", "split_special_tokens", "strip_accents", "tokenize_chinese_chars"),
    *("tokenizer_class", "trim_offsets", "truncation_side"),
)


class Weights:
    """Reads tensors by name from a model's files, one at a time. Use as a context manager.

    `family` says how other forms of its checkpoints name weights.
    """

    def __init__(self, source: Source, family: type[Family] | None = None) -> None:
        self.source = source
        self._stack = ExitStack()
        self._stored = StoredWeights.from_source(source, family)

    def __enter__(self) -> Weights:
        self._read: dict[Path, Callable[[str], torch.Tensor]] = {}
        for path in {path for parts in self._stored.where.values() for path, _ in parts}:
            if path.suffix in PICKLES:
                self._read[path] = read_pickle(path).__getitem__
                continue
            try:
                self._read[path] = self._stack.enter_context(safe_open(path, "pt")).get_tensor
            except SafetensorError as error:
                raise DetourError(f"{path}: not a safetensors file: {error}") from None
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def __call__(self, name: str) -> torch.Tensor:
        """Return the tensor in fp32."""
        parts = [self._read[path](stored).to(torch.float32) for path, stored in self._stored.where[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def check(self, shape: Family, from_start: bool = False) -> set[str]:
        """Return the names of missing parameters, as StoredWeights.check does. Raise DetourError as it does."""
        return self._stored.check(shape, self.source.name, from_start)


def fresh_config(overrides: dict[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the config.json of a new model: transformers' defaults, the tokenizer's ids, and the run file's keys.

    Raise DetourError when transformers rejects a value.
    """
    config_class, _ = family_to_initialize(overrides).transformers_classes()
    ids = {"vocab_size": vocabulary.size, **special_ids(vocabulary)}
    try:
        given = {key: value for key, value in overrides.items() if key != "model_type"}  # the class has it
        return config_class(**ids | given).to_dict()
    except Exception as error:  # transformers' validators raise their own types
        raise DetourError(f"model.config: {brief(error)}") from None


def special_ids(vocabulary: Vocabulary) -> dict[str, int | None]:
    """Return a tokenizer's special ids under their keys of config.json."""
    roles = {"pad": "pad", "cls": "cls", "sep": "sep", "bos": "cls", "eos": "sep", "mask": "mask"}
    return {f"{key}_token_id": getattr(vocabulary, role) for key, role in roles.items()}


def known_config_keys(family: type[Family]) -> list[str]:
    """Return a family's keys of config.json. Others are dropped, such as auto_map, which makes users run its code."""
    return [*family.transformers_classes()[0]().to_dict(), *family.old_keys]


def write_model(
    folder: Path,
    config: dict[str, Any],
    tokenizer: Source,
    vocabulary: Vocabulary,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json (known keys only), model.safetensors and tokenizer files. `weights` are full tensors."""
    family = family_of(config, str(folder))
    kept = {*known_config_keys(family)} - {"dtype", "_name_or_path", "transformers_version"}
    described = {key: value for key, value in config.items() if key in kept}
    described |= {"architectures": [family.architecture()], "dtype": str(dtype).removeprefix("torch.")}
    _write_json(folder / "config.json", described)
    save_weights(weights, folder, dtype)
    copy_tokenizer(tokenizer, vocabulary, folder, read_shape(config, str(folder)).tokenizer_outputs)


def save_weights(weights: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype) -> None:
    save_tensors({name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)


def copy_tokenizer(source: Source, vocabulary: Vocabulary, folder: Path, outputs: Sequence[str]) -> None:
    """Copy tokenizer.json and the known keys of its other files, which name all special tokens.

    Truncation and padding are left out: they would cut texts at the length of another use. `outputs` are what the
    tokenizer gives the model, where the source has no tokenizer_config.json.
    """
    file = find_tokenizer(source.name, source.download)
    content = read_json_object(file) if file.suffix == ".json" else {}
    if content and not content.get("truncation") and not content.get("padding"):
        shutil.copyfile(file, folder / TOKENIZER)
    else:
        load_tokenizer(file).save(str(folder / TOKENIZER))
    named = vocabulary.names(load_tokenizer(folder / TOKENIZER))
    inputs = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": [*outputs]}
    for name in TOKENIZER_FILES[1:]:
        given = not Path(source.name).is_file() and source.has(name)
        content = read_json_object(source.file(name)) if given else {}
        kept = {key: value for key, value in content.items() if key in TOKENIZER_KEYS}
        _write_json(folder / name, named | (inputs if name == TOKENIZER_CONFIG and not given else {}) | kept)


def write_checkpoint(folder: Path, training: TrainingState, run_state: dict[str, Any]) -> None:
    """Write the state of the optimizer and of the run beside a model's files."""
    updated = training.steps
    flat = {f"{state}.{name}": by_name[name] for state, by_name in training.states.items() for name in updated}
    flat |= {f"{STEP}.{name}": torch.tensor(steps) for name, steps in updated.items()}
    save_tensors(flat, folder / OPTIMIZER)
    _write_json(folder / RUN_STATE, run_state)


def read_run_state(folder: Path) -> dict[str, Any]:
    return read_json_object(folder / RUN_STATE)


def open_optimizer(
    folder: Path, states: tuple[str, ...], stack: ExitStack
) -> tuple[Callable[[str, str], torch.Tensor], dict[str, int]]:
    """Return a reader of `states` by state and parameter name, open as long as `stack`, and step counts by name.

    Raise DetourError if the file is missing, damaged or holds other states.
    """
    path = folder / OPTIMIZER
    try:
        opened = stack.enter_context(safe_open(path, "pt"))
    except (SafetensorError, OSError):
        raise DetourError(f"{path}: missing or not a safetensors file; restore it") from None
    keys = [key.partition(".")[::2] for key in opened.keys()]  # noqa: SIM118 not a mapping
    saved = {state for state, _ in keys} - {STEP}
    if keys and saved != {*states}:
        raise DetourError(
            f"{path}: another optimizer's, which keeps {', '.join(sorted(saved))} and not {', '.join(states)}; set "
            f"optimizer.name as it was, or start in another folder=... with model.start={folder}"
        )
    steps = {name: int(opened.get_tensor(f"{STEP}.{name}")) for state, name in keys if state == STEP}
    return lambda state, name: opened.get_tensor(f"{state}.{name}"), steps


@torch.no_grad()
def compare_with_transformers(
    name: str | Path,
    model: LanguageModel,
    texts: tuple[str, ...] = (),
    causal: bool = False,
    headless: bool = False,
    as_read: bool = False,
) -> float:
    """Return the largest difference between our fp32 logits and transformers', relative to the largest logit.

    Inputs are random ids, shorter and longer than the local window so that every kind of layer is exercised, and
    `texts` tokenized by the folder `name`, each alone and in padded batches. A largest logit below 1 counts as 1.
    `causal`: the folder holds a ModernBertDecoder. `headless`: it holds no prediction head, and hidden states are
    compared. `as_read`: weights under names that transformers does not know are compared as `model` has them. Raise
    DetourError for such names otherwise, or if transformers' tokenizer produces other ids than tokenizer.json.
    """
    ours, source = model.hidden if headless else model.logits, Source(str(name))
    theirs = None if as_read and source.is_composers else _opened_by_transformers(source, model, causal, headless)
    if theirs is None and not as_read:
        raise DetourError(f"{name}: transformers does not know the names of the weights")
    if theirs is None:
        logger.info("%s: transformers does not know the names of the weights; it computes with them as read here", name)
        theirs, causal = _given_to_transformers(source, model, headless), False
    generator = torch.Generator().manual_seed(0)
    sizes = _compared_lengths(model.shape)
    batches = [[torch.randint(model.shape.vocabulary, (size,), generator=generator)] for size in sizes]
    if (pad := theirs.config.pad_token_id) is not None:  # RoBERTa gives padding tokens no position of their own
        for (ids,) in batches:
            ids[ids == pad] = (pad + 1) % model.shape.vocabulary
    if texts:
        documents = _token_ids(Path(name), texts, min(model.shape.max_positions, COMPARED_TOKENS))
        batches += [[ids] for ids in documents]
        batches += [documents[i : i + COMPARED_TOGETHER] for i in range(0, len(documents), COMPARED_TOGETHER)]
    worst = 0.0
    for batch in batches:
        lengths = [len(ids) for ids in batch]
        inputs = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)  # any id will do: the mask hides it
        mask = torch.arange(inputs.shape[1]) < torch.tensor(lengths)[:, None]
        references = theirs(input_ids=inputs, attention_mask=mask.long())[0]
        for ids, length, reference in zip(batch, lengths, references, strict=True):
            found = ours(ids, torch.arange(length), (length,), causal)
            worst = max(worst, _relative_difference(found, reference[:length]))
    return worst


def _compared_lengths(shape: Family) -> set[int]:
    """Return lengths on either side of the local window; without local layers any will do, and logits are large."""
    longest = min(4 * shape.window + 7 if shape.window else COMPARED_TOKENS, shape.max_positions)
    return {2, (shape.window or longest) // 2 + 1, longest}


def _opened_by_transformers(
    source: Source, model: LanguageModel, causal: bool, headless: bool
) -> torch.nn.Module | None:
    """Return transformers' model of a folder, or None if it does not find all the weights that `model` has."""
    import transformers

    logging, kind = transformers.utils.logging, model.shape.transformers_classes()[1]
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel if headless else kind
    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a table of the weights that it does not find
    try:
        theirs, found = kind.from_pretrained(
            source.name, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    finally:
        logging.set_verbosity(level)
    names = {part for name in model.shape.sizes for part in (name, name.partition(".")[2])}  # AutoModel's are shorter
    return theirs.eval() if names.isdisjoint(found["missing_keys"]) else None


def _given_to_transformers(source: Source, model: LanguageModel, headless: bool) -> torch.nn.Module:
    """Return transformers' model of a folder's config.json with the weights of `model`."""
    config_class, kind = model.shape.transformers_classes()
    theirs = kind(config_class.from_dict(source.config() | model.shape.release_keys()))
    theirs.load_state_dict(dict(model.named_parameters()), strict=False)  # a tied output layer's is not given
    theirs.tie_weights()
    return (theirs.base_model if headless else theirs).eval()


def _token_ids(folder: Path, texts: tuple[str, ...], longest: int) -> list[torch.Tensor]:
    """Return each text's ids from a folder's tokenizer as transformers opens it, cut at `longest`."""
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder, local_files_only=True), load_tokenizer(folder)
    documents = []
    for text in texts:
        ids = theirs(text, verbose=False)["input_ids"]
        if ids != ours.encode(text).ids:
            raise DetourError(
                "transformers' tokenizer produces other ids than tokenizer.json, which built the corpus; remove the "
                "key of tokenizer_config.json that changes them, such as additional_special_tokens"
            )
        documents.append(torch.tensor(ids[:longest]))
    return documents


def _relative_difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    difference = float((reference - ours).abs().max() / reference.abs().max().clamp(min=1))
    return difference if math.isfinite(difference) else math.inf


def refuse_difference(difference: float, what: str) -> None:
    """Raise DetourError when the logits of `what` differ from transformers' by more than TOLERANCE."""
    if not difference <= TOLERANCE:
        raise DetourError(
            f"{what}: logits differ from transformers' by {difference:.1e} of the largest logit, more than "
            f"{TOLERANCE:.0e}: refusing to use this model"
        )


def load_model(source: Source, shape: Family, from_start: bool = False) -> LanguageModel:
    """Load the full fp32 model of a folder, for checks in one process; `from_start`, with a new head if it has none."""
    model = shape.build(ParallelState())
    with Weights(source, type(shape)) as weights:
        missing = weights.check(shape, from_start)
        model.load_state_dict(
            {name: model.initial_weight(name, 0) if name in missing else weights(name) for name in shape.sizes}
        )
    return model.eval()


def save_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file. Raise OSError for a full disk, DetourError for tensors that cannot be stored."""
    path.touch()  # gets the usual permissions: safetensors creates files that only their owner can read
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number:  # a full or temporarily unavailable disk
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        raise DetourError(f"{path}: cannot write: {error}") from None
    path.chmod(mode)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
