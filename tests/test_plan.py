"""The plan: the paper's steps, and every step's phase and learning rate as a function of tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_detour.config import as_control, from_dict, load
from megatron_detour.forecast import plan_table
from megatron_detour.objectives import MaskedLM
from megatron_detour.plan import Plan

RECIPES = Path(__file__).parents[1] / "examples/recipes"
TOKENS_PER_STEP = 384 * 8_192


def small(phases: list[dict]) -> Plan:
    raw = {
        "name": "small",
        "folder": "runs/small",
        "model": {"start": "x"},
        "data": {"corpora": [{"prefix": "a"}], "sequence_length": 10},
        "batch": {"sequences": 4},
        "phases": phases,
        "deepspeed": "x.json",
    }
    return Plan.from_config(from_dict(raw))


def phase(name: str, tokens: int, **rate) -> dict:
    return {"name": name, "objective": "clm", "tokens": tokens, "learning_rate": {"peak": 1.0} | rate}


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("english_base_50b", [15_895, 1_590]),
        ("english_large_50b", [15_895, 1_590]),
        ("english_base_10b", [3_179, 318]),
        ("french_base_10b", [3_179, 318]),
        ("french_large_25b", [7_948, 795]),
    ],
)
def test_the_papers_steps(name, steps):
    plan = Plan.from_config(load(RECIPES / f"{name}.yaml"))
    assert {phase.sequences * phase.sequence_length for phase in plan.phases} == {TOKENS_PER_STEP}
    assert [phase.steps for phase in plan.phases] == steps
    assert plan.total_steps == sum(steps)
    assert plan.total_tokens == sum(steps) * TOKENS_PER_STEP


def test_every_step_of_english_base_10b():
    """The table follows recipe.md: tokens counted once the step is done, x the share of the phase's tokens done."""
    warmup, peak, floor = 100_000_000, 2e-4, 0.1
    table = []
    for step in range(1, 3_180):
        done = step * TOKENS_PER_STEP
        table.append(("detour", "clm", None, 384, peak * min(1, done / warmup)))
    for step in range(1, 319):
        x = step / 318
        table.append(("decay", "mlm", 0.15, 384, peak * (floor + (1 - floor) * (1 - math.sqrt(x)))))
    plan = Plan.from_config(load(RECIPES / "english_base_10b.yaml"))
    steps = [plan.at(i * TOKENS_PER_STEP) for i in range(plan.total_steps)]
    facts = [
        (step.phase.name, step.objective.name, step.objective.figures().get("mask_rate"), step.sequences)
        for step in steps
    ]
    assert facts == [row[:4] for row in table]
    assert [step.learning_rate for step in steps] == pytest.approx([row[4] for row in table], rel=1e-12)
    assert [plan.step(step.number) for step in steps] == steps
    control = Plan.from_config(as_control(load(RECIPES / "english_base_10b.yaml"), 0.3))
    twins = [control.at(step.start) for step in steps]
    assert [twin.learning_rate for twin in twins] == [step.learning_rate for step in steps]
    assert [(twin.start, twin.tokens) for twin in twins] == [(s.start, s.tokens) for s in steps]
    assert [twin.objective for twin in twins] == [MaskedLM(0.3)] * 3179 + [MaskedLM(0.15)] * 318
    assert [step.number for step in steps] == list(range(1, 3_498))
    assert [step.tokens for step in steps] == [i * TOKENS_PER_STEP for i in range(1, 3_498)]
    assert [step.start for step in steps] == [i * TOKENS_PER_STEP for i in range(3_497)]
    assert {step.sequences for step in steps} == {384}
    assert [step.number for step in steps if step.ends_phase] == [3_179, 3_497]
    assert sum(step.learning_rate < peak for step in steps[:3_179]) == 31  # the 32nd passes 100M tokens
    assert steps[-1].learning_rate == pytest.approx(2e-5, rel=1e-12)
    assert all(step.learning_rate > 0 for step in steps)


def test_phases_are_rounded_up_to_whole_steps():
    plan = small([phase("one", 1), phase("exact", 80), phase("more", 81)])
    assert [(p.first_step, p.steps, p.start, p.tokens, p.end) for p in plan.phases] == [
        (1, 1, 0, 40, 40),
        (2, 2, 40, 80, 120),
        (4, 3, 120, 120, 240),
    ]
    names = [plan.at(tokens).phase.name for tokens in range(0, 240, 40)]
    assert names == ["one", "exact", "exact", "more", "more", "more"]
    assert [plan.at(tokens).ends_phase for tokens in range(0, 240, 40)] == [True, False, True, False, False, True]


def test_warm_up_starts_anew_in_each_phase_and_1_sqrt_begins_after_it():
    plan = small(
        [
            phase("first", 160, warmup=100),
            phase("second", 400, warmup=80, shape="1-sqrt", end=0.5),
        ]
    )
    rates = [plan.at(tokens).learning_rate for tokens in range(0, plan.total_tokens, 40)]
    assert rates[:4] == pytest.approx([0.4, 0.8, 1, 1])
    shares = [(done - 80) / 320 for done in range(80, 401, 40)]
    assert rates[4:] == pytest.approx([0.5, *(0.5 + 0.5 * (1 - math.sqrt(x)) for x in shares)])
    assert rates[-1] == 0.5


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        ({"shape": "linear", "end": 0.2}, [0.8, 0.6, 0.4, 0.2]),
        ({"shape": "linear", "end_ratio": 0.0}, [0.75, 0.5, 0.25, 0.0]),
        (
            {"shape": "cosine", "end_ratio": 0.1},
            [0.55 + 0.45 * math.cos(math.pi * x / 4) for x in (1, 2, 3, 4)],
        ),
        ({"shape": "1-sqrt", "end_ratio": 0.5}, [1 - math.sqrt(x / 4) / 2 for x in (1, 2, 3, 4)]),
        ({"shape": "cosine", "end": 0.0, "warmup": 80}, [0.5, 1.0, 0.5, 0.0]),
    ],
)
def test_shapes_of_the_rate(rate, expected):
    plan = small([phase("only", 160, **rate)])
    assert [plan.at(tokens).learning_rate for tokens in range(0, 160, 40)] == pytest.approx(expected, abs=1e-15)


def test_a_mask_rate_changes_at_tokens_of_its_phase():
    """A step has the rate of its last token; the phase begins at 80 tokens of the run."""
    masked = {"name": "m", "objective": "hybrid", "tokens": 280, "learning_rate": {"peak": 1}, "mask_rate": 0.4}
    plan = small([phase("first", 80), masked | {"mask_rate_steps": {"2 steps": 0.3, 190: 0.15}}])
    rates = [plan.at(tokens).objective.figures()["mask_rate"] for tokens in range(80, 360, 40)]
    assert rates == [0.4, 0.4, 0.3, 0.3, 0.15, 0.15, 0.15]
    assert plan.phases[1].objective.parts()[1][1].labeled_share(math.inf, 280) == pytest.approx(
        (0.4 * 80 + 0.3 * 110 + 0.15 * 90) / 280
    )
    assert plan.to_dict()["phases"][1]["mask_rate_steps"] == ((80, 0.3), (190, 0.15))


def test_a_mask_rate_goes_linearly_to_its_end():
    masked = {"name": "m", "objective": "mlm", "tokens": 160, "learning_rate": {"peak": 1}, "mask_rate": 0.3}
    plan = small([masked | {"mask_rate_end": 0.1}, masked | {"name": "n"}])
    rates = [plan.at(tokens).objective.mask_rate for tokens in range(0, 320, 40)]
    assert rates == pytest.approx([0.25, 0.2, 0.15, 0.1, 0.3, 0.3, 0.3, 0.3])


def test_a_batch_grows_in_equal_shares_of_its_warm_up():
    """Batches of 2, 4 and 6 sequences of 10 for 100 tokens each, rounded up to whole steps; then 8 of them."""
    growing = phase("g", 500) | {"sequences": 8, "batch_warmup": {"start": 2, "increment": 2, "tokens": 300}}
    plan = small([phase("a", 40), growing, phase("b", 40)])
    steps, tokens = [], 0
    while tokens < plan.total_tokens:
        steps.append(plan.at(tokens))
        tokens = steps[-1].tokens
    sizes = [2] * 5 + [4] * 3 + [6] * 2 + [8] * 2  # 100; 120, so that 220 are done; 120, so that 340; the rest of 500
    assert [step.sequences for step in steps] == [4, *sizes, 4]
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    assert [step.start for step in steps] == [0, *(step.tokens for step in steps[:-1])]
    assert [step.phase.name for step in steps if step.begins_phase] == ["a", "g", "b"]
    assert [step.phase.name for step in steps if step.ends_phase] == ["a", "g", "b"]
    assert [plan.step(step.number) for step in steps] == steps
    assert plan.phases[1].tokens == sum(sizes) * 10
    for wrong in (41, 50, 40 + 100 + 20):
        with pytest.raises(ValueError, match="no step begins"):
            plan.at(wrong)


def test_a_phase_may_have_a_length_and_a_batch_of_its_own():
    plan = small([phase("a", 80), phase("b", 200) | {"sequence_length": 5, "sequences": 10}, phase("c", 40)])
    steps = [plan.step(number) for number in range(1, plan.total_steps + 1)]
    assert [step.tokens - step.start for step in steps] == [40, 40, 50, 50, 50, 50, 40]
    assert [step.start for step in steps] == [0, 40, 80, 130, 180, 230, 280]
    assert [step.passes(100) for step in steps] == [False, False, True, False, True, False, True]


def test_at_does_not_depend_on_what_was_asked_before():
    phases = [phase("a", 400, warmup=100), phase("b", 200, shape="1-sqrt", end=0.0)]
    plan, other = small(phases), small(phases)
    forwards = [plan.at(tokens) for tokens in range(0, 600, 40)]
    backwards = [other.at(tokens) for tokens in reversed(range(0, 600, 40))]
    assert forwards == backwards[::-1]
    assert plan == other


def test_a_longer_run_begins_like_a_shorter_one():
    short, long = small([phase("a", 400, warmup=100)]), small([phase("a", 4_000, warmup=100)])
    for tokens in range(0, 400, 40):
        first, second = short.at(tokens), long.at(tokens)
        assert (first.learning_rate, first.start) == (second.learning_rate, second.start)


@pytest.mark.parametrize("tokens", [-40, 1, 39, 41, 120, 160])
def test_at_refuses_what_begins_no_step(tokens):
    with pytest.raises(ValueError, match=f"no step begins at {tokens} tokens"):
        small([phase("a", 120)]).at(tokens)


def test_the_table_holds_the_numbers():
    table = plan_table(Plan.from_config(load(RECIPES / "english_base_50b.yaml")))
    summary, *lines = table.splitlines()
    assert "15,895 + 1,590 = 17,485 steps, " in summary and "384 sequences of 8,192 tokens per step" in summary
    assert f"{17_485 * TOKENS_PER_STEP:,} tokens" in summary
    assert max(map(len, lines)) <= 80
    rows = [" ".join(line.split()) for line in lines]
    tokens = [15_895 * TOKENS_PER_STEP, 1_590 * TOKENS_PER_STEP]
    assert f"detour CLM 15,895 {tokens[0]:,} 1 15,895 {tokens[0]:,}" in rows
    assert f"decay MLM, 15% masked 1,590 {tokens[1]:,} 15,896 17,485 {sum(tokens):,}" in rows
    assert "detour rises to 0.0002 over 100M tokens, then constant" in rows
    assert "starts at 0.0002, then follows one minus square root to 2e-05" in " ".join(rows)


def test_the_plain_form_holds_the_same_numbers():
    plan = Plan.from_config(load(RECIPES / "english_base_10b.yaml"))
    plain = plan.to_dict()
    assert (plain["total_steps"], plain["total_tokens"]) == (3_497, 3_497 * TOKENS_PER_STEP)
    assert [(p["first_step"], p["steps"], p["start_tokens"], p["end_tokens"]) for p in plain["phases"]] == [
        (1, 3_179, 0, 3_179 * TOKENS_PER_STEP),
        (3_180, 318, 3_179 * TOKENS_PER_STEP, 3_497 * TOKENS_PER_STEP),
    ]
    assert plain["phases"][1]["learning_rate"] == {"peak": 2e-4, "warmup_tokens": 0, "shape": "1-sqrt", "end": 2e-5}
