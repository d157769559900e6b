"""What a task is: a YAML file of facts, packaged here or a user's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_detour.errors import DetourError, nearest
from megatron_detour.evaluation.task_types import TASK_TYPES, TaskType
from megatron_detour.structured import read_yaml

FOLDER = Path(__file__).parent / "tasks"
_REQUIRED = ("name", "language", "type")
_TEXTS = (*_REQUIRED, "title", "metric", "paper", "licence", "source", "access", "note")
_KEYS = (*_TEXTS, "metrics", "fields", "labels")


@dataclass(frozen=True)
class Task:
    """A task. `name` is also the folder of its data and a part of the results' paths.

    `metrics` are all that are shown, `metric`, which decides, first. `fields` gives the files' own keys where they
    differ from the usual ones (TaskType.fields). `labels` are those that a model chooses from, types of entities in
    token-classification; () means those of the training split. `paper` is "en" or "fr" for the tasks of "A Causal
    Language Modeling Detour Improves Encoder Continued Pretraining" (arXiv 2605.12438). `access` says how to get the
    data where they are not public or not in this form.
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
    licence: str = ""
    source: str = ""
    access: str = ""
    note: str = ""

    @property
    def kind(self) -> TaskType:
        return TASK_TYPES[self.type]


def known_tasks() -> list[str]:
    """The names of the packaged tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_task(name_or_path: str) -> Task:
    """A packaged task, or that of a user's own YAML file. Raises DetourError with the key that is wrong."""
    known = known_tasks()
    path = FOLDER / f"{name_or_path}.yaml" if name_or_path in known else Path(name_or_path)
    if not path.is_file():
        raise DetourError(
            f"task {name_or_path}: neither a task of docs/tasks.md nor a YAML file{nearest(name_or_path, known)}"
        )
    raw = read_yaml(path)
    try:
        return _task(raw)
    except _Fault as fault:
        raise DetourError(f"{path}: {fault}") from None


class _Fault(ValueError):
    """What is wrong with a task; the file is not known here."""


def _task(raw: Any) -> Task:
    if not isinstance(raw, dict):
        raise _Fault(f"a task is a YAML mapping with the keys {', '.join(_REQUIRED)} at least")
    for key in raw:
        if key not in _KEYS:
            raise _Fault(f"unknown key {key!r}{nearest(str(key), list(_KEYS))}; there are {', '.join(_KEYS)}")
    for key in _REQUIRED:
        if key not in raw:
            raise _Fault(f"the key {key} is missing")
    texts = {key: _text(key, raw[key]) for key in _TEXTS if key in raw}
    name = texts["type"]
    if name not in TASK_TYPES:
        raise _Fault(f"type: unknown type {name!r}{nearest(name, list(TASK_TYPES))}; there are {', '.join(TASK_TYPES)}")
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
        raise _Fault(f"name: {texts['name']!r} cannot name a folder; take letters, digits, '_', '-' and '.'")
    if not re.fullmatch("[a-z]{2,3}", texts["language"]):
        raise _Fault(f"language: {texts['language']!r} is not a language code such as en or fr")
    if texts.get("paper", "") not in ("", "en", "fr"):
        raise _Fault(f"paper: {texts['paper']!r} is neither en nor fr; leave it out for a task of your own")


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
        raise _Fault(f"{key}: a text is needed, it is {value!r}; quotes make it one")
    text = " ".join(value.split())
    if not text:
        raise _Fault(f"{key}: the text is empty")
    if not text.isprintable():
        raise _Fault(f"{key}: the text {text!r} holds characters that do not print, such as escapes")
    return text


def _list(key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _Fault(f"{key}: a list is needed, it is {value!r}")
    items = tuple(_text(key, item) for item in value)
    for item in items:
        if items.count(item) > 1:
            raise _Fault(f"{key}: {item!r} stands there twice")
    return items


def _fields(value: Any, kind: TaskType) -> dict[str, str]:
    known = kind.fields
    if not isinstance(value, dict):
        raise _Fault(f"fields: a mapping is needed, such as {{{known[0]}: KEY_OF_THE_FILE}}, it is {value!r}")
    for key in value:
        if key not in known:
            raise _Fault(
                f"fields.{key}: {kind.name} has no such field{nearest(str(key), list(known))}; "
                f"there are {', '.join(known)}"
            )
    return {key: _text(f"fields.{key}", name) for key, name in value.items()}


def _labels(value: Any, kind: TaskType) -> tuple[str, ...]:
    labels = _list("labels", value)
    if labels and not kind.label_noun:
        raise _Fault(f"labels: a task of type {kind.name} has none; remove the key")
    return labels
