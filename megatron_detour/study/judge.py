"""The verdicts of a study's criteria, from its results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.errors import DetourError
from megatron_detour.settings import read
from megatron_detour.study.criteria import MEAN, OTHER, Criterion, Quantity
from megatron_detour.study.data import StudyData, regions, share_kept
from megatron_detour.study.jobs import write_lines
from megatron_detour.study.records import LOSS, NEEDLE, REGISTRATION, RESULTS
from megatron_detour.study.registration import registered
from megatron_detour.study.results import Line, read_lines
from megatron_detour.study.schema import StudyConfig
from megatron_detour.study.statistics import Comparison, compare, compare_values, verdicts

NO_TEST = 0.05  # the level of intervals of a criterion without a test


def write_verdicts(folder: Path) -> None:
    """Judge the results of a study's folder by its registered criteria, and write the verdicts beside them."""
    study = registered(folder)["study"] | {"folder": str(folder)}
    config = read(StudyConfig, study, str(folder / REGISTRATION))
    lines = [line for line in read_lines(folder) if line["kind"] != "verdict"]
    write_lines(folder / RESULTS, [*lines, *judge(config, StudyData.read(folder))])


def judge(config: StudyConfig, data: StudyData) -> list[Line]:
    """Return a verdict line per criterion. `met` is None where the results do not suffice."""
    criteria = {name: Criterion.parse(text, config) for name, text in config.criteria.items()}
    compared: dict[str, Comparison] = {}
    missing: dict[str, str] = {}
    for name, criterion in criteria.items():
        try:
            compared[name] = _compare(criterion, config, data)
        except DetourError as reason:
            missing[name] = str(reason)
    tested = [name for name in compared if criteria[name].level is not None]
    pairs = [(compared[name], "not above" if criteria[name].negated else "above") for name in tested]
    unjudged = sum(criteria[name].level is not None and not criteria[name].negated for name in missing)
    judged = dict(zip(tested, verdicts(pairs, unjudged), strict=True))
    output = []
    for name, criterion in criteria.items():
        line: Line = {"kind": "verdict", "criterion": name, "text": criterion.text}
        if name in missing:
            line |= {"met": None, "outcome": "Not judged", "sentence": f"not judged: {missing[name]}", "p": None}
        else:
            line |= _verdict(criterion, compared[name], judged.get(name))
        output.append(line)
    return output


def _verdict(criterion: Criterion, found: Comparison, judged: Any) -> Line:
    if judged is None:
        met, p = (found.mean > found.than) != criterion.negated, None
    else:
        met, p = judged.met, judged.p
    figures = {key: getattr(found, key) for key in ("mean", "low", "high", "at_least", "at_most", "than")}
    return {
        "met": bool(met),
        "outcome": _outcome(criterion, found, bool(met)),
        "p": p,
        **figures,
        "seeds": found.training_seeds,
        "sentence": _sentence(criterion, found, p),
    }


def _outcome(criterion: Criterion, found: Comparison, met: bool) -> str:
    if met:
        return "Met by absence" if criterion.negated and criterion.level is not None else "Met"
    if criterion.negated or criterion.level is None:
        return "Not met"
    return "Contradicted" if found.high is not None and found.high < found.than else "Undecided"


def _sentence(criterion: Criterion, found: Comparison, p: float | None) -> str:
    """Return what was found. A difference of losses is that of the arm that is claimed to have less."""
    loss = criterion.measure == LOSS
    left, right = _name(criterion.left), _name(criterion.right)
    what = f"{right} minus {left}" if loss else f"{left} minus {right}" if criterion.measure else left
    if isinstance(criterion.right, Quantity):
        what = f"{left} over {right}"
    mean, low, high = found.mean, found.low, found.high
    if loss:
        mean, low, high = -mean, *((None, None) if low is None else (-high, -low))
    interval = "" if low is None else f" ({1 - found.level:.0%} {_shown(criterion, low)} to {_shown(criterion, high)})"
    test = ""
    if p is not None:
        test = f"; one-sided p = {found.p_above:.3g}"
        test += "" if criterion.negated else f", {p:.3g} after Holm's correction"
    seeds = f"{found.training_seeds} training seed{'' if found.training_seeds == 1 else 's'}"
    return f"{what}: {_shown(criterion, mean)}{_unit(criterion)}{interval}{test}; {seeds}"


def _unit(criterion: Criterion) -> str:
    if criterion.measure == LOSS:
        return " nats per masked token, less is better"
    return " points" if criterion.measure else ""


def _shown(criterion: Criterion, value: float) -> str:
    if criterion.measure == LOSS:
        return f"{value:+.3f}".replace("-", "−")
    return f"{100 * value:+.1f}".replace("-", "−") if criterion.measure else f"{value:.2f}"


def _name(side: str | Quantity | float) -> str:
    if isinstance(side, Quantity):
        return f"{side.name} of {side.region}" + (f" in {side.arm}" if side.arm else "")
    return str(side)


def _compare(criterion: Criterion, config: StudyConfig, data: StudyData) -> Comparison:
    """Raises DetourError if the results do not suffice."""
    level = NO_TEST if criterion.level is None else criterion.level
    left, right = criterion.left, criterion.right
    if isinstance(left, Quantity):
        found = _compare_quantities(left, right, config, data, level)
    elif (measure := criterion.measure) in (LOSS, NEEDLE):
        found = compare_values(*(_by_seed(data, data.figures(measure, arm)) for arm in (left, right)), level=level)
    else:
        found = _compare_scores(criterion, config, data, level)
    if criterion.level is not None and found.low is None and found.training_seeds == 1:
        mean = _shown(criterion, -found.mean if criterion.measure == LOSS else found.mean)
        raise DetourError(f"a single training seed ({mean}{_unit(criterion)}) says nothing about others")
    return found


def _compare_scores(criterion: Criterion, config: StudyConfig, data: StudyData, level: float) -> Comparison:
    every = [Path(task).stem for task in config.evaluation.tasks]
    tasks = every if criterion.measure in (MEAN, OTHER) else [criterion.measure]
    tables = [data.scores(arm) for arm in (criterion.left, criterion.right)]
    for arm, table in zip((criterion.left, criterion.right), tables, strict=True):
        if table is None:
            raise DetourError(f"{arm} has no scores")
    if absent := [task for task in tasks if task not in data.tasks]:
        raise DetourError(f"{len(absent)} of {len(tasks)} tasks have no scores, {absent[0]} first")
    size = len(tasks), len(data.seeds), len(data.finetuning_seeds)
    rows = [data.tasks.index(task) for task in tasks]
    a, b = (np.broadcast_to(table[rows], size) for table in tables)  # the start model's scores are those of any seed
    kind = "random" if criterion.measure == OTHER else "fixed"
    found = compare(a, b, criterion.method, tasks=kind, level=level)
    if found.tasks < len(tasks):
        absent = len(tasks) - found.tasks
        raise DetourError(f"{absent} of {len(tasks)} tasks have no scores of both arms for a common training seed")
    return found


def _compare_quantities(
    left: Quantity, right: Quantity | float, config: StudyConfig, data: StudyData, level: float
) -> Comparison:
    values = _quantity(left, config, data)
    if isinstance(right, Quantity):
        return compare_values(values, _quantity(right, config, data), log=True, level=level)
    return compare_values(values, than=right, log=left.name == "drift ratio" and right > 0, level=level)


def _quantity(quantity: Quantity, config: StudyConfig, data: StudyData) -> list[float]:
    """Return the quantity per training seed; NaN where missing. Raises DetourError if no seed has it."""
    layers = regions(data).get(quantity.region)
    if layers is None:
        raise DetourError(f"the encoder has no {quantity.region} layers")
    if quantity.name == "persistence":
        records = data.persistence.get(config.analyses.persistence.arm, ())
        found = {record.seed: share_kept(record, layers) for record in records}
    else:
        drifts = data.drifts.get(quantity.arm or config.analyses.drift.of[0], ())
        figure = 2 if quantity.name == "drift ratio" else 0
        found = {drift.seed: drift.region(layers)[figure] for drift in drifts}
    values = _by_seed(data, found)
    if all(map(math.isnan, values)):
        raise DetourError(f"no training seed has a {quantity.name}")
    return values


def _by_seed(data: StudyData, found: dict[int, float]) -> Sequence[float]:
    return [found.get(seed, math.nan) for seed in data.seeds]
