"""A checkpoint becomes a model to release: weights, configuration, tokenizer, card; the logits are compared first."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_detour.checkpoint import huggingface, store
from megatron_detour.checkpoint.huggingface import OPTIMIZER, RUN_STATE, Source, Weights
from megatron_detour.errors import DetourError
from megatron_detour.model.shape import Shape
from megatron_detour.release import decoder, portable
from megatron_detour.release.card import Card, refuse_unknown_corpora
from megatron_detour.release.card_metadata import CardMetadata
from megatron_detour.release.checkpoint_info import CheckpointInfo
from megatron_detour.release.private import refuse_private
from megatron_detour.release.texts import read_texts
from megatron_detour.tokenizer.vocabulary import Vocabulary, load_vocabulary

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Exported:
    """Which checkpoint was written, and the greatest difference of its logits to transformers', relative."""

    checkpoint: Path
    run_state: dict[str, Any]
    difference: float
    warnings: list[str]


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
) -> Exported:
    """Writes the Hugging Face folder `output`, of a ModernBertDecoder where `as_decoder`.

    Both sides compute in fp32 on the weights as written, on random ids and on real text: the lines of the file `text`,
    or some of our own. `evaluation` are rows for the card, of the model in the folder `scored`; `repository`
    is the name that its code uses. Raises DetourError, leaving nothing, when logits differ or anything is missing.
    """
    target, given, texts = Path(output), given or CardMetadata(), read_texts(text)
    if os.path.lexists(target):
        raise DetourError(f"{target}: is already there; choose another --output or remove it")
    folder = _find(Path(checkpoint))
    facts = CheckpointInfo.of(folder)
    refuse_unknown_corpora(given, facts.corpora)
    source = Source(str(folder))
    config = source.config()
    vocabulary = load_vocabulary(folder)
    shape = Shape.of(config, str(folder))
    model = huggingface.load_model(source, shape)
    if scored:
        _refuse_other_weights(scored, model.state_dict(), folder)
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
            first_version=(decoder if as_decoder else portable).first_version(shape),
            evaluation=evaluation,
        )
        (aside / "README.md").write_text(card.text(), encoding="utf-8")
        refuse_private(aside)
        written.append(card)

    store.publish(target, write)
    (card,) = written
    warnings = card.warnings()
    if evaluation and not scored:
        warnings.append("the evaluated folder is gone or has changed: whether the scores are this model's is open")
    if not as_decoder and portable.every_n_layers(shape) is None:
        warnings.append("transformers 4 cannot express the pattern of global and local layers: it opens in 5 only")
    if as_decoder and not decoder.turns_alike(shape):
        warnings.append("transformers 4's decoder has one rope theta where the model has two: it opens in 5 only")
    return Exported(folder, facts.state, card.difference, warnings)


def _refuse_other_weights(scored: Path, weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    """Raises DetourError unless `scored` has these weights, up to the rounding of an export."""
    with Weights(Source(str(scored))) as found:
        found.check({name: tuple(weight.shape) for name, weight in weights.items()})
        for name, weight in weights.items():
            if not torch.equal(found(name).bfloat16(), weight.bfloat16()):
                raise DetourError(
                    f"--evaluation: the scores are of {scored}, whose {name} is not that of {checkpoint}; evaluate "
                    "this checkpoint, or name the model that is meant with --evaluation-model"
                )


def _write_model(
    aside: Path,
    config: dict[str, Any],
    shape: Shape,
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


def _find(path: Path) -> Path:
    """A checkpoint: the folder itself, or the newest whole one of a run's folder. Raises DetourError."""
    if not path.is_dir():
        raise DetourError(f"{path}: there is no such folder")
    if (path / RUN_STATE).is_file() or (path / store.LISTING).is_file():
        try:
            store.verify(path, needless=(OPTIMIZER,))
        except store.Broken as fault:
            raise DetourError(f"{path}: not a whole checkpoint: {fault}") from None
    if (path / RUN_STATE).is_file():
        return path
    newest = store.latest(path / "checkpoints", needless=(OPTIMIZER,))
    if newest is None:
        raise DetourError(f"{path}: neither a checkpoint nor a run's folder with one")
    return newest
