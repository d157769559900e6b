"""What a study will take, and the effect that it could find, before it starts."""

from __future__ import annotations

from typing import Any

from megatron_detour.evaluation.report.statistics import LEVEL
from megatron_detour.forecast.storage import disk
from megatron_detour.study.jobs import Job, record_of
from megatron_detour.study.plan import Study
from megatron_detour.study.power import Luck, power
from megatron_detour.study.records import DONE
from megatron_detour.ui.format import byte_size, compact, counted, duration

CHANCE = 0.8


def power_statement(study: Study) -> dict[str, Any] | None:
    """Return the smallest mean difference over tasks that the study finds with a chance of 80%, in points."""
    given, evaluation = study.config.power, study.config.evaluation
    if given is None or evaluation is None:
        return None
    tasks = len(evaluation.tasks)
    luck = Luck(finetuning=(given.finetuning_sd / 100,) * tasks, shared=given.training_sd / 100, own=0.0)
    seeds = len(study.finetuning_seeds)
    claims = sum(criterion.level is not None and not criterion.negated for criterion in study.criteria.values())
    level = LEVEL / max(1, claims)  # of Holm's first step: an effect found at it is found in any case
    effect = power(luck, len(study.config.seeds), seeds, level=level, chance=CHANCE)
    if effect is None:
        statement = "With one training seed no difference between arms can be tested over training seeds."
    else:
        statement = (
            f"With {len(study.config.seeds)} training seeds, {tasks} tasks and {seeds} fine-tuning seeds, a difference "
            f"of {100 * effect:.1f} points in the mean of tasks is found with a probability of {CHANCE:.0%} at the "
            f"level {level:.3g}, {LEVEL} over the {counted(claims, 'claim')} of a difference (standard deviations "
            f"{given.source}: {given.training_sd:g} over training seeds, {given.finetuning_sd:g} over fine-tuning "
            "seeds, in points)."
        )
    return {"effect_points": None if effect is None else 100 * effect, "level": level, "statement": statement}


def tokens(study: Study) -> tuple[int, int]:
    """Return the tokens that the runs train on, and those that shared phases save."""
    new = sum(run.new_tokens for run in study.runs)
    return new, sum(run.plan.total_tokens for run in study.runs) - new


def describe_cost(study: Study, jobs: list[Job]) -> str:
    """Return what the study takes: tokens, jobs, disk, and the time, as far as finished jobs tell it; and its power."""
    new, shared = tokens(study)
    arms, seeds = counted(len(study.config.arms), "arm"), counted(len(study.config.seeds), "training seed")
    lines = [
        f"study    {study.config.name}: {arms}, {seeds}",
        f"tokens   {compact(new)} to train on; {compact(shared)} are shared between arms",
        f"disk     {byte_size(_disk(study))} of checkpoints",
    ]
    if study.config.evaluation:
        each = len(study.tasks) * len(study.finetuning_seeds)
        models = sum(job.name.startswith("evaluate/") for job in jobs)
        lines.append(
            f"tasks    {counted(len(study.tasks), 'task')}: {each * models} fine-tuning runs of {models} models"
        )
    if kinds := [job.kind for job in jobs if job.kind not in ("train", "evaluate")]:
        lines.append(f"analyses {', '.join(dict.fromkeys(kinds))}: {counted(len(kinds), 'job')}")
    ended = {job.name: record_of(study, job.name) for job in jobs}
    done = sum(found is not None and found["status"] == DONE for found in ended.values())
    lines.append(f"jobs     {len(jobs)}, of which {done} are done{_hours(jobs, ended)}")
    statement = power_statement(study)
    return "\n".join([*lines, *([f"power    {statement['statement']}"] if statement else [])])


def _hours(jobs: list[Job], ended: dict[str, dict[str, Any] | None]) -> str:
    if all(ended.values()):
        return ""
    left = seconds_left(jobs, ended)
    if left is None:
        return "; the first of each kind will tell how long the rest takes"
    return f"; the rest takes {duration(left)}, one job at a time"


def seconds_left(jobs: list[Job], ended: dict[str, dict[str, Any] | None]) -> float | None:
    """Return the time of the jobs that are left, one at a time, by the finished ones of each kind; None without."""
    seconds = 0.0
    for kind in dict.fromkeys(job.kind for job in jobs if not ended[job.name]):
        same = [job for job in jobs if job.kind == kind]
        done = [job for job in same if (ended[job.name] or {}).get("status") == DONE]
        if not done:
            return None
        rate = sum(ended[job.name]["seconds"] for job in done) / sum(job.cost for job in done)
        seconds += rate * sum(job.cost for job in same if not ended[job.name])
    return seconds


def _disk(study: Study) -> int:
    """Return the bytes of the runs: the checkpoints that stay, and their metrics."""
    return sum(disk(run.config, run.plan, study.shape.parameters).needed for run in study.runs)
