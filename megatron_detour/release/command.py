"""The command line of tools/convert_to_hf.py: its arguments, and what they start."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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
    add("--evaluation", metavar="DIR", help="put the scores of tools/evaluate.py --output DIR on the card")
    add("--evaluation-model", metavar="NAME", help="the model's name in that evaluation (--name, or the folder's)")
    upload = parser.add_argument_group("upload; without it nothing uses the network")
    upload.add_argument("--push-to-hub", metavar="REPO", help="upload the folder once it is complete")
    upload.add_argument("--private", action="store_true", help="a new repository is to be private")


def evaluated_name(options: argparse.Namespace) -> str:
    """What the model is called in the evaluation."""
    return options.evaluation_model or options.name or Path(options.output).name


def run(options: argparse.Namespace, evaluation: list[dict[str, Any]] | None, scored: Path | None = None) -> None:
    """Exports, says what came of it, and uploads where that was asked for. Raises DetourError.

    `evaluation` are rows for the card, `scored` the folder whose scores they are, where it is there unchanged.
    """
    repository = options.push_to_hub
    if options.private and not repository:
        raise DetourError("--private: is of --push-to-hub REPO, which is not there")
    if options.evaluation_model and not options.evaluation:
        raise DetourError("--evaluation-model: is of --evaluation DIR, which is not there")
    if repository:
        hub.check_repository(repository)
    exported = export(
        options.checkpoint,
        options.output,
        options.dtype,
        as_decoder=options.decoder,
        text=options.text,
        given=_given(options),
        evaluation=evaluation,
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
