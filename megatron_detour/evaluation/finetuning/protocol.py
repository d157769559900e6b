"""How models are fine-tuned: a protocol is a file of settings, by the type of the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import yaml

from megatron_detour.errors import DetourError, nearest
from megatron_detour.evaluation.task import TYPES

FOLDER = Path(__file__).parent / "protocols"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fine-tuning of one task; everything here decides on its figures."""

    learning_rate: float
    batch: int
    max_length: int  # tokens; a longer text is cut, to the model's own limit at most
    epochs: float = 3
    steps: int | None = None  # instead of epochs
    validate_every: int | None = None  # steps; None: every epoch
    head_learning_rate: float | None = None  # None: the learning rate of the rest
    warmup: float = 0.0  # share of the steps
    schedule: Literal["linear", "constant", "cosine"] = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0  # norm of the gradient
    pooling: Literal["cls", "mean"] | None = None  # of a text; None: as the model's own configuration says
    head: Literal["transformers", "linear"] = "transformers"  # linear: without the dense layer in front of it
    ner_head: Literal["tokens", "span"] = "tokens"
    select_by: str | None = None  # the metric on the validation split; None: the task's own
    by_length: bool = False  # texts of like length in a batch: faster
    train_examples: int | None = None  # at most, drawn at random, the same ones for every model and seed
    dev_examples: int | None = None

    def __post_init__(self) -> None:
        for key in ("learning_rate", "batch", "max_length", "epochs", "clip"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key} must be above 0, it is {getattr(self, key)}")
        for key in ("steps", "validate_every", "head_learning_rate", "train_examples", "dev_examples"):
            if getattr(self, key) is not None and getattr(self, key) <= 0:
                raise ValueError(f"{key} must be above 0 or left out, it is {getattr(self, key)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a share of the steps, from 0 to below 1, it is {self.warmup}")


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    about: str
    seeds: list[int]
    defaults: dict[str, Any]
    types: dict[str, dict[str, Any]] = {}


class Protocol(msgspec.Struct, frozen=True):
    """Settings for every type of task. `name` says the overrides as well: they make it another protocol."""

    name: str
    about: str
    seeds: tuple[int, ...]
    by_type: dict[str, Settings]

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
    try:
        file = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), _File)
        for key in file.types:
            if key not in TYPES:
                raise DetourError(f"{path}: types.{key} is no type of task{nearest(key, list(TYPES))}")
        by_type = {kind: _settings(file, kind, given) for kind in TYPES}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DetourError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from None
    except msgspec.ValidationError as error:
        where = f"{path}{' with ' + ' '.join(overrides) if overrides else ''}"
        raise DetourError(f"{where}: {str(error).replace('$.', '').replace(' - at `$`', '')}") from None
    if not file.seeds:
        raise DetourError(f"{path}: seeds: give one at least")
    shown = path.stem + "".join(f" {key}={value}" for key, value in sorted(given.items()))
    return Protocol(shown, file.about, tuple(file.seeds), by_type)


def _settings(file: _File, kind: str, given: dict[str, Any]) -> Settings:
    return msgspec.convert(file.defaults | file.types.get(kind, {}) | given, Settings)


def _parsed(overrides: list[str]) -> dict[str, Any]:
    parsed = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in Settings.__struct_fields__:
            known = list(Settings.__struct_fields__)
            raise DetourError(
                f"{override}: give key=value with a key of the protocol: {', '.join(known)}{nearest(key, known)}"
            )
        try:
            parsed[key] = float(value) if key.endswith("learning_rate") else yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):
            raise DetourError(f"{override}: {value!r} cannot be read as a value") from None
    return parsed
