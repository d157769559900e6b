"""Facts about a checkpoint: settings and plan from its own state, metrics from its run directory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_detour.checkpoint.huggingface import RUN_STATE
from megatron_detour.config import RunConfig, from_dict
from megatron_detour.data.manifest import manifest_path
from megatron_detour.errors import DetourError
from megatron_detour.observe.run_files import read_state
from megatron_detour.observe.run_folder import Run, read_run
from megatron_detour.observe.steps import Steps
from megatron_detour.plan import Plan, PlannedPhase
from megatron_detour.release.cleaning import filters
from megatron_detour.structured import parse_yaml, read_json_object

# Required keys that a checkpoint does not record; no card shows them.
NOT_IN_THE_TRAJECTORY = {"name": "run", "folder": "run", "deepspeed": "not kept"}

UNRECORDED = {"ranks": 1, "device": "unknown device", "tensor_parallel": 1, "dtype": "unknown"}

# Errors that reading the state of another version may end in.
INVALID_STATE = (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, DetourError)


@dataclass(frozen=True)
class Corpus:
    """Facts about a corpus. `documents` and `tokens` are None if unknown."""

    prefix: str  # a path, which no card shows
    name: str  # the last part of the prefix
    documents: int | None
    tokens: int | None
    shares: dict[str, float]  # fraction of the tokens, by phase
    languages: tuple[str, ...]  # that its build filtered for
    cleaning: str  # filters and removed documents; empty without a manifest
    held_out: str  # documents held out for validation; likewise


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint and its run up to it. Without a run directory, `run` has no records and no sessions."""

    checkpoint: Path
    state: dict[str, Any]  # run_state.json
    config: RunConfig
    plan: Plan
    run: Run
    has_run_folder: bool

    @classmethod
    def read(cls, checkpoint: Path) -> CheckpointInfo:
        """Raises DetourError if the state is invalid or of another version, or the run directory of another run."""
        state = read_state(checkpoint / RUN_STATE)
        try:
            config = from_dict(_nested(state["trajectory"]), "its settings")
            plan = Plan.from_config(config)
            step, tokens, total = state["step"], state["tokens"], state["total_steps"]
            fits = total == plan.total_steps and (not step or plan.step(step).tokens == tokens)
        except INVALID_STATE as fault:
            raise DetourError(f"{checkpoint / RUN_STATE}: invalid, or of another version: {fault}") from None
        if not fits:
            raise DetourError(f"{checkpoint / RUN_STATE}: step {step} and {tokens:,} tokens do not match its settings")
        folder = checkpoint.resolve().parent.parent
        has_folder = checkpoint.resolve().parent.name == "checkpoints" and (folder / "plan.json").is_file()
        run = read_run(folder) if has_folder else Run(folder, "", plan.to_dict(), "", {}, Steps.none(), [], [])
        if run.plan["total_steps"] != total:
            raise DetourError(f"{folder / 'plan.json'}: belongs to another run than {checkpoint.name}")
        validations, guarded = ([r for r in records if r["step"] <= step] for records in (run.validations, run.guarded))
        upto = {"steps": run.steps.between(0, step), "validations": validations, "guarded": guarded}
        run = dataclasses.replace(run, plan=plan.to_dict(), **upto)
        return cls(checkpoint, state, config, plan, run, has_folder)

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def tokens(self) -> int:
        """Tokens read so far, including padding."""
        return self.state["tokens"]

    @property
    def finished(self) -> bool:
        return self.step >= self.plan.total_steps

    @property
    def last_phase(self) -> PlannedPhase | None:
        """The phase of the last step; None before the first step."""
        return self.plan.step(self.step).phase if self.step else None

    def tokens_of(self, phase: PlannedPhase) -> int:
        return min(max(self.tokens - phase.start, 0), phase.tokens)

    def steps_of(self, phase: PlannedPhase) -> int:
        return min(max(self.step - phase.first_step + 1, 0), phase.steps)

    @property
    def versions(self) -> dict[str, str]:
        return self.state.get("versions") or {}

    @cached_property
    def run_settings(self) -> dict[str, Any]:
        """All keys of run.yaml; the checkpoint itself has only those that determine the weights."""
        try:
            settings = parse_yaml(self.run.run_file, str(self.run.folder / "run.yaml"))
        except DetourError:
            settings = None
        return settings if isinstance(settings, dict) else {}

    @cached_property
    def sessions(self) -> list[dict[str, Any]]:
        """The sessions that trained steps up to the checkpoint, with their number of `steps` and `seconds`."""
        starts = [session.get("step", 0) for session in self.run.sessions]
        ends = [*starts, self.step][1:]
        sessions = []
        for session, start, end in zip(self.run.sessions, starts, ends, strict=True):
            end = min(end, self.step)
            if end > start:
                seconds = self.run.steps.between(start + 1, end).total("seconds")
                sessions.append({**UNRECORDED, **session, "steps": end - start, "seconds": seconds})
        return sessions

    @cached_property
    def corpora(self) -> list[Corpus]:
        """The corpora of all phases, in order of first use."""
        prefixes = list(dict.fromkeys(corpus.prefix for phase in self.plan.phases for corpus in phase.corpora))
        names = _names(prefixes)
        counted = {facts["prefix"]: facts for facts in self.run.environment.get("corpora") or []}
        return [self._corpus(prefix, names[prefix], counted.get(prefix)) for prefix in prefixes]

    def _corpus(self, prefix: str, name: str, counted: dict[str, Any] | None) -> Corpus:
        manifest = self._manifest(prefix)
        counted = counted or manifest
        shares = {}
        for phase in self.plan.phases:
            weights = {corpus.prefix: corpus.weight for corpus in phase.corpora}
            if prefix in weights:
                shares[phase.name] = weights[prefix] / sum(weights.values())
        languages = tuple(manifest["options"].get("language") or ()) if manifest else ()
        numbers = counted.get("documents"), counted.get("tokens")
        return Corpus(prefix, name, *numbers, shares, languages, *(filters(manifest) if manifest else ("", "")))

    def _manifest(self, prefix: str) -> dict[str, Any]:
        """Return the corpus's manifest, or {} if it is missing, invalid or describes other data than the run read."""
        try:
            manifest = read_json_object(manifest_path(prefix))
            same = manifest["files"]["bin"]["sha256"] == self.state["corpora"][prefix]
            filters(manifest)
        except (DetourError, OSError, KeyError, TypeError, ValueError, AttributeError):
            return {}
        return manifest if same else {}


def _nested(trajectory: dict[str, Any]) -> dict[str, Any]:
    """Nest a mapping of dotted keys to scalars, as in a run file."""
    whole: dict[str, Any] = {}
    for key, value in trajectory.items():
        here = whole
        *way, last = key.split(".")
        for part in way:
            here = here.setdefault(part, {})
        here[last] = value
    if whole["model"].get("start") is None:
        whole["model"].setdefault("config", {})
    return _lists(whole) | NOT_IN_THE_TRAJECTORY


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value and all(key.isdecimal() for key in value):
        return [_lists(value[key]) for key in sorted(value, key=int)]
    return {key: _lists(item) for key, item in value.items()}


def _names(prefixes: list[str]) -> dict[str, str]:
    """Name each prefix by its last part, or by its last two if that is ambiguous."""
    last = {prefix: Path(prefix).name for prefix in prefixes}
    names = list(last.values())
    return {p: n if names.count(n) == 1 else "/".join(Path(p).parts[-2:]) for p, n in last.items()}
