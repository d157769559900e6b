"""Verdicts of made-up studies whose answers are known."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from megatron_detour.settings import read, to_plain
from megatron_detour.study.data import StudyData
from megatron_detour.study.judge import judge
from megatron_detour.study.records import Registration, Result
from megatron_detour.study.schema import StudyConfig

TASKS, SEEDS, FINETUNING = ["a", "b", "c", "d", "e", "f"], [1, 2, 3], [42, 43, 44]
STUDIES, TEXTS = 200, {"files": ["t"]}
HELPS, LOSES = "detour > control on mean of tasks, p < 0.05", "frozen not > control on mean of tasks, p < 0.05"


def study(**criteria: str) -> StudyConfig:
    content = {
        "name": "made up",
        "folder": "nowhere",
        "run": "nothing.yaml",
        "arms": {"detour": {}, "control": {}, "frozen": {}},
        "seeds": SEEDS,
        "evaluation": {"data": "tasks", "tasks": TASKS},
        "analyses": {"drift": {"texts": TEXTS, "noise": "control"}, "persistence": {"texts": TEXTS}, "needle": TEXTS},
        "criteria": criteria,
    }
    return read(StudyConfig, content, "")


def verdicts_of(config: StudyConfig, lines: list[dict], depth: int = 6) -> list[dict]:
    facts = {"format": 1, "name": "", "registered": "", "sha256": "", "depth": depth, "study": to_plain(config)}
    registration = msgspec.convert(facts | {"arms": {arm: {"phases": []} for arm in config.arms}}, Registration)
    return judge(config, StudyData(registration, [msgspec.convert(line, Result) for line in lines]))


def scores(rng: np.random.Generator, gain: float) -> list[dict]:
    """The detour is better by `gain`; the frozen arm equals the control."""
    lines = []
    for arm, better in (("detour", gain), ("control", 0.0), ("frozen", 0.0)):
        for seed in SEEDS:
            luck = rng.normal(0, 0.004)
            for task in TASKS:
                own = rng.normal(0, 0.004)
                for finetuning in FINETUNING:
                    score = 0.6 + better + luck + own + rng.normal(0, 0.015)
                    of = {"kind": "score", "arm": arm, "seed": seed, "task": task, "finetuning_seed": finetuning}
                    lines.append(of | {"score": score, "metric": "accuracy"})
    return lines


@pytest.mark.parametrize(("gain", "least", "most"), [(0.0, 0, 20), (0.08, 190, 200)])
def test_verdicts_of_two_hundred_studies(gain, least, most):
    """Two criteria are tested at 5% together: of 200 studies without a difference about 10 find one, and more than 20
    with a probability below 0.1%."""
    config, rng = study(helps=HELPS, loses=LOSES), np.random.default_rng(5)
    helps = loses = 0
    for _ in range(STUDIES):
        first, second = verdicts_of(config, scores(rng, gain))
        helps, loses = helps + first["met"], loses + second["met"]
    assert least <= helps <= most
    assert loses >= 180


def drift(seed: int, low: float, deep: float) -> dict:
    rows = [[low, low, 0.5, 0.5, deep, deep]] * 2
    return {
        "kind": "drift",
        "arm": "detour",
        "reference": "control",
        "seed": seed,
        "divergence": rows,
        "noise": [[0.1] * 6] * 2,
    }


def test_ratios_and_persistence_are_of_regions():
    config = study(
        low="drift ratio of low > 2, p < 0.05",
        more="drift ratio of low > drift ratio of deep, p < 0.05",
        stays="persistence of low > 0.8",
        loss="control > detour on loss",
    )
    lines = [drift(seed, low, 0.1) for seed, low in zip(SEEDS, (0.5, 0.52, 0.55), strict=True)]
    decay = [[0, [[0.5] * 6]], [100, [[0.3] * 6]]]
    of = {"kind": "persistence", "arm": "detour", "reference": "control"}
    lines += [of | {"seed": seed, "points": decay} for seed in SEEDS]
    losses = {"detour": 2.0, "control": 2.5}
    lines += [
        {"kind": "run", "arm": arm, "seed": s, "loss": x, "tokens": 1, "seconds": 1}
        for arm, x in losses.items()
        for s in SEEDS
    ]
    verdicts = {line["criterion"]: line for line in verdicts_of(config, lines)}
    assert [line["met"] for line in verdicts.values()] == [True, True, False, True]
    assert verdicts["low"]["mean"] == pytest.approx((5 * 5.2 * 5.5) ** (1 / 3))
    assert verdicts["stays"]["mean"] == pytest.approx(0.6)
    assert verdicts["loss"]["mean"] == pytest.approx(0.5)


def test_needles_are_compared_in_points():
    of = {"kind": "needle", "examples": 225, "by_length": [], "by_place": []}
    lines = [
        of | {"arm": arm, "seed": seed, "accuracy": share + 0.01 * seed * (arm == "detour")}
        for arm, share in (("detour", 0.6), ("control", 0.5))
        for seed in SEEDS
    ]
    config = study(finds="detour > control on needle, p < 0.05")
    (verdict,) = verdicts_of(config, lines)
    assert verdict["met"] and verdict["mean"] == pytest.approx(0.12)
    assert verdict["sentence"].startswith("detour minus control: +12.0 points (95%")


def test_a_single_training_seed_is_not_judged_either_way():
    lines = [line for line in scores(np.random.default_rng(1), 0.1) if line["seed"] == 1]
    for verdict in verdicts_of(study(helps=HELPS, loses=LOSES), lines):
        assert verdict["met"] is None
        assert verdict["sentence"].startswith("not judged: a single training seed")


def test_a_region_that_a_shallow_model_lacks_is_not_judged():
    config = study(deep="drift of deep > 0.1, p < 0.05")
    (verdict,) = verdicts_of(config, [], depth=2)
    assert verdict["sentence"] == "not judged: the encoder has no deep layers"


def test_a_failed_arm_is_not_judged_but_told():
    lines = [line for line in scores(np.random.default_rng(1), 0.1) if line["arm"] != "detour"]
    lines += [drift(seed, low, 0.1) for seed, low in zip(SEEDS, (0.5, 0.52, 0.55), strict=True)]
    low = "drift ratio of low > 2, p < 0.05"
    verdict, other = verdicts_of(study(helps=HELPS, low=low), lines)
    (alone,) = verdicts_of(study(low=low), lines)
    assert other["p"] == pytest.approx(2 * alone["p"])  # the criterion without results was registered too
    assert verdict["met"] is None
    assert verdict["sentence"].startswith("not judged: detour has no scores")


def test_outcomes_tell_the_undecided_from_the_contradicted():
    config = study(
        above="drift of low > 0.1, p < 0.05", below="drift of low > 0.9, p < 0.05",
        close="drift of low > 0.52, p < 0.05",
        less="detour < control on loss, p < 0.05", more="control < detour on loss, p < 0.05", loses=LOSES,
    )  # fmt: skip
    lines = [drift(seed, low, 0.1) for seed, low in zip(SEEDS, (0.5, 0.52, 0.55), strict=True)]
    losses, run = {"detour": 2.0, "control": 2.5}, {"kind": "run", "tokens": 1, "seconds": 1}
    lines += [run | {"arm": arm, "seed": s, "loss": loss + 0.01 * s} for arm, loss in losses.items() for s in SEEDS]
    lines[-1]["loss"] += 0.001  # the differences vary
    lines += scores(np.random.default_rng(2), 0.0)
    found = {line["criterion"]: line for line in verdicts_of(config, lines)}
    assert {name: line["outcome"] for name, line in found.items()} == {
        "above": "Met", "below": "Contradicted", "close": "Undecided", "less": "Met", "more": "Contradicted",
        "loses": "Met by absence",
    }  # fmt: skip
    assert found["less"]["sentence"].startswith("detour minus control: −0.500 nats per masked token, less is better")
    assert found["more"]["sentence"].startswith("control minus detour: +0.500 nats")
