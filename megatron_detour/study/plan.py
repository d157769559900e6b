"""The runs of a study: for each arm and training seed a run file, and which run it can continue."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from megatron_detour.analysis.drift import REGIONS, thirds
from megatron_detour.config import RunConfig, as_control, from_dict, load
from megatron_detour.errors import DetourError, format_faults, nearest
from megatron_detour.evaluation.finetuning.protocol import Protocol, load_protocol
from megatron_detour.evaluation.task import Task, load_task
from megatron_detour.model.families import Family
from megatron_detour.model_parts import name_layers
from megatron_detour.plan import Plan
from megatron_detour.preflight import look, preflight
from megatron_detour.settings import Faults, read
from megatron_detour.structured import read_yaml
from megatron_detour.study.criteria import Criterion
from megatron_detour.study.records import START
from megatron_detour.study.schema import Arm, StudyConfig
from megatron_detour.ui.format import counted

OWN_KEYS = {"name", "folder", "seed", "data.order_seed", "tensorboard"}  # of the run file, which the study sets


@dataclass(frozen=True)
class Fork:
    """A run begins with the checkpoint that another one saved at the end of the phases that both have."""

    source: StudyRun
    tokens: int
    step: int


@dataclass(frozen=True)
class StudyRun:
    """The run of one arm with one training seed."""

    arm: str
    seed: int
    config: RunConfig
    fork: Fork | None = None

    @property
    def name(self) -> str:
        return run_name(self.arm, self.seed)

    @property
    def folder(self) -> Path:
        return Path(self.config.folder)

    @cached_property
    def plan(self) -> Plan:
        return Plan.from_config(self.config)

    def refuse(self) -> None:
        """Raise DetourError with everything that would stop the run."""
        preflight(self.config, self.plan, owns_folder=False).refuse()

    @property
    def new_tokens(self) -> int:
        """Tokens that no earlier run of the study has trained on."""
        return self.plan.total_tokens - (self.fork.tokens if self.fork else 0)


def run_name(arm: str, seed: int | None) -> str:
    return arm if seed is None else f"{arm}-s{seed}"


@dataclass(frozen=True)
class Study:
    """A study file that was read and found whole."""

    config: StudyConfig
    path: Path
    shape: Family
    criteria: dict[str, Criterion]
    runs: tuple[StudyRun, ...]

    @property
    def folder(self) -> Path:
        return Path(self.config.folder)

    @property
    def start(self) -> str | None:
        """The folder of the start model; None if the runs initialize one."""
        return self.runs[0].config.model.start

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        """Raises DetourError for a task of another name than its file's, by which criteria know it."""
        evaluation = self.config.evaluation
        tasks = tuple(load_task(self._beside(name)) for name in evaluation.tasks) if evaluation else ()
        for task, file in zip(tasks, evaluation.tasks if evaluation else (), strict=True):
            if task.name != Path(file).stem:
                raise DetourError(f"{self.path}: evaluation.tasks: {file} has the name {task.name}; rename the file")
        return tasks

    @cached_property
    def protocol(self) -> Protocol:
        evaluation = self.config.evaluation
        words = [f"{key}={json.dumps(value)}" for key, value in evaluation.set.items()]
        return load_protocol(self._beside(evaluation.protocol), words)

    @property
    def finetuning_seeds(self) -> tuple[int, ...]:
        return self.protocol.first_seeds(self.config.evaluation.seeds)

    def _beside(self, name: str) -> str:
        """A file may be named relative to the study file."""
        beside = self.path.parent / name
        return str(beside) if beside.is_file() else name

    def run(self, arm: str, seed: int) -> StudyRun:
        return next(run for run in self.runs if (run.arm, run.seed) == (arm, seed))


def read_study(path: Path) -> Study:
    """Read a study file, its run file and all its arms. Raises DetourError with every fault."""
    raw = _read_mapping(path)
    config = read(StudyConfig, raw, str(path), _check)
    base_path = path.parent / config.run if (path.parent / config.run).exists() else Path(config.run)
    base = load(base_path)
    model = look(base.model)
    faults_of_base = preflight(base, Plan.from_config(base), owns_folder=False).faults
    if faults_of_base:
        raise DetourError(f"{base_path}: {format_faults(list(faults_of_base))}")
    runs: list[StudyRun] = []
    faults = []
    for name, arm in config.arms.items():
        try:
            runs += [_run(config, base_path, name, arm, seed, model.shape.layers, runs) for seed in config.seeds]
            runs[-1].refuse()
        except DetourError as fault:
            faults.append(f"arms.{name}: {fault}")
    faults += [] if faults else _unlike(config, runs)
    if config.analyses.transplants and model.shape.layers < len(REGIONS):
        faults.append("analyses.transplants: they exchange thirds of the layers; the model needs three layers")
    criteria = {}
    for name, text in config.criteria.items():
        try:
            criteria[name] = Criterion.parse(text, config)
        except DetourError as fault:
            faults.append(f"criteria.{name}: {fault}")
    if faults:
        raise DetourError(f"{path}: {format_faults(faults)}")
    return Study(config, path, model.shape, criteria, _in_order(runs, config))


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        raise DetourError(f"{path}: no such study file") from None
    if not isinstance(raw, dict):
        raise DetourError(f"{path}: a study file is a YAML mapping with keys such as name, run, arms and criteria")
    return raw


def _check(config: StudyConfig, faults: Faults) -> None:
    if not config.arms:
        faults.add("arms", "give at least one arm, such as `detour: {}`")
    for name, arm in config.arms.items():
        if not name.isidentifier() or name == START:
            faults.add(f"arms.{name}", f"must be letters, digits and _, beginning with a letter, and not {START!r}")
        for key in OWN_KEYS & arm.set.keys():
            faults.add(f"arms.{name}.set", f"{key} is set by the study; use `seeds` and `seed_offset` for seeds")
    analyses = config.analyses
    named = {}
    if analyses.drift:
        drift = analyses.drift
        named |= {f"analyses.drift.of.{i}": arm for i, arm in enumerate(drift.of)}
        named |= {"analyses.drift.reference": drift.reference, "analyses.drift.noise": drift.noise}
    if analyses.persistence:
        named |= {f"analyses.persistence.{key}": getattr(analyses.persistence, key) for key in ("arm", "reference")}
    if analyses.transplants:
        named |= {f"analyses.transplants.{key}": getattr(analyses.transplants, key) for key in ("donor", "recipient")}
        tasks = [Path(task).stem for task in config.evaluation.tasks] if config.evaluation else []
        if analyses.transplants.task not in (None, *tasks):
            faults.add("analyses.transplants.task", f"must be one of evaluation.tasks: {', '.join(tasks) or 'none'}")
    if analyses.needle:
        named |= {f"analyses.needle.of.{i}": arm for i, arm in enumerate(analyses.needle.of)}
    if analyses.layers and not (analyses.drift and analyses.drift.noise and analyses.layers.arm in analyses.drift.of):
        faults.add("analyses.layers", "needs analyses.drift with noise, and layers.arm in its `of`")
    for file in text_files(config):
        if not Path(file).is_file():
            faults.add("analyses", f"{file}: no such file")
    for key, arm in named.items():
        if arm is not None and arm not in config.arms:
            faults.add(key, f"{arm!r} is no arm{nearest(arm, config.arms)}", ["arms"])


def _run(
    config: StudyConfig, base: Path, name: str, arm: Arm, seed: int, depth: int, earlier: list[StudyRun]
) -> StudyRun:
    folder = str(Path(config.folder) / "runs" / run_name(name, seed))
    overrides = {"seed": seed + arm.seed_offset, "data.order_seed": seed} | arm.set
    words = [f"{key}={_flow(_layers(key, value, depth))}" for key, value in overrides.items()]
    run = load(base, words)
    if arm.control is not None:
        run = as_control(run, arm.control)
    content = run.to_dict() | {"name": run_name(name, seed), "folder": folder, "tensorboard": False}
    run = from_dict(content, str(base))
    return StudyRun(name, seed, run, _fork(run, earlier))


def text_files(config: StudyConfig) -> list[str]:
    """Return the files of texts that the analyses read."""
    analyses = config.analyses
    files = [file for part in (analyses.drift, analyses.persistence) if part for file in part.texts.files]
    return list(dict.fromkeys([*files, *(analyses.needle.files if analyses.needle else ())]))


def _unlike(config: StudyConfig, runs: list[StudyRun]) -> Iterator[str]:
    """Yield the faults of arms that could not be compared as the study says."""
    by_arm = {run.arm: run for run in runs}
    first = runs[0]
    for arm, run in by_arm.items():
        if run.config.model != first.config.model:
            yield f"arms.{arm}: model is not that of {first.arm}; all arms start from one model"
        if held_out(run.config) != held_out(first.config):
            yield (
                f"arms.{arm}: validation.* or data.sequence_length are not those of {first.arm}, so that losses could "
                "not be compared"
            )
    drift, persistence = config.analyses.drift, config.analyses.persistence
    if drift and drift.noise:
        noise, reference = (by_arm[arm].config.trajectory() for arm in (drift.noise, drift.reference))
        if noise["seed"] == reference["seed"] or noise | {"seed": reference["seed"]} != reference:
            yield f"analyses.drift.noise: {drift.noise} must differ from {drift.reference} in seed_offset alone"
    if (transplants := config.analyses.transplants) and not transplants.task and not first.config.validation.corpora:
        yield "analyses.transplants: nothing to judge them by; set task, or validation.corpora in the run file"
    for arm in (persistence.arm, persistence.reference) if persistence else ():
        if persistence.phase not in [phase.name for phase in by_arm[arm].plan.phases[1:]]:
            yield f"analyses.persistence.phase: {persistence.phase!r} is no phase of {arm} after the first"


def held_out(config: RunConfig) -> dict[str, Any]:
    """Return the settings that determine which held-out tokens are masked; losses are comparable if they are equal."""
    settings = config.to_dict()["validation"]
    return {key: settings[key] for key in ("corpora", "sequences", "mask_rate", "seed")} | {
        "sequence_length": config.data.sequence_length
    }


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).strip().removesuffix("\n...")


def _layers(key: str, value: Any, depth: int) -> Any:
    """Replace `low`, `mid` and `deep` in a freeze list by the layers that they stand for."""
    if key.rpartition(".")[2] != "freeze" or not isinstance(value, list):
        return value
    regions = thirds(depth)
    if empty := [each for each in value if each in regions and not regions[each]]:
        raise DetourError(f"{key}: a model with {counted(depth, 'layer')} has no {empty[0]} layers")
    return [name_layers(regions[each]) if each in regions else each for each in value]


def _fork(config: RunConfig, earlier: list[StudyRun]) -> Fork | None:
    """Return the run that shares the most phases with this one, from the start."""
    best: Fork | None = None
    for run in earlier:
        shared = _shared_phases(config, run.config)
        if shared and (best is None or run.plan.phases[shared - 1].end > best.tokens):
            phase = run.plan.phases[shared - 1]
            best = Fork(run, phase.end, phase.last_step)
    return best


def _shared_phases(a: RunConfig, b: RunConfig) -> int:
    """Return the number of phases at the beginning after which two runs have the same weights."""
    if a.deepspeed != b.deepspeed:
        return 0  # another precision
    first, second = a.trajectory(), b.trajectory()
    split = {key.split(".")[1] for key in first.keys() | second.keys() if key.startswith("phases.")}
    for number in range(len(split)):
        if _up_to(first, number) != _up_to(second, number):
            return number
    return len(split)


def _up_to(trajectory: dict[str, Any], phase: int) -> dict[str, Any] | None:
    """Return the settings of a trajectory that matter until the end of a phase; None if it has fewer phases."""
    kept = {
        key: value
        for key, value in trajectory.items()
        if not key.startswith("phases.") or (int(key.split(".")[1]) <= phase and not key.endswith(".name"))
    }
    return kept if any(key.startswith(f"phases.{phase}.") for key in kept) else None


def _in_order(runs: list[StudyRun], config: StudyConfig) -> tuple[StudyRun, ...]:
    """By seed, so that all arms are comparable early; a run follows the one that it continues, an earlier arm."""
    return tuple(run for seed in config.seeds for run in runs if run.seed == seed)
