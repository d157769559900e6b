"""Export a checkpoint as a Hugging Face folder with a model card, after comparing its logits with transformers'."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_detour.checkpoint import huggingface, store
from megatron_detour.checkpoint.huggingface import OPTIMIZER, RUN_STATE, Source, Weights
from megatron_detour.checkpoint.state import EMA
from megatron_detour.errors import DetourError
from megatron_detour.model.families import Family, read_shape
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.release import decoder, portable
from megatron_detour.release.average import Averaged, checkpoints_to_average, mixed_phases, take_average
from megatron_detour.release.card import Card, refuse_unknown_corpora
from megatron_detour.release.card_metadata import CardMetadata
from megatron_detour.release.checkpoint_info import CheckpointInfo
from megatron_detour.release.private import refuse_private
from megatron_detour.release.texts import read_texts
from megatron_detour.tokenizer.vocabulary import Vocabulary, load_vocabulary

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Exported:
    """The exported checkpoint, and the largest relative difference of its logits from transformers'."""

    checkpoint: Path
    run_state: dict[str, Any]
    difference: float
    warnings: list[str]
    averaged: Averaged | None


def export(
    checkpoint: str,
    output: str,
    dtype: str,
    *,
    as_decoder: bool = False,
    text: str | None = None,
    given: CardMetadata | None = None,
    evaluation: list[dict[str, Any]] | None = None,
    scored: Path | None = None,
    repository: str | None = None,
    average: str | None = None,
    validate: Callable[[Path], Callable[[LanguageModel], float] | None] | None = None,
) -> Exported:
    """Write the Hugging Face folder `output`, for a ModernBertDecoder if `as_decoder`.

    Logits are compared in fp32 on the weights as written, on random ids and on real text: the lines of the file `text`,
    or built-in ones. `evaluation` are rows for the card, scores of the model in the folder `scored`; `repository` is
    the id in the card's code. `average` are a number or names of checkpoints, or EMA, whose average is exported
    instead of the last one's weights; `validate` returns a loss, as a function of a model, for that checkpoint.
    Raises DetourError and writes nothing if logits differ or anything is missing.
    """
    target, given, texts = Path(output), given or CardMetadata(), read_texts(text)
    if os.path.lexists(target):
        raise DetourError(f"{target}: already exists; choose another --output or remove it")
    if average in (None, EMA):
        checkpoints = [_find(Path(checkpoint), needless=() if average else (OPTIMIZER,))]
    else:
        checkpoints = [_find(path) for path in checkpoints_to_average(Path(checkpoint), average)]
    folder = checkpoints[-1]
    facts = CheckpointInfo.read(folder)
    refuse_unknown_corpora(given, facts.corpora)
    source = Source(str(folder))
    config = source.config()
    vocabulary = load_vocabulary(folder)
    shape = read_shape(config, str(folder))
    if as_decoder and not shape.has_decoder:
        raise DetourError(f"--decoder: {shape.label} has no decoder's form in transformers; leave the option out")
    model = huggingface.load_model(source, shape)
    averaged = None
    if average:
        averaged = take_average(model, checkpoints, average, facts.config, validate and validate(folder))
    if scored:
        _refuse_other_weights(scored, shape, model.state_dict(), folder)
    rounded = {name: weight.to(DTYPES[dtype]) for name, weight in model.state_dict().items()}
    model.load_state_dict(rounded)
    written: list[Card] = []

    def write(aside: Path) -> None:
        _write_model(aside, config, shape, source, vocabulary, rounded, dtype, as_decoder)
        difference = huggingface.compare_with_transformers(aside, model, texts, causal=as_decoder)
        huggingface.refuse_difference(difference, str(folder))
        card = Card(
            facts=facts,
            given=given,
            shape=shape,
            parameters=sum(weight.numel() for weight in rounded.values()),
            folder=target.name,
            repository=repository,
            dtype=dtype,
            difference=difference,
            decoder=as_decoder,
            opens_in=decoder.opens_in(shape) if as_decoder else shape.opens_in,
            evaluation=evaluation,
            averaged=averaged,
        )
        (aside / "README.md").write_text(card.text(), encoding="utf-8")
        refuse_private(aside)
        written.append(card)

    store.publish(target, write)
    (card,) = written
    warnings = [*mixed_phases(checkpoints, facts.plan), *card.warnings()]
    if evaluation and not scored:
        warnings.append("the evaluated folder is missing or has changed: cannot verify the scores' model")
    warnings += decoder.release_warnings(shape) if as_decoder else shape.release_warnings()
    return Exported(folder, facts.state, card.difference, warnings, averaged)


def _refuse_other_weights(scored: Path, shape: Family, weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Raise DetourError unless `scored` has these weights, up to bf16 rounding."""
    with Weights(Source(str(scored)), type(shape)) as scored_weights:
        scored_weights.check(shape)
        for name, weight in weights.items():
            if not torch.equal(scored_weights(name).bfloat16(), weight.bfloat16()):
                raise DetourError(
                    f"--evaluation: the scores belong to {scored}, whose {name} differs from {checkpoint}; evaluate "
                    "this checkpoint, or select its model with --evaluation-model"
                )


def _write_model(
    aside: Path,
    config: dict[str, Any],
    shape: Family,
    source: Source,
    vocabulary: Vocabulary,
    weights: dict[str, torch.Tensor],
    dtype: str,
    as_decoder: bool,
) -> None:
    kind = str(DTYPES[dtype]).removeprefix("torch.")
    described = (decoder.decoder_config if as_decoder else portable.encoder_config)(config, shape, kind)
    weights = decoder.decoder_weights(weights) if as_decoder else weights
    huggingface.write_model(aside, config, source, vocabulary, weights, DTYPES[dtype])
    (aside / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    portable.make_tokenizer_portable(aside, shape)


def _find(path: Path, needless: Container[str] = (OPTIMIZER,)) -> Path:
    """Return `path` if it is a checkpoint, else the newest intact one of a run directory. Raises DetourError."""
    if not path.is_dir():
        raise DetourError(f"{path}: no such folder")
    if (path / RUN_STATE).is_file() or (path / store.LISTING).is_file():
        try:
            store.verify(path, needless)
        except store.Broken as fault:
            raise DetourError(f"{path}: damaged checkpoint: {fault}") from None
    if (path / RUN_STATE).is_file():
        return path
    newest = store.latest(path / "checkpoints", needless)
    if newest is None:
        raise DetourError(f"{path}: neither a checkpoint nor a run directory with one")
    return newest
