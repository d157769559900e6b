"""`megatron-detour evaluate`: fine-tunes models on downstream tasks and says which is better, and how sure that is.

Started again with the same arguments it does only what is missing.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import textwrap
from pathlib import Path

from rich.console import Console

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.finetuning.protocol import load_protocol, packaged_protocols
from megatron_detour.evaluation.masked_words.texts import IntrinsicOptions
from megatron_detour.evaluation.models import named_models
from megatron_detour.evaluation.results import RESULTS
from megatron_detour.evaluation.task import Task, load_task, packaged_tasks
from megatron_detour.text import visible

GROUPS = ("all", "paper-en", "paper-fr")
MOST_SEEDS = 1000
COLUMNS = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subcommands = parser.add_subcommands(implied="run")
    for name, what, add in (
        ("run", "fine-tune and score; the word may be left out", add_run_arguments),
        ("report", "tables and plots again, from the results", add_report_arguments),
        ("tasks", "the tasks that are known, and groups of them", lambda parser: None),
        ("intrinsic", "how well models restore masked words of texts, without labels", add_intrinsic_arguments),
    ):
        add(subcommands.add_parser(name, help=what, description=what))


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        action="extend",
        required=True,
        metavar="DIR",
        help="Hugging Face folders, or NAME=DIR; the first one is what the others are compared with",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME",
        help="tasks, YAML files of your own, or: all (that --data has), paper-en, paper-fr",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="has a folder for each task")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for results and report")
    parser.add_argument("--seeds", type=_count, metavar="N", help="of each model and task (the protocol's)")
    parser.add_argument(
        "--protocol", default="quick", metavar="NAME", help=f"{', '.join(packaged_protocols())}, or a YAML file (quick)"
    )
    parser.add_argument("--ner-head", choices=("tokens", "span"), help="for named entities (the protocol's)")
    parser.add_argument("--jobs", type=_count, metavar="N", help="fine-tunings at once (one a GPU; 1 without)")
    parser.add_argument("--shuffle-labels", action="store_true", help="train on shuffled labels: what is chance?")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        help="change the protocol",
    )


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="OUTPUT", help="folder of an evaluation")
    parser.add_argument("--baseline", metavar="MODEL", help="the model to compare with (that of the first result)")


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
    """Fine-tunes what is missing, then writes the report. Raises DetourError."""
    from megatron_detour.evaluation.finetuning.suite import Suite, run_suite

    overrides = options.set + ([f"ner_head={options.ner_head}"] if options.ner_head else [])
    protocol = load_protocol(options.protocol, overrides)
    models, tasks = named_models(options.model), chosen_tasks(options.tasks, options.data)
    for name in protocol.unused_sections(tasks):
        print(visible(f"protocol {protocol.name}: tasks.{name} is of no task of this evaluation"), file=sys.stderr)
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
        raise DetourError(f"{output}: there is no such folder; give the --output of an evaluation")
    if not (output / RESULTS).exists():
        raise DetourError(f"{output / RESULTS}: holds no result yet; evaluate a model first (megatron-detour evaluate)")
    with (output / ".lock").open("w") as lock:  # several commands may share an output
        fcntl.flock(lock, fcntl.LOCK_EX)
        page = write_report(output, baseline)
    as_text(read_summary(output), Console())
    print(f"report   {page}\nresults  {output / 'results.jsonl'}")


def list_tasks() -> None:
    """Prints a line of facts for each task, and its title below, in 80 columns."""
    rows = [("name", "", "type", "metric", "paper", "title")]
    for task in map(load_task, packaged_tasks()):
        rows.append((task.name, task.language, task.type, task.metric, task.paper, task.title))
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    for *cells, title in rows:
        print("  ".join(map(str.ljust, cells, widths)).rstrip())
        print(textwrap.fill(title, COLUMNS, initial_indent="    ", subsequent_indent="    "))
    words = f"groups: {', '.join(GROUPS)}; docs/tasks.md says where each comes from and what its files look like"
    print(textwrap.fill(words, COLUMNS))


def add_intrinsic_arguments(parser: argparse.ArgumentParser) -> None:
    defaults, add = IntrinsicOptions(), parser.add_argument
    add("--model", nargs="+", action="extend", required=True, metavar="DIR", help="Hugging Face folders, or NAME=DIR")
    add("--corpus", type=Path, nargs="+", action="extend", required=True, metavar="FILE", help=".jsonl[.gz] or .txt")
    add("--output", type=Path, required=True, metavar="DIR", help="for intrinsic.jsonl, intrinsic.md and cells/")
    of_domain = parser.add_argument_group("words of the domain")
    of_domain.add_argument("--words", type=Path, metavar="FILE", help="the words, one per line")
    _add_files(of_domain, "--reference", "general texts, which have the domain's words far less often")
    _add_files(of_domain, "--domain", "texts of the domain to count beside each corpus, with --reference")
    of_domain.add_argument("--ratio", type=float, default=defaults.ratio, help="times as often, at least (%(default)g)")
    add("--documents", type=int, default=defaults.documents, help="of a corpus, at most (%(default)s)")
    add("--windows", type=int, default=defaults.windows, help="of a document, at most (%(default)s)")
    add(
        "--window-words", type=int, default=defaults.window_words, help="words that a model reads at once (%(default)s)"
    )
    add("--mask-rate", type=float, default=defaults.mask_rate, help="share of a window's words (%(default)s)")
    add("--seed", type=int, default=defaults.seed, help="of documents, windows, masks and bootstrap (%(default)s)")
    add("--text-key", default=defaults.text_key, help="the key of a JSON line that holds the text (%(default)s)")
    add("--resamples", type=int, default=defaults.resamples, help="of the bootstrap (%(default)s)")
    add("--device", default=defaults.device, help="auto, cpu, cuda or cuda:N; bf16 on a GPU (%(default)s)")
    add("--batch-tokens", type=int, default=defaults.batch_tokens, help="positions in a forward pass (%(default)s)")


def _add_files(group: argparse._ArgumentGroup, name: str, help_text: str) -> None:
    group.add_argument(name, type=Path, nargs="+", action="extend", default=[], metavar="FILE", help=help_text)


def measure_masked_words(options: argparse.Namespace) -> None:
    """Raises DetourError as measure() does."""
    given = {name: getattr(options, name) for name in IntrinsicOptions.__dataclass_fields__}
    settings = IntrinsicOptions(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})
    from megatron_detour.evaluation.masked_words.measure import measure

    measure(named_models(options.model), options.corpus, settings, options.output)


def chosen_tasks(names: list[str], data: Path) -> tuple[Task, ...]:
    """The tasks of names, files and groups, each once. Raises DetourError."""
    tasks: dict[str, Task] = {}
    for name in names:
        for task in _group(name, data) if name in GROUPS else [load_task(name)]:
            tasks.setdefault(task.name, task)
    return tuple(tasks.values())


def _group(name: str, data: Path) -> list[Task]:
    known = [load_task(task) for task in packaged_tasks()]
    if name != "all":
        return [task for task in known if task.paper == name.removeprefix("paper-")]
    there = [task for task in known if (data / task.name).is_dir()]
    if not there:
        raise DetourError(f"--tasks all: {data} has no folder named as a task; see docs/tasks.md")
    return there


def visible_gpus() -> tuple[str, ...]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    return tuple(named or map(str, range(torch.cuda.device_count())))[: torch.cuda.device_count()]


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= MOST_SEEDS:
        raise argparse.ArgumentTypeError(f"a whole number from 1 to {MOST_SEEDS:,} is needed, it is {text!r}")
    return int(text)
