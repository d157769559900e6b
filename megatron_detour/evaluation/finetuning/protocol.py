"""How models are fine-tuned: a protocol is a file of settings, by the type of a task and, where it says so, by task."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from megatron_detour.errors import DetourError, nearest
from megatron_detour.evaluation.task import Task, known_tasks
from megatron_detour.evaluation.task_types import TASK_TYPES
from megatron_detour.settings import Choice, Entries, Faults, Range, apply_override, read, settings_of, to_plain
from megatron_detour.structured import read_yaml

FOLDER = Path(__file__).parent / "protocols"
LAST_SEED = 2**32 - 1 - 1000  # numpy's last one, less those that `first_seeds` may add
SHORTEST = 8  # tokens: special ones and a few of a text


ABOVE_ZERO = Range(above=0)


@dataclass(frozen=True)
class Settings:
    """The fine-tuning of one task; everything here decides on its figures."""

    learning_rate: Annotated[float, ABOVE_ZERO, "largest learning rate"]
    batch: Annotated[int, ABOVE_ZERO, "examples per step"]
    max_length: Annotated[int, Range(least=SHORTEST), "tokens; longer texts are cut, to the model's limit at most"]
    epochs: Annotated[float, ABOVE_ZERO, "passes over the training examples"] = 3
    steps: Annotated[int | None, ABOVE_ZERO, "steps, instead of epochs"] = None
    validate_every: Annotated[int | None, ABOVE_ZERO, "steps between validations; every epoch unless set"] = None
    head_learning_rate: Annotated[float | None, ABOVE_ZERO, "of the head; that of the rest unless set"] = None
    warmup: Annotated[float, Range(least=0, below=1), "share of the steps with a linear warm-up"] = 0.0
    schedule: Annotated[str, Choice(("linear", "constant", "cosine")), "learning rate after it"] = "linear"
    weight_decay: Annotated[float, Range(least=0), "decoupled weight decay"] = 0.0
    clip: Annotated[float, ABOVE_ZERO, "largest gradient norm"] = 1.0
    pooling: Annotated[
        str | None, Choice(("cls", "mean")), "of a text; as the model's own configuration says unless set"
    ] = None
    head: Annotated[
        str, Choice(("transformers", "linear")), "linear: without the dense layer in front of the classifier"
    ] = "transformers"
    ner_head: Annotated[str, Choice(("tokens", "span")), "head for named entities"] = "tokens"
    select_by: Annotated[str | None, "metric on the validation split; the task's own unless set"] = None
    by_length: Annotated[bool, "batches of texts of similar length: faster"] = False
    train_examples: Annotated[
        int | None, ABOVE_ZERO, "at most, drawn at random, the same ones for every model and seed"
    ] = None
    dev_examples: Annotated[int | None, ABOVE_ZERO, "at most"] = None


Changes = dict[str, Any]  # of settings, by their names


@dataclass(frozen=True)
class _File:
    about: str
    seeds: Annotated[tuple[Annotated[int, Range(least=0, most=LAST_SEED)], ...], Entries(least=1, unique=True)]
    defaults: Changes
    types: dict[str, Changes] = field(default_factory=dict)
    tasks: dict[str, Changes] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """Settings for every task. `name` says the overrides as well: they make it another protocol."""

    name: str
    about: str
    seeds: tuple[int, ...]
    by_type: dict[str, Settings]
    by_task: dict[str, Changes]

    def settings(self, task: Task) -> Settings:
        """Those of the task's type with those of the task itself. Raises DetourError for what does not fit the task."""
        values = to_plain(self.by_type[task.type]) | self.by_task.get(task.name, {})
        settings = read(Settings, values, f"protocol {self.name}, tasks.{task.name}")
        metrics = task.kind.metric_names
        if settings.select_by is not None and settings.select_by not in metrics:
            raise DetourError(
                f"protocol {self.name}: select_by: unknown metric {settings.select_by!r} for {task.name}, a task of "
                f"{task.type}{nearest(settings.select_by, list(metrics))}; there are {', '.join(metrics)}"
            )
        return settings

    def unused_sections(self, tasks: tuple[Task, ...]) -> list[str]:
        """Names under `tasks` that are neither among these nor packaged: most likely misspelt."""
        return sorted(self.by_task.keys() - {task.name for task in tasks} - set(known_tasks()))

    def first_seeds(self, count: int | None) -> tuple[int, ...]:
        """The protocol's own seeds, or the first `count` of them and the numbers that follow."""
        if count is None:
            return self.seeds
        return tuple([*self.seeds, *range(max(self.seeds) + 1, max(self.seeds) + 1 + count)][:count])


def known_protocols() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_protocol(name: str, overrides: list[str] = []) -> Protocol:  # noqa: B006 never changed
    """A packaged protocol or a YAML file of one's own, with `key=value` overrides for all types. Raises DetourError."""
    path = FOLDER / f"{name}.yaml" if name in known_protocols() else Path(name)
    if not path.is_file():
        known = known_protocols()
        raise DetourError(f"--protocol {name}: neither a file nor one of {', '.join(known)}{nearest(name, known)}")
    given = _parsed(overrides)
    where = f"{path}{' with ' + ' '.join(overrides) if overrides else ''}"
    file = read(_File, read_yaml(path), where, _check_names)
    by_type = {kind: read(Settings, file.defaults | file.types.get(kind, {}) | given, where) for kind in TASK_TYPES}
    any_type = next(iter(by_type.values()))
    shown = {key: getattr(any_type, key) if isinstance(value, str) else value for key, value in given.items()}
    name = path.stem + "".join(f" {key}={value}" for key, value in sorted(shown.items()))
    by_task = {task: changes | given for task, changes in file.tasks.items()}
    return Protocol(name, file.about, file.seeds, by_type, by_task)


def _check_names(file: _File, faults: Faults) -> None:
    """Unknown task types and settings."""
    for key in file.types:
        if key not in TASK_TYPES:
            faults.add(f"types.{key}", f"unknown task type{nearest(key, list(TASK_TYPES))}")
    sections = {f"types.{key}": changes for key, changes in file.types.items()}
    sections |= {f"tasks.{key}": changes for key, changes in file.tasks.items()}
    for section, changes in (("defaults", file.defaults), *sections.items()):
        for key in changes.keys() - set(KNOWN):
            faults.add(f"{section}.{key}", f"unknown setting{nearest(key, KNOWN)}")


def _parsed(overrides: list[str]) -> Changes:
    parsed: Changes = {}
    for override in overrides:
        key = override.partition("=")[0]
        if "=" not in override or key not in KNOWN:
            known = ", ".join(KNOWN)
            raise DetourError(f"{override}: give key=value with a key of the protocol: {known}{nearest(key, KNOWN)}")
        if key in parsed:
            raise DetourError(f"{override}: {key} is given twice; give it once")
        apply_override(parsed, override)
    return parsed


KNOWN = [setting.name for setting in settings_of(Settings)]
