"""The result of an evaluation in one sentence, the first line of its report."""

from __future__ import annotations

from typing import Any

from megatron_detour.evaluation.report.tables import Summary, metric_words, p_words, percent, points
from megatron_detour.ui.format import counted


def verdict(summary: Summary) -> str:
    """Return which models are clearly better or worse, or that none is and the smallest detectable difference."""
    baseline, others = summary["baseline"], summary["against_baseline"]
    if not summary["seeds"]:
        return "All models were trained on shuffled labels: their scores measure leakage, not quality."
    if not others:
        return _alone(summary)
    clear = [other for other in others if other["by_tasks"] and other["by_tasks"]["clear"]]
    if clear:
        return f"{'; '.join(_over_tasks(other, baseline) for other in clear)}."
    by_task = [words for other in others for words in _on_tasks(summary, other["model"])]
    if by_task:
        return f"On single tasks: {'; '.join(by_task)}. Over all tasks no difference is clear: {_reach(summary)}."
    return f"No difference is clear: {_reach(summary)}."


def _alone(summary: Summary) -> str:
    (model,) = summary["models"]
    if len(summary["tasks"]) == 1:
        task = summary["tasks"][0]
        score = f"{percent(task['scores'][model]['mean'])} ({metric_words(task['metric'])})"
        return f"{model} scores {score} on {task['name']}; a comparison needs a second model."
    return f"{model} was scored on {counted(len(summary['tasks']), 'task')}; a comparison needs a second model."


def _over_tasks(other: dict[str, Any], baseline: str) -> str:
    tasks = other["by_tasks"]
    way = "better" if tasks["mean"] > 0 else "worse"
    interval = f"{points(tasks['low'])} to {points(tasks['high'])}"
    return (
        f"{other['model']} is {way} than {baseline} by {percent(abs(tasks['mean']))} points over "
        f"{counted(tasks['units'], 'task')} (95% {interval}, p {p_words(tasks['p'])})"
    )


def _on_tasks(summary: Summary, model: str) -> list[str]:
    """Return on which tasks a model is clearly better, and on which clearly worse."""
    clear = {True: [], False: []}
    for task in summary["tasks"]:
        if (difference := task["differences"].get(model)) and difference["clear"]:
            clear[difference["mean"] > 0].append(task["name"])
    than = summary["baseline"]
    return [
        f"{model} is {'better' if better else 'worse'} than {than} on {', '.join(names)}"
        for better, names in clear.items()
        if names
    ]


def _reach(summary: Summary) -> str:
    """Return the smallest mean difference that could have been clear, given the variance over tasks (or seeds)."""
    size = f"{counted(len(summary['tasks']), 'task')} x {counted(len(summary['seeds']), 'seed')}"
    least = [other["least"] for other in summary["against_baseline"] if other["least"] is not None]
    if not least:
        return f"{size} cannot detect any"
    return f"{size} cannot detect less than {percent(min(least))} points"
