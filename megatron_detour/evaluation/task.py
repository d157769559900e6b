"""Tasks, defined by YAML files: packaged ones and the user's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from megatron_detour.errors import DetourError, nearest
from megatron_detour.evaluation.task_types import TASK_TYPES, TaskType
from megatron_detour.settings import Choice, Enclosing, Entries, Faults, Parsed, Pattern, read
from megatron_detour.structured import read_facts

FOLDER = Path(__file__).parent / "tasks"


def _line(raw: Any, _: Enclosing) -> str:
    if not isinstance(raw, str):
        raise ValueError("text, in quotes where YAML takes it for something else")
    text = " ".join(raw.split())
    if not text.isprintable() or not text:
        raise ValueError("non-empty text of printable characters")
    return text


Line = Annotated[str, Parsed(_line, {"type": "string"})]  # its line breaks count as spaces


@dataclass(frozen=True)
class Task:
    """A task file. `load_task` fills in `title`, `metric` and `metrics`, of which the primary one is the first.

    The tasks of a `paper` are those of "A Causal Language Modeling Detour Improves Encoder Continued Pretraining"
    (arXiv 2605.12438).
    """

    name: Annotated[
        Line,
        Pattern(r"\w[\w.-]*", "a folder name of letters, digits, '_', '-' and '.'"),
        "folder under `--data`, and the name in results",
    ]
    language: Annotated[Line, Pattern("[a-z]{2,3}", "a language code such as en or fr"), "language code of the texts"]
    type: Annotated[Line, Choice(TASK_TYPES), "type of the task"]
    title: Annotated[Line, "what it is about; the name unless set"] = ""
    metric: Annotated[Line, "the metric that decides; the usual one of the type unless set"] = ""
    metrics: Annotated[
        tuple[Line, ...] | None, Entries(unique=True), "metrics in `results.jsonl`; all of the type unless set"
    ] = None
    fields: Annotated[dict[str, Line], "keys of the files, by the names above, where they differ"] = field(
        default_factory=dict
    )
    labels: Annotated[
        tuple[Line, ...],
        Entries(unique=True),
        "all labels (for token-classification, entity types), if some do not occur in `train`: labels of `dev` or "
        "`test` are then accepted if they are listed",
    ] = ()
    paper: Annotated[Line, Choice(("en", "fr")), "part of the paper's evaluation; not for your own tasks"] = ""
    license: Annotated[Line, "license of the data"] = ""
    source: Annotated[Line, "where the data come from"] = ""
    access: Annotated[Line, "how to get data that are not public or not in this format"] = ""
    note: Annotated[Line, "what else to know"] = ""

    @property
    def kind(self) -> TaskType:
        return TASK_TYPES[self.type]


def packaged_tasks() -> list[str]:
    """Return the names of the packaged tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_task(name_or_path: str) -> Task:
    """Load a packaged task or a YAML file. Raises DetourError, naming the invalid keys."""
    known = packaged_tasks()
    path = FOLDER / f"{name_or_path}.yaml" if name_or_path in known else Path(name_or_path)
    if not path.is_file():
        raise DetourError(
            f"task {name_or_path}: neither packaged (docs/tasks.md) nor a YAML file{nearest(name_or_path, known)}"
        )
    task = read(Task, read_facts(path), str(path), _check)
    usual = task.kind.metric_names
    metrics = dict.fromkeys([task.metric or usual[0], *(usual if task.metrics is None else task.metrics)])
    return replace(task, title=task.title or task.name, metric=next(iter(metrics)), metrics=tuple(metrics))


def _check(task: Task, faults: Faults) -> None:
    """Names that the task's type does not know."""
    kind = task.kind
    for key, names, known in (
        ("metric", [task.metric] if task.metric else [], kind.metric_names),
        ("metrics", task.metrics or (), kind.metric_names),
        ("fields", task.fields, kind.fields),
    ):
        for name in names:
            if name not in known:
                sentence = f"{kind.name} has no {name!r}{nearest(str(name), known)}; choose from {', '.join(known)}"
                faults.add(key, sentence, ["type"])
    if task.labels and not kind.label_noun:
        faults.add("labels", f"tasks of type {kind.name} have no labels; remove the key", ["type"])
