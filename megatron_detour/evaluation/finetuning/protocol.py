"""Fine-tuning protocols: files of settings, with overrides by task type and by task."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import msgspec

from megatron_detour.errors import DetourError, nearest
from megatron_detour.evaluation.task import Task, packaged_tasks
from megatron_detour.evaluation.task_types import TASK_TYPES
from megatron_detour.structured import parse_yaml, read_yaml

FOLDER = Path(__file__).parent / "protocols"
LAST_SEED = 2**32 - 1 - 1000  # numpy's largest seed, minus what `first_seeds` may add
SHORTEST = 8  # tokens: the special ones and a few more


class FinetuneSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fine-tuning settings of one task; all of them affect its scores."""

    learning_rate: float
    batch: int
    max_length: int  # tokens; longer texts are truncated, also at the model's limit
    epochs: float = 3
    steps: int | None = None  # instead of epochs
    validate_every: int | None = None  # steps; None: every epoch
    head_learning_rate: float | None = None  # None: learning_rate
    warmup: float = 0.0  # fraction of the steps
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0  # gradient norm
    pooling: Literal["cls", "mean"] | None = None  # None: as in the model's config.json
    head: Literal["transformers", "linear"] = "transformers"  # linear: without the dense layer
    ner_head: Literal["tokens", "span"] = "tokens"
    select_by: str | None = None  # metric on the validation split; None: the task's metric
    by_length: bool = False  # group texts of similar length into batches: faster
    train_examples: int | None = None  # at most; a random subset, the same for every model and seed
    dev_examples: int | None = None

    def __post_init__(self) -> None:
        for key in ("learning_rate", "batch", "epochs", "clip"):
            _above_zero(key, getattr(self, key))
        for key in ("steps", "validate_every", "head_learning_rate", "train_examples", "dev_examples"):
            if getattr(self, key) is not None:
                _above_zero(key, getattr(self, key))
        if self.max_length < SHORTEST:
            raise ValueError(f"max_length must be at least {SHORTEST} tokens, not {self.max_length}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a fraction of the steps, from 0 to below 1, not {self.warmup}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be 0 or more, not {self.weight_decay}")


def _above_zero(key: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{key} must be above 0, not {value}")


Changes = dict[str, Any]  # settings by name


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    about: str
    seeds: list[int]
    defaults: Changes
    types: dict[str, Changes] = {}
    tasks: dict[str, Changes] = {}


class Protocol(msgspec.Struct, frozen=True):
    """FinetuneSettings for every task. `name` includes the overrides: they make it a different protocol."""

    name: str
    about: str
    seeds: tuple[int, ...]
    by_type: dict[str, FinetuneSettings]
    by_task: dict[str, Changes]

    def settings(self, task: Task) -> FinetuneSettings:
        """Return the settings of a task: its type's, overridden by its own. Raises DetourError if they do not fit."""
        try:
            settings = _converted(msgspec.to_builtins(self.by_type[task.type]) | self.by_task.get(task.name, {}))
        except msgspec.ValidationError as error:
            raise DetourError(f"protocol {self.name}, tasks.{task.name}: {_reason(error)}") from None
        metrics = task.kind.metric_names
        if settings.select_by is not None and settings.select_by not in metrics:
            raise DetourError(
                f"protocol {self.name}: select_by: unknown metric {settings.select_by!r} for {task.name} "
                f"({task.type}){nearest(settings.select_by, list(metrics))}; choose from {', '.join(metrics)}"
            )
        return settings

    def unused_sections(self, tasks: tuple[Task, ...]) -> list[str]:
        """Return names under `tasks` that are neither among these nor packaged: most likely misspelled."""
        return sorted(self.by_task.keys() - {task.name for task in tasks} - set(packaged_tasks()))

    def first_seeds(self, count: int | None) -> tuple[int, ...]:
        """Return the protocol's seeds, or the first `count` of them, continued by consecutive numbers."""
        if count is None:
            return self.seeds
        return tuple([*self.seeds, *range(max(self.seeds) + 1, max(self.seeds) + 1 + count)][:count])


def packaged_protocols() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_protocol(name: str, overrides: list[str] = []) -> Protocol:  # noqa: B006 never changed
    """Load a packaged protocol or a YAML file, with `key=value` overrides for all types. Raises DetourError."""
    path = FOLDER / f"{name}.yaml" if name in packaged_protocols() else Path(name)
    if not path.is_file():
        known = packaged_protocols()
        raise DetourError(f"--protocol {name}: neither a file nor one of {', '.join(known)}{nearest(name, known)}")
    given = _parsed(overrides)
    content = read_yaml(path)
    try:
        file = msgspec.convert(content, _File)
        _check_names(file)
        by_type = {kind: _converted(file.defaults | file.types.get(kind, {}) | given) for kind in TASK_TYPES}
    except (ValueError, msgspec.ValidationError) as error:
        where = f"{path}{' with ' + ' '.join(overrides) if overrides else ''}"
        raise DetourError(f"{where}: {_reason(error)}") from None
    shown = path.stem + "".join(f" {key}={value}" for key, value in sorted(given.items()))
    by_task = {name: changes | given for name, changes in file.tasks.items()}
    return Protocol(shown, file.about, tuple(file.seeds), by_type, by_task)


def _check_names(file: _File) -> None:
    """Raise ValueError for an unknown task type or setting, and for invalid seeds."""
    for key in file.types:
        if key not in TASK_TYPES:
            raise ValueError(f"types: unknown task type {key!r}{nearest(key, list(TASK_TYPES))}")
    known = FinetuneSettings.__struct_fields__
    sections = {f"types.{key}": changes for key, changes in file.types.items()}
    sections |= {f"tasks.{key}": changes for key, changes in file.tasks.items()}
    for section, changes in (("defaults", file.defaults), *sections.items()):
        for key in changes:
            if key not in known:
                raise ValueError(f"{section}: unknown setting {key!r}{nearest(key, list(known))}")
    seeds = file.seeds
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) > LAST_SEED:
        raise ValueError(f"seeds: give at least one, without duplicates, from 0 to {LAST_SEED:,}")


def _converted(values: Changes) -> FinetuneSettings:
    return msgspec.convert(values, FinetuneSettings)


def _reason(error: Exception) -> str:
    return str(error).replace("$.", "").replace(" - at `$`", "")


def _parsed(overrides: list[str]) -> Changes:
    parsed: Changes = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in FinetuneSettings.__struct_fields__:
            known = list(FinetuneSettings.__struct_fields__)
            raise DetourError(
                f"{override}: not key=value of a protocol{nearest(key, known)}; choose from {', '.join(known)}"
            )
        if key in parsed:
            raise DetourError(f"{override}: {key} is set twice; set it once")
        try:
            parsed[key] = float(value) if key.endswith("learning_rate") else parse_yaml(value, override)
        except ValueError:
            raise DetourError(f"{override}: {value!r} is not a number") from None
    return parsed
