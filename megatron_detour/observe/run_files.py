"""Read and validate the parts of plan.json, environment.json and run_state.json that are used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict, get_type_hints

import msgspec

from megatron_detour.errors import DetourError
from megatron_detour.objectives import KINDS
from megatron_detour.settings import settings_of
from megatron_detour.structured import read_json

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Number = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]

_Warmup = TypedDict("_Warmup", {"from": Count, "tokens": Count})


class _Rate(TypedDict):
    peak: Number
    warmup_tokens: NotRequired[Number | None]
    shape: NotRequired[str | None]
    end: NotRequired[Number | None]


class _Weight(TypedDict):
    prefix: str
    weight: Number


class _AnyPhase(TypedDict):
    name: str
    objective: str
    first_step: Count
    steps: Count
    start_tokens: Count
    end_tokens: Count
    tokens: Count
    sequences: Count
    sequence_length: Count
    learning_rate: _Rate
    freeze: NotRequired[list[str] | None]
    optimizer_state: NotRequired[str | None]
    batch_warmup: NotRequired[_Warmup | None]
    corpora: NotRequired[list[_Weight] | None]


_Phase = TypedDict(
    "_Phase",
    get_type_hints(_AnyPhase, include_extras=True)
    | {key.name: NotRequired[key.kind | None] for kind in KINDS.values() for key in settings_of(kind)},
)


class _Plan(TypedDict):
    name: NotRequired[str | None]
    total_steps: Count
    total_tokens: Count
    phases: list[_Phase]


class _Source(TypedDict):
    path: str
    bytes: Count


class _Corpus(TypedDict):
    prefix: str
    weight: NotRequired[Number | None]
    documents: NotRequired[Count | None]
    tokens: NotRequired[Count | None]
    sha256: NotRequired[str | None]
    tokenizer_sha256: NotRequired[str | None]
    sources: NotRequired[list[_Source] | None]
    source_files: NotRequired[Count | None]
    source_bytes: NotRequired[Count | None]


class _Session(TypedDict):
    step: Count
    started: NotRequired[str | None]
    ended: NotRequired[str | None]
    ranks: NotRequired[Count | None]
    tensor_parallel: NotRequired[Count | None]
    host_cores: NotRequired[Count | None]
    device: NotRequired[str | None]
    attention: NotRequired[str | None]
    kernels: NotRequired[str | None]
    dtype: NotRequired[str | None]
    recompute: NotRequired[str | None]
    compile: NotRequired[bool | None]
    passed_over: NotRequired[list[str] | None]


class _Environment(TypedDict):
    sessions: NotRequired[list[_Session] | None]
    versions: NotRequired[dict[str, str] | None]
    model: NotRequired[dict[str, str | int | float | bool | None] | None]
    corpora: NotRequired[list[_Corpus] | None]
    validation_corpora: NotRequired[list[_Corpus] | None]
    unigram_loss: NotRequired[Number | None]


class _State(TypedDict):
    step: Count
    tokens: Count
    total_steps: Count
    trajectory: dict[str, Any]
    corpora: dict[str, str]
    versions: NotRequired[dict[str, str] | None]


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint's run_state.json. Raises DetourError for a missing or invalid file."""
    return _read(path, _State, "use another checkpoint")


def read_plan(path: Path) -> dict[str, Any]:
    """Read plan.json. Raises DetourError for a missing or invalid file."""
    return _read(path, _Plan)


def read_environment(path: Path) -> dict[str, Any]:
    """Read environment.json, {} if there is none. Raises DetourError for an invalid file."""
    return _read(path, _Environment) if path.exists() else {}


def _read(path: Path, kind: Any, remedy: str = "restore the file or restart the run") -> dict[str, Any]:
    try:
        content = read_json(path)
    except OSError as error:
        raise DetourError(f"{path}: cannot read ({error.strerror}); is this a run directory?") from None
    try:
        msgspec.convert(content, kind)
    except msgspec.ValidationError as fault:
        raise DetourError(f"{path}: {fault}; {remedy}") from None
    return content
