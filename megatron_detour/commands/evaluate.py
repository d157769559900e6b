"""`megatron-detour evaluate`: fine-tune models on downstream tasks and compare them, with confidence intervals.

Run again with the same arguments, it does only what is missing.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
import textwrap
from pathlib import Path
from typing import Annotated

from rich.console import Console

from megatron_detour import settings
from megatron_detour.errors import DetourError
from megatron_detour.evaluation.finetuning.protocol import load_protocol, packaged_protocols
from megatron_detour.evaluation.masked_words.texts import IntrinsicOptions
from megatron_detour.evaluation.models import named_models
from megatron_detour.evaluation.results import RESULTS
from megatron_detour.evaluation.task import Task, load_task, packaged_tasks
from megatron_detour.text import visible

GROUPS = ("all", "paper-en", "paper-fr")
COUNT = settings.flag_type(Annotated[int, settings.Range(least=1, most=1000)])
COLUMNS = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands = parser.add_subcommands(implied="run")
    for name, what, add in (
        ("run", "fine-tune and score models (the default)", add_run_arguments),
        ("report", "rewrite tables and plots from the results", add_report_arguments),
        ("tasks", "list the defined tasks and groups", lambda parser: None),
        ("intrinsic", "measure how well models predict masked words of texts, without labels", add_intrinsic_arguments),
    ):
        add(subcommands.add_parser(name, help=what, description=what))


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        action="extend",
        required=True,
        metavar="DIR",
        help="Hugging Face folders, or NAME=DIR; the first is the baseline",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME",
        help="task names, your own YAML files, or: all (in --data), paper-en, paper-fr",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="directory with one folder per task")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="directory for results and report")
    parser.add_argument("--seeds", type=COUNT, metavar="N", help="seeds per model and task (set by the protocol)")
    parser.add_argument(
        "--protocol", default="quick", metavar="NAME", help=f"{', '.join(packaged_protocols())}, or a YAML file (quick)"
    )
    parser.add_argument("--ner-head", choices=("tokens", "span"), help="head for named entities (set by the protocol)")
    parser.add_argument("--jobs", type=COUNT, metavar="N", help="parallel fine-tuning jobs (one per GPU; 1 on CPU)")
    parser.add_argument("--shuffle-labels", action="store_true", help="train on shuffled labels, as a sanity check")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="override keys of the protocol",
    )


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUTPUT", help="the --output of an evaluation")
    parser.add_argument("--baseline", metavar="MODEL", help="model to compare with (that of the first result)")


def run(options: argparse.Namespace) -> None:
    if options.subcommand == "run":
        evaluate(options)
    elif options.subcommand == "report":
        report(Path(options.output), options.baseline)
    elif options.subcommand == "tasks":
        list_tasks()
    else:
        measure_masked_words(options)


def evaluate(options: argparse.Namespace) -> None:
    """Fine-tune what is missing, then write the report. Raises DetourError."""
    from megatron_detour.evaluation.finetuning.suite import Suite, run_suite, visible_gpus

    overrides = options.set + ([f"ner_head={options.ner_head}"] if options.ner_head else [])
    protocol = load_protocol(options.protocol, overrides)
    models, tasks = named_models(options.model), chosen_tasks(options.tasks, options.data)
    for name in protocol.unused_sections(tasks):
        print(visible(f"protocol {protocol.name}: tasks.{name} matches no task of this evaluation"), file=sys.stderr)
    devices = visible_gpus()
    suite = Suite(
        models=models,
        tasks=tasks,
        data=options.data,
        protocol=protocol,
        seeds=protocol.first_seeds(options.seeds),
        output=options.output,
        shuffled=options.shuffle_labels,
        jobs=options.jobs or max(1, len(devices)),
        devices=devices,
    )
    run_suite(suite)
    report(options.output, None if suite.shuffled else next(iter(models)))


def report(output: Path, baseline: str | None) -> None:
    from megatron_detour.evaluation.report.page import as_text, read_summary, write_report

    if not output.is_dir():
        raise DetourError(f"{output}: no such folder; give the --output of an evaluation")
    if not (output / RESULTS).exists():
        raise DetourError(f"{output / RESULTS}: no results yet; evaluate a model first (megatron-detour evaluate)")
    with (output / ".lock").open("w") as lock:  # several processes may share an output
        fcntl.flock(lock, fcntl.LOCK_EX)
        page = write_report(output, baseline)
    as_text(read_summary(output), Console())
    print(f"report   {page}\nresults  {output / 'results.jsonl'}")


def list_tasks() -> None:
    """Print a row for each task with its title below, in 80 columns."""
    rows = [("name", "", "type", "metric", "paper", "title")]
    for task in map(load_task, packaged_tasks()):
        rows.append((task.name, task.language, task.type, task.metric, task.paper, task.title))
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for *cells, title in rows:
        print("  ".join(map(str.ljust, cells, widths)).rstrip())
        print(textwrap.fill(title, COLUMNS, initial_indent="    ", subsequent_indent="    "))
    words = f"groups: {', '.join(GROUPS)}; docs/tasks.md describes their sources and files"
    print(textwrap.fill(words, COLUMNS))


def add_intrinsic_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", nargs="+", action="extend", required=True, metavar="DIR", help="Hugging Face folders, or NAME=DIR")
    add("--corpus", type=Path, nargs="+", action="extend", required=True, metavar="FILE", help=".jsonl[.gz] or .txt")
    add("--output", type=Path, required=True, metavar="DIR", help="for intrinsic.jsonl, intrinsic.md and cells/")
    settings.add_arguments(parser, IntrinsicOptions)


def measure_masked_words(options: argparse.Namespace) -> None:
    """Raises DetourError as measure() does."""
    from megatron_detour.evaluation.masked_words.measure import measure

    chosen = settings.from_namespace(IntrinsicOptions, options)
    measure(named_models(options.model), options.corpus, chosen, options.output)


def chosen_tasks(names: list[str], data: Path) -> tuple[Task, ...]:
    """Resolve names, files and groups to tasks, without duplicates. Raises DetourError."""
    tasks: dict[str, Task] = {}
    for name in names:
        for task in _group(name, data) if name in GROUPS else [load_task(name)]:
            tasks.setdefault(task.name, task)
    return tuple(tasks.values())


def _group(name: str, data: Path) -> list[Task]:
    defined = [load_task(task) for task in packaged_tasks()]
    if name != "all":
        return [task for task in defined if task.paper == name.removeprefix("paper-")]
    present = [task for task in defined if (data / task.name).is_dir()]
    if not present:
        raise DetourError(f"--tasks all: {data} has no folder with the name of a task; see docs/tasks.md")
    return present
