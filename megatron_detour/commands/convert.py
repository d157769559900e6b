"""`megatron-detour convert`: a checkpoint as a Hugging Face folder with a model card, after comparing its logits with
transformers'."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_detour import log
from megatron_detour.errors import DetourError
from megatron_detour.release import hub
from megatron_detour.release.card_metadata import CardMetadata, read_card_metadata
from megatron_detour.release.export import DTYPES, export
from megatron_detour.settings import flag, validate
from megatron_detour.text import visible


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run's folder: its newest")
    add("--output", required=True, metavar="DIR", help="the folder to write; it must not exist")
    add("--dtype", choices=sorted(DTYPES), default="bf16", help="of the weights (bf16)")
    add("--decoder", action="store_true", help="as ModernBertDecoderForCausalLM, for a checkpoint of a causal phase")
    add("--text", metavar="FILE", help="compare logits on its lines (default: a few texts of this project)")
    card = parser.add_argument_group("the model card")
    add = card.add_argument
    add("--name", help="of the model (the output folder's)")
    add("--language", nargs="+", default=[], metavar="CODE", help="of the model, such as: en fr (ISO 639)")
    add("--licence", "--license", help="of the weights, such as apache-2.0 or cc-by-4.0")
    add("--base-model", metavar="OWNER/NAME", help="the start model on the hub, where the run used a local folder")
    add("--domain", metavar="NAME", help="of the texts, such as medical: the card then says what follows from it")
    add("--card-facts", metavar="FILE", help="YAML: these and more, such as the corpora's licences (docs/release.md)")
    add("--evaluation", metavar="DIR", help="put the scores of megatron-detour evaluate --output DIR on the card")
    add("--evaluation-model", metavar="NAME", help="the model's name in that evaluation (--name, or the folder's)")
    upload = parser.add_argument_group("upload; without it nothing uses the network")
    upload.add_argument("--push-to-hub", metavar="REPO", help="upload the folder once it is complete")
    upload.add_argument("--private", action="store_true", help="a new repository is to be private")


def evaluated_name(options: argparse.Namespace) -> str:
    """What the model is called in the evaluation."""
    return options.evaluation_model or options.name or Path(options.output).name


def run(options: argparse.Namespace) -> None:
    """Exports, says what came of it, and uploads where that was asked for. Raises DetourError."""
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
        given=_given(options),
        evaluation=rows,
        scored=scored,
        repository=repository,
    )
    step, steps = exported.run_state["step"], exported.run_state["total_steps"]
    print(f"{options.output}: step {step:,} of {steps:,}, logits equal transformers' within {exported.difference:.1e}")
    for warning in exported.warnings:
        print(visible(f"warning: {warning}"))
    if repository:
        print(f"uploaded to {hub.push(Path(options.output), repository, options.private)}", flush=True)


def _given(options: argparse.Namespace) -> CardMetadata:
    spoken = CardMetadata(
        options.name, tuple(options.language), options.licence, options.base_model, domain=options.domain
    )
    validate(spoken, shown=lambda key: flag(key).removesuffix("s"))  # --language may name several
    return spoken.over(read_card_metadata(options.card_facts)) if options.card_facts else spoken
