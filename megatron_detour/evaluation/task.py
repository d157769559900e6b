"""Tasks, defined by YAML files: packaged ones and the user's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError, nearest
from megatron_detour.evaluation.task_types import TASK_TYPES, TaskType
from megatron_detour.structured import read_facts

FOLDER = Path(__file__).parent / "tasks"
_REQUIRED = ("name", "language", "type")
_TEXTS = (*_REQUIRED, "title", "metric", "paper", "license", "source", "access", "note")
_KEYS = (*_TEXTS, "metrics", "fields", "labels")


@dataclass(frozen=True)
class Task:
    """A task. `name` is also its data folder and part of the results' paths.

    `metrics` are all reported metrics, the primary one, `metric`, first. `fields` maps default field names
    (TaskType.fields) to the keys of the files. `labels` are the possible labels (entity types for
    token-classification); () means those of the training split. `paper` is "en" or "fr" for the tasks of "A Causal
    Language Modeling Detour Improves Encoder Continued Pretraining" (arXiv 2605.12438). `access` describes how to
    get data that are not public or not in this format.
    """

    name: str
    title: str
    language: str
    type: str
    metric: str
    metrics: tuple[str, ...]
    fields: dict[str, str] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    paper: str = ""
    license: str = ""
    source: str = ""
    access: str = ""
    note: str = ""

    @property
    def kind(self) -> TaskType:
        return TASK_TYPES[self.type]


def packaged_tasks() -> list[str]:
    """Return the names of the packaged tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_task(name_or_path: str) -> Task:
    """Load a packaged task or a YAML file. Raises DetourError, naming the invalid key."""
    known = packaged_tasks()
    path = FOLDER / f"{name_or_path}.yaml" if name_or_path in known else Path(name_or_path)
    if not path.is_file():
        raise DetourError(
            f"task {name_or_path}: neither packaged (docs/tasks.md) nor a YAML file{nearest(name_or_path, known)}"
        )
    raw = read_facts(path)
    try:
        return _task(raw)
    except _Fault as fault:
        raise DetourError(f"{path}: {fault}") from None


class _Fault(ValueError):
    """An error in a task file, without the file's name."""


def _task(raw: Any) -> Task:
    if not isinstance(raw, dict):
        raise _Fault(f"not a task; write a YAML mapping with at least the keys {', '.join(_REQUIRED)}")
    for key in raw:
        if key not in _KEYS:
            raise _Fault(f"unknown key {key!r}{nearest(str(key), list(_KEYS))}; choose from {', '.join(_KEYS)}")
    for key in _REQUIRED:
        if key not in raw:
            raise _Fault(f"missing key {key}")
    texts = {key: _text(key, raw[key]) for key in _TEXTS if key in raw}
    name = texts["type"]
    if name not in TASK_TYPES:
        raise _Fault(
            f"type: unknown type {name!r}{nearest(name, list(TASK_TYPES))}; choose from {', '.join(TASK_TYPES)}"
        )
    kind = TASK_TYPES[name]
    _check_names(texts)
    metric = texts.pop("metric", kind.metric_names[0])
    others = _list("metrics", raw["metrics"]) if "metrics" in raw else kind.metric_names
    for key, names in (("metric", (metric,)), ("metrics", others)):
        _check_metrics(key, names, kind)
    return Task(
        **{"title": texts["name"]} | texts,
        metric=metric,
        metrics=(metric, *(name for name in others if name != metric)),
        fields=_fields(raw.get("fields", {}), kind),
        labels=_labels(raw.get("labels", []), kind),
    )


def _check_names(texts: dict[str, str]) -> None:
    if not re.fullmatch(r"\w[\w.-]*", texts["name"]):
        raise _Fault(f"name: {texts['name']!r} is not a valid folder name; use letters, digits, '_', '-' and '.'")
    if not re.fullmatch("[a-z]{2,3}", texts["language"]):
        raise _Fault(f"language: {texts['language']!r} is not a language code such as en or fr")
    if texts.get("paper", "") not in ("", "en", "fr"):
        raise _Fault(f"paper: {texts['paper']!r} is neither en nor fr; omit it for your own tasks")


def _check_metrics(key: str, names: Sequence[str], kind: TaskType) -> None:
    known = kind.metric_names
    for name in names:
        if name not in known:
            raise _Fault(
                f"{key}: unknown metric {name!r} for {kind.name}{nearest(name, list(known))}; "
                f"there are {', '.join(known)}"
            )


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _Fault(f"{key}: must be a string, not {value!r}; put it in quotes")
    text = " ".join(value.split())
    if not text:
        raise _Fault(f"{key}: must not be empty")
    if not text.isprintable():
        raise _Fault(f"{key}: {text!r} contains non-printable characters; remove them")
    return text


def _list(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _Fault(f"{key}: must be a list, not {value!r}")
    items = tuple(_text(key, item) for item in value)
    for item in items:
        if items.count(item) > 1:
            raise _Fault(f"{key}: duplicate {item!r}; list it once")
    return items


def _fields(value: Any, kind: TaskType) -> dict[str, str]:
    known = kind.fields
    if not isinstance(value, dict):
        raise _Fault(f"fields: must be a mapping such as {{{known[0]}: KEY_IN_FILE}}, not {value!r}")
    for key in value:
        if key not in known:
            raise _Fault(
                f"fields.{key}: {kind.name} has no such field{nearest(str(key), list(known))}; "
                f"choose from {', '.join(known)}"
            )
    return {key: _text(f"fields.{key}", name) for key, name in value.items()}


def _labels(value: Any, kind: TaskType) -> tuple[str, ...]:
    labels = _list("labels", value)
    if labels and not kind.label_noun:
        raise _Fault(f"labels: tasks of type {kind.name} have no labels; remove the key")
    return labels
