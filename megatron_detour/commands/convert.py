"""`megatron-detour convert`: export a checkpoint as a Hugging Face folder with a model card, after comparing its logits
with those of transformers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_detour import log
from megatron_detour.errors import DetourError
from megatron_detour.model.language_model import LanguageModel
from megatron_detour.release import hub
from megatron_detour.release.card_metadata import CardMetadata, read_card_metadata
from megatron_detour.release.export import DTYPES, export
from megatron_detour.settings import flag, validate
from megatron_detour.text import visible
from megatron_detour.training.validation import held_out_loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run directory (its newest checkpoint)")
    add("--output", required=True, metavar="DIR", help="folder to create")
    add("--dtype", choices=sorted(DTYPES), default="bf16", help="dtype of the weights (bf16)")
    add("--decoder", action="store_true", help="export as ModernBertDecoderForCausalLM (checkpoints of a causal phase)")
    add(
        "--average",
        metavar="WHICH",
        help="export an average of a run's weights: N, the last N checkpoints of the last phase; names of checkpoints, "
        "by commas; ema",
    )
    add("--text", metavar="FILE", help="compare logits on the lines of this file (default: a few built-in texts)")
    card = parser.add_argument_group("model card")
    add = card.add_argument
    add("--name", help="name of the model (that of the output folder)")
    add("--language", nargs="+", default=[], metavar="CODE", help="languages of the model, ISO 639, such as: en fr")
    add("--license", "--licence", help="license of the weights, such as apache-2.0 or cc-by-4.0")
    add("--base-model", metavar="OWNER/NAME", help="hub id of the initial model, if the run used a local folder")
    add("--domain", metavar="NAME", help="domain of the texts, such as medical; adds its caveats to the card")
    add(
        "--card-facts",
        metavar="FILE",
        help="YAML with these and more, such as licenses of corpora (docs/release.md)",
    )
    add("--evaluation", metavar="DIR", help="add the scores of megatron-detour evaluate --output DIR")
    add(
        "--evaluation-model",
        metavar="NAME",
        help="the model's name in that evaluation (--name, or the output folder's)",
    )
    upload = parser.add_argument_group("upload (nothing else uses the network)")
    upload.add_argument("--push-to-hub", metavar="REPO", help="upload the finished folder to this repository")
    upload.add_argument("--private", action="store_true", help="make a new repository private")


def evaluated_name(options: argparse.Namespace) -> str:
    """Return the name of the model in the evaluation."""
    return options.evaluation_model or options.name or Path(options.output).name


def run(options: argparse.Namespace) -> None:
    """Export, print the result, and upload with --push-to-hub. Raises DetourError."""
    log.to_terminal()
    repository = options.push_to_hub
    if options.private and not repository:
        raise DetourError("--private requires --push-to-hub")
    if options.evaluation_model and not options.evaluation:
        raise DetourError("--evaluation-model requires --evaluation")
    if repository:
        hub.check_repository(repository)
    rows = scored = None
    if options.evaluation:
        from megatron_detour.evaluation.report.page import model_table, scored_folder

        evaluation, name = Path(options.evaluation), evaluated_name(options)
        rows, scored = model_table(evaluation, name), scored_folder(evaluation, name)
    exported = export(
        options.checkpoint,
        options.output,
        options.dtype,
        as_decoder=options.decoder,
        text=options.text,
        given=_card_metadata(options),
        evaluation=rows,
        scored=scored,
        repository=repository,
        average=options.average,
        validate=_held_out_loss,
    )
    step, steps = exported.run_state["step"], exported.run_state["total_steps"]
    print(f"{options.output}: step {step:,} of {steps:,}, logits match transformers within {exported.difference:.1e}")
    if exported.averaged:
        print(f"{options.output}: {exported.averaged.text()}")
    for warning in exported.warnings:
        print(visible(f"warning: {warning}"))
    if repository:
        print(f"uploaded to {hub.push(Path(options.output), repository, options.private)}", flush=True)


def _held_out_loss(checkpoint: Path) -> Callable[[LanguageModel], float] | None:
    try:
        return held_out_loss(checkpoint)
    except DetourError as fault:
        print(visible(f"warning: the loss before and after averaging is not measured: {fault}"))
        return None


def _card_metadata(options: argparse.Namespace) -> CardMetadata:
    metadata = CardMetadata(
        options.name, tuple(options.language), options.license, options.base_model, domain=options.domain
    )
    validate(metadata, shown=lambda key: flag(key).removesuffix("s"))  # --language may name several
    return metadata.over(read_card_metadata(options.card_facts)) if options.card_facts else metadata
