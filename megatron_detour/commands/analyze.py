"""`megatron-detour analyze`: what the detour changed in a model, and where."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from megatron_detour import settings
from megatron_detour.analysis.drift import Draws, Drift, Measurement, draw_texts, measure_drift
from megatron_detour.analysis.layer_choice import THRESHOLD, Proposal, as_arm, propose
from megatron_detour.analysis.linear_probe import ProbeOptions, probe_layers
from megatron_detour.analysis.needle_examples import DOCUMENTS, NeedleOptions
from megatron_detour.analysis.persistence import find_decay, measure_persistence
from megatron_detour.commands.parser import ABOVE_ZERO, COUNT
from megatron_detour.config import load
from megatron_detour.errors import DetourError
from megatron_detour.evaluation.models import check_model, fingerprint, named_models
from megatron_detour.evaluation.task import load_task
from megatron_detour.files import file_facts, write_whole
from megatron_detour.structured import read_json_object
from megatron_detour.ui.progress import CountProgress
from megatron_detour.ui.tables import Table, wrapped

PACKAGES = ("torch", "transformers", "numpy")
GRADIENT_TEXTS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands = parser.add_subcommands(implied="drift")
    for name, what, add in (
        ("drift", "how far a model's representations differ from its control's, by layer (the default)", _drift_flags),
        ("persistence", "whether the checkpoints of a decay lose the drift", _persistence_flags),
        ("transplant", "copy layers, attention or MLP blocks of a model into its twin", _transplant_flags),
        ("probe", "train linear probes on the frozen layers of models", _probe_flags),
        ("loss", "loss of models on a run's held-out text, under its fixed masks", _loss_flags),
        ("needle", "test whether frozen models find a fact in a long document", _needle_flags),
        ("layers", "propose which layers the detour needs, from the drift of a pilot", _layers_flags),
    ):
        add(subcommands.add_parser(name, help=what, description=what))


def run(options: argparse.Namespace) -> None:
    """Raises DetourError."""
    if options.output.is_dir() and options.subcommand != "transplant":
        raise DetourError(f"{options.output}: a folder; --output is the file for the result, such as drift.json")
    analyses: dict[str, Callable[[argparse.Namespace], None]] = {
        "drift": drift,
        "persistence": persistence,
        "transplant": transplant,
        "probe": probe,
        "loss": loss,
        "needle": needle,
        "layers": layers,
    }
    analyses[options.subcommand](options)


def _drift_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--detour", type=Path, required=True, metavar="DIR", help="Hugging Face folder of the detour, or any model")
    add("--control", type=Path, required=True, metavar="DIR", help="that of its control")
    add("--second-control", type=Path, metavar="DIR", help="a control trained with another seed: the noise of seeds")
    _corpus_flags(parser)


def _persistence_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--reference", type=Path, required=True, metavar="DIR", help="the fixed model, such as an undecayed control")
    add(
        "--checkpoints",
        nargs="+",
        action="extend",
        required=True,
        metavar="DIR",
        help="run directories, checkpoints, or TOKENS=DIR",
    )
    _corpus_flags(parser)


def _corpus_flags(parser: argparse.ArgumentParser) -> None:
    _corpus_flag(parser, "held-out texts")
    settings.add_arguments(parser, Draws)
    settings.add_arguments(parser, Measurement)
    _output_flag(parser)


def _corpus_flag(parser: argparse.ArgumentParser, what: str, required: bool = True) -> None:
    options = {"nargs": "+", "action": "extend", "required": required, "metavar": "FILE"}
    parser.add_argument("--corpus", type=Path, **options, help=f"{what}: .jsonl[.gz], .txt or .parquet")


def _output_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file for the result")


def _transplant_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--donor", type=Path, required=True, metavar="DIR", help="Hugging Face folder that gives the parts")
    add("--recipient", type=Path, required=True, metavar="DIR", help="that of its twin, which gives the rest")
    add(
        "--parts",
        nargs="+",
        action="extend",
        required=True,
        metavar="PART",
        help="low, mid, deep (thirds of the depth), layers.N, layers.N-M, attention, mlp, embeddings, final_norm, "
        "head, all",
    )
    add("--output", type=Path, required=True, metavar="DIR", help="Hugging Face folder to write")


def _probe_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _model_flag(parser)
    add("--task", required=True, metavar="NAME", help="a classification task: its name or your own YAML file")
    add("--data", type=Path, required=True, metavar="DIR", help="directory with one folder per task")
    add("--layers", type=int, nargs="+", metavar="N", help="layers to probe, negative ones from the end (all)")
    settings.add_arguments(parser, ProbeOptions)
    _output_flag(parser)


def _loss_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    parser.add_argument(
        "--run", required=True, metavar="RUN.yaml", help="run file or packaged recipe, for its validation"
    )
    _output_flag(parser)


def _needle_flags(parser: argparse.ArgumentParser) -> None:
    _model_flag(parser)
    _corpus_flag(parser, "documents in which to hide facts")
    parser.add_argument("--documents", type=COUNT, default=DOCUMENTS, metavar="N", help="of them, drawn (%(default)s)")
    parser.add_argument("--text-key", default="text", metavar="KEY", help="JSON key of the text (%(default)s)")
    settings.add_arguments(parser, NeedleOptions)
    _output_flag(parser)


def _model_flag(parser: argparse.ArgumentParser) -> None:
    options = {"nargs": "+", "action": "extend", "required": True, "metavar": "DIR"}
    parser.add_argument("--model", **options, help="Hugging Face folders, or NAME=DIR")


def _layers_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--drift", type=Path, required=True, metavar="FILE", help="result of analyze drift, with --second-control")
    add("--threshold", type=ABOVE_ZERO, default=THRESHOLD, metavar="X", help="of the drift ratio (%(default)s)")
    add("--model", type=Path, metavar="DIR", help="model that the pilot started from, to measure gradients")
    _corpus_flag(parser, "texts for the gradients", required=False)
    add("--run", metavar="RUN.yaml", help="run file or packaged recipe, to print the proposal as an arm of a study")
    add("--run-output", type=Path, metavar="FILE", help="run file to write, with the proposal in --run")
    _output_flag(parser)


def drift(options: argparse.Namespace) -> None:
    folders = [options.detour, options.control, *([options.second_control] if options.second_control else [])]
    _check_models(folders)
    draws, measurement = _draws(options), _read(Measurement, options)
    with CountProgress(len(folders) * _distinct(draws), "texts") as progress:
        found = measure_drift(
            options.detour, options.control, draws, options.second_control, measurement, _reporting(progress)
        )
    from megatron_detour.analysis.tables import drift_table

    _finish(options, found.to_json() | _facts(folders, options.corpus), drift_table(found))


def persistence(options: argparse.Namespace) -> None:
    checkpoints = find_decay(options.checkpoints)
    folders = [options.reference, *(folder for _, folder in checkpoints)]
    _check_models(folders)
    draws, measurement = _draws(options), _read(Measurement, options)
    with CountProgress(len(folders) * _distinct(draws), "texts") as progress:
        found = measure_persistence(options.reference, checkpoints, draws, measurement, _reporting(progress))
    from megatron_detour.analysis.tables import persistence_table

    _finish(options, found.to_json() | _facts(folders, options.corpus), persistence_table(found))


def transplant(options: argparse.Namespace) -> None:
    from megatron_detour.analysis.transplants import transplant

    done = transplant(options.donor, options.recipient, options.parts, options.output)
    share = f"{done.parameters:,} of {done.total:,} parameters ({done.parameters / done.total:.1%})"
    print(f"copied   {share}, {len(done.weights)} weights\nmodel    {options.output}")


def probe(options: argparse.Namespace) -> None:
    models, task, chosen = named_models(options.model), load_task(options.task), _read(ProbeOptions, options)
    _check_models(list(models.values()))
    found = {}
    with CountProgress(len(models), "models") as progress:
        for name, folder in models.items():
            progress.on(name)
            found[name] = probe_layers(folder, task, options.data, chosen, layers=options.layers)
            progress.add(1)
    from megatron_detour.analysis.tables import probe_table

    depths = {len(result.layers) for result in found.values()}
    tables = [probe_table(found)] if len(depths) == 1 else [probe_table({name: each}) for name, each in found.items()]
    content = {"models": {name: result.to_json() for name, result in found.items()}}
    _finish(options, content | _facts(list(models.values()), []), *tables)
    if unconverged := sum(result.unconverged for result in found.values()):
        print(wrapped(f"{unconverged} fits had not converged after their last iteration; leave out the largest C."))


def loss(options: argparse.Namespace) -> None:
    from megatron_detour.analysis.held_out_loss import held_out_figures
    from megatron_detour.analysis.tables import loss_table

    models, run = named_models(options.model), load(options.run)
    with CountProgress(len(models), "models") as progress:
        found = {}
        for name, folder in models.items():
            progress.on(name)
            found[name] = held_out_figures(folder, run)
            progress.add(1)
    validation = settings.to_plain(run.validation) | {"sequence_length": run.data.sequence_length}
    _finish(options, {"models": found, "validation": validation} | _facts(list(models.values()), []), loss_table(found))


def needle(options: argparse.Namespace) -> None:
    from megatron_detour.analysis.needle import measure_needle
    from megatron_detour.analysis.tables import needle_table

    models, chosen = named_models(options.model), _read(NeedleOptions, options)
    _check_models(list(models.values()))
    (documents,) = draw_texts(options.corpus, options.documents, (chosen.seed,), options.text_key, fewer=True)
    with CountProgress(len(models) * chosen.examples, "examples") as progress:
        found = {}
        for name, folder in models.items():
            progress.on(name)
            found[name] = measure_needle(folder, documents, chosen, progress.add)
    content = {"models": {name: result.to_json() for name, result in found.items()}}
    _finish(options, content | _facts(list(models.values()), options.corpus), needle_table(found))


def layers(options: argparse.Namespace) -> None:
    from megatron_detour.analysis.tables import layer_table

    if bool(options.model) != bool(options.corpus):
        raise DetourError("--model and --corpus go together: gradients are measured with a model, on texts")
    if options.run_output and not options.run:
        raise DetourError("--run-output requires --run, the run file to change")
    try:
        measured = Drift.from_json(read_json_object(options.drift))
    except FileNotFoundError:
        raise DetourError(f"--drift {options.drift}: no such file") from None
    gradients = None
    if options.model:
        from megatron_detour.analysis.gradients import gradient_shares

        check_model(options.model)
        gradients = gradient_shares(options.model, draw_texts(options.corpus, GRADIENT_TEXTS, (0,), fewer=True)[0])
    proposal = propose(measured.ratio, gradients, options.threshold)
    phase = _detour_of(options.run) if options.run else None
    changed = _changed_run(options.run, phase, proposal) if options.run_output else None
    _finish(options, proposal.to_json(), layer_table(proposal))
    print(wrapped(f"{proposal.reason[0].upper()}{proposal.reason[1:]}."))
    print(f"freeze   [{', '.join(proposal.freeze)}]")
    if phase and proposal.freeze:
        print(f"arm      {as_arm(phase, proposal.freeze)}")
    if changed:
        write_whole(options.run_output, changed)
        print(f"run file {options.run_output}")


def _detour_of(run_file: str) -> str:
    """Return the name of the first phase that a control would replace. Raises DetourError without one."""
    phase = next((phase.name for phase in load(run_file).phases if phase.objective.detour), None)
    if phase is None:
        raise DetourError(f"{run_file}: no causal phase in which layers could be frozen")
    return phase


def _changed_run(run_file: str, phase: str, proposal: Proposal) -> str:
    """Return the run file with the proposal in a phase, under a name of its own.

    It is written in full: defaults are spelled out, comments are lost. Raises DetourError for an empty proposal.
    """
    if not proposal.freeze:
        raise DetourError("the proposal freezes nothing, so that there is no run file to write")
    config = load(run_file)
    overrides = [f"phases.{phase}.freeze=[{', '.join(proposal.freeze)}]"]
    overrides += [f"{key}={value}-proposed" for key, value in (("name", config.name), ("folder", config.folder))]
    return yaml.safe_dump(settings.to_plain(load(run_file, overrides)), sort_keys=False, allow_unicode=True)


def _read(kind: type, options: argparse.Namespace) -> Any:
    chosen = settings.from_namespace(kind, options)
    settings.validate(chosen)
    return chosen


def _draws(options: argparse.Namespace) -> list[list[str]]:
    chosen = _read(Draws, options)
    return draw_texts(options.corpus, chosen.count, chosen.draws, chosen.text_key)


def _distinct(draws: list[list[str]]) -> int:
    return len({text for draw in draws for text in draw})


def _check_models(folders: list[Path]) -> None:
    for folder in folders:
        check_model(folder, flag="")


def _reporting(progress: CountProgress) -> Callable[[str, int], None]:
    def report(model: str, texts: int) -> None:
        progress.on(model)
        progress.add(texts)

    return report


def _facts(folders: list[Path], corpus: list[Path]) -> dict[str, Any]:
    """Return what determines a result besides its options: hashes of models and texts, versions."""
    return {
        "identities": {str(folder): fingerprint(folder) for folder in folders},
        "corpus": {str(path): file_facts(path)["sha256"] if path.is_file() else None for path in corpus},
        "versions": {package: version(package) for package in PACKAGES},
    }


def _finish(options: argparse.Namespace, content: dict[str, Any], *tables: Table) -> None:
    """Write the result as JSON and print its tables."""
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.output, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    for table in tables:
        table.print(Console())
    print(f"result   {options.output}")
