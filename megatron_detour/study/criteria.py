"""The language of criteria: a comparison, what it is of, and the level of its test.

    detour > control on mean of tasks, p < 0.05
    low_frozen not > control on mean of tasks, p < 0.05
    detour < control on loss, p < 0.05
    detour > control on needle, p < 0.05
    drift ratio of low > 2, p < 0.05
    drift ratio of low > drift ratio of deep, p < 0.05
    persistence of low > 0.8

`on` names a task, `mean of tasks`, `needle`, or `loss`, the final validation loss under fixed masks. The
paper's bootstrap is `by bootstrap`, a test for other tasks of the kind `on mean of other tasks`. Without `p <` the
measured values are compared.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from megatron_detour.analysis.drift import REGIONS as THIRDS
from megatron_detour.errors import DetourError, nearest
from megatron_detour.study.records import LOSS, NEEDLE, START
from megatron_detour.study.schema import StudyConfig
from megatron_detour.study.statistics import Method

MEAN, OTHER = "mean of tasks", "mean of other tasks"
QUANTITIES = ("drift ratio", "drift", "persistence")
REGIONS = (*THIRDS, "all")
METHODS = get_args(Method)
_SHAPE = re.compile(
    r"(?P<left>.+?)\s+(?P<negated>not\s+)?(?P<sign>[<>])\s+(?P<right>.+?)"
    r"(?:\s+on\s+(?P<measure>.+?))?(?:\s+by\s+(?P<method>\w+))?(?:,\s*p\s*<\s*(?P<level>[\d.]+))?"
)
_QUANTITY = re.compile(r"(?P<name>drift ratio|drift|persistence) of (?P<region>\w+)(?: in (?P<arm>\w+))?")


@dataclass(frozen=True)
class Quantity:
    """A figure of an analysis, one per training seed, as a mean over the layers of a region."""

    name: str
    region: str
    arm: str | None = None  # of several in the drift analysis; by default the first


@dataclass(frozen=True)
class Criterion:
    """`left` > `right`, however it is written, or with `negated` the failure to show it.

    Arms have a `measure`; quantities have none.
    """

    text: str
    left: str | Quantity
    right: str | Quantity | float
    negated: bool
    measure: str | None
    method: str
    level: float | None

    @classmethod
    def parse(cls, text: str, config: StudyConfig) -> Criterion:
        """Raises DetourError if the text is not a criterion of this study."""
        found = _SHAPE.fullmatch(" ".join(text.split()))
        if found is None:
            raise DetourError(
                f"{text!r} is not a criterion; write LEFT > RIGHT on MEASURE, p < 0.05, such as "
                f"'detour > control on {MEAN}, p < 0.05' or 'drift ratio of low > 2'"
            )
        method, measure = found["method"] or "hierarchical", found["measure"]
        if method not in METHODS:
            raise DetourError(f"by {method}: unknown test{nearest(method, METHODS)}; choose from {', '.join(METHODS)}")
        level = None if found["level"] is None else _level(found["level"])
        left, right = _side(found["left"], config), _side(found["right"], config)
        if isinstance(right, float) and found["sign"] == "<":
            raise DetourError(f"{text!r}: a quantity is compared with a number by >")
        if isinstance(left, float):
            raise DetourError(f"{text!r}: the number comes after the >")
        if isinstance(left, str) != isinstance(right, str):
            raise DetourError(f"{text!r}: compare two arms, two quantities, or a quantity with a number")
        _check_measure(left, measure, config)
        if found["method"] and measure in (None, LOSS, NEEDLE, OTHER):
            raise DetourError(f"by {method}: a choice for tasks only; {measure or 'a quantity'} has one test")
        for arm in (left, right):
            _check_arm(arm, measure, config)
        if found["sign"] == "<":
            left, right = right, left
        return cls(text, left, right, bool(found["negated"]), measure, method, level)


def _level(text: str) -> float:
    try:
        level = float(text)
    except ValueError:
        level = 0.0
    if not 0 < level < 1:
        raise DetourError(f"p < {text}: the level must be between 0 and 1")
    return level


def _side(text: str, config: StudyConfig) -> str | Quantity | float:
    try:
        return float(text)
    except ValueError:
        pass
    if found := _QUANTITY.fullmatch(text):
        return _quantity(found["name"], found["region"], found["arm"], config)
    if text in config.arms or (text == START and config.evaluation):
        return text
    raise DetourError(
        f"{text!r} is neither an arm ({', '.join(config.arms)}) nor a quantity "
        f"({', '.join(QUANTITIES)}, each `of` {', '.join(REGIONS)}){nearest(text, config.arms)}"
    )


def _quantity(name: str, region: str, arm: str | None, config: StudyConfig) -> Quantity:
    analyses = config.analyses
    if region not in REGIONS:
        raise DetourError(f"{name} of {region}: unknown region{nearest(region, REGIONS)}; {', '.join(REGIONS)}")
    if name == "persistence":
        if analyses.persistence is None:
            raise DetourError(f"{name} of {region}: the study has no analyses.persistence")
        if arm not in (None, analyses.persistence.arm):
            raise DetourError(f"{name} of {region} in {arm}: analyses.persistence.arm is {analyses.persistence.arm}")
    if name.startswith("drift"):
        if analyses.drift is None:
            raise DetourError(f"{name} of {region}: the study has no analyses.drift")
        if name == "drift ratio" and analyses.drift.noise is None:
            raise DetourError(f"{name} of {region}: set analyses.drift.noise, an arm that differs by its seed only")
        if arm is not None and arm not in analyses.drift.of:
            raise DetourError(f"{name} of {region} in {arm}: {arm} is not in analyses.drift.of")
    return Quantity(name, region, arm)


def _check_measure(left: str | Quantity, measure: str | None, config: StudyConfig) -> None:
    if isinstance(left, Quantity):
        if measure is not None:
            raise DetourError(f"on {measure}: a quantity is compared as it is; remove `on {measure}`")
        return
    tasks = [Path(task).stem for task in config.evaluation.tasks] if config.evaluation else []
    known = [LOSS, *([NEEDLE] if config.analyses.needle else []), *([MEAN, OTHER] if tasks else []), *tasks]
    if measure not in known:
        raise DetourError(f"on {measure}: compare arms on one of {', '.join(known)}{nearest(str(measure), known)}")


def _check_arm(arm: str | Quantity | float, measure: str | None, config: StudyConfig) -> None:
    if measure == LOSS and arm == START:
        raise DetourError(f"on {LOSS}: {START} is not trained, so that it has no final loss")
    if measure == NEEDLE and arm not in config.analyses.needle.of:
        raise DetourError(f"on {NEEDLE}: {arm} is not in analyses.needle.of")
    if measure not in (None, LOSS, NEEDLE) and arm in config.arms and not config.arms[arm].evaluate:
        raise DetourError(f"on {measure}: {arm} has `evaluate: false`, so that it gets no scores")
