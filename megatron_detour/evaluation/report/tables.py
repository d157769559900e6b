"""The tables of an evaluation for Markdown, HTML and terminal. Scores are in percent."""

from __future__ import annotations

from typing import Any

from megatron_detour.evaluation.report.statistics import TIE
from megatron_detour.ui.format import counted, duration
from megatron_detour.ui.tables import ABSENT, Entry, Table

Summary = dict[str, Any]


def tables(summary: Summary) -> list[Table]:
    """Return all non-empty tables of a report."""
    candidates = [scores_table(summary), against_table(summary)]
    candidates += [_by_task(summary, model) for model in summary["models"][1:]]
    candidates += [_sanity(summary), _tasks(summary), _cost(summary)]
    return [table for table in candidates if table.rows]


def scores_table(summary: Summary) -> Table:
    """Return scores by task (rows) and model (columns), and the average over tasks that all models have finished."""
    models = summary["models"]
    rows = [
        [Entry(task["name"]), Entry(metric_words(task["metric"]))]
        + [_score(task["scores"].get(model), summary, _is_best(task, model)) for model in models]
        for task in summary["tasks"]
        if task["scores"]
    ]
    average = summary["average"]
    if average["scores"]:
        title = f"Mean of {counted(len(average['tasks']), 'task')}"
        rows.append([Entry(title), Entry("")] + [_score(average["scores"][model], summary) for model in models])
    remarks = [f"{_seeds_remark(summary)} In percent, on the test split."]
    if len(models) > 1:
        remarks.append(
            "Bold: better than every other model, by permutation test and over seeds (greater p below 0.05 after "
            "Holm's correction over "
            f"{counted(sum(task['best'] is not None for task in summary['tasks']), 'task')})."
        )
    return Table(["Task", "Metric", *models], rows, "llr", "Scores", remarks, names=2)


def _seeds_remark(summary: Summary) -> str:
    count = len(summary["seeds"])
    if count < 2:
        return "One seed."
    return f"Mean ± standard deviation over {count} seeds, or the number in parentheses."


def _is_best(task: dict[str, Any], model: str) -> bool:
    return bool(task["best"] and task["best"]["clear"] and task["best"]["model"] == model)


def _score(score: dict[str, Any] | None, summary: Summary, bold: bool = False) -> Entry:
    if not score:
        return Entry(ABSENT)
    text = percent(score["mean"])
    if score["sd"] is not None:
        text += f" ± {percent(score['sd'])}"
    if score["seeds"] != len(summary["seeds"]):
        text += f" ({score['seeds']})"
    return Entry(text, bold)


def against_table(summary: Summary) -> Table:
    """Compare every other model with the baseline over their common cells."""
    rows = [
        [
            comparison["model"],
            Entry(points(comparison["cells"]["mean"]), comparison["by_tasks"]["clear"]),
            interval_words(comparison["cells"]),
            p_words(comparison["cells"]["p"]),
            interval_words(comparison["by_tasks"]),
            p_words(comparison["by_tasks"]["p"]),
            "{wins} / {losses} / {ties}".format(**comparison["tally"]),
            "{clear_wins} / {clear_losses}".format(**comparison["tally"]),
        ]
        for comparison in summary["against_baseline"]
        if comparison["cells"]
    ]
    headers = [
        "Model",
        "Points",
        "95%, cells",
        "p, cells",
        "95%, tasks",
        "p, tasks",
        "Better / worse / equal",
        "Clear: better / worse",
    ]
    return Table(headers, rows, title=f"Compared with {summary['baseline']}", remarks=_comparison_remarks(summary))


def _comparison_remarks(summary: Summary) -> list[str]:
    return [
        "Points: the mean difference over the cells (task and seed) that both models have; above 0 the model is "
        "better. 95%: its interval; p: two-sided, below 0.05 if the interval excludes 0. Cells: paired bootstrap "
        f"({summary['resamples']:,} resamples), as in arXiv 2605.12438. Tasks: Student's t over the tasks' mean "
        "differences; prefer it for conclusions about other tasks of this kind. Bold: p by tasks is below 0.05 "
        f"after Holm's correction over {counted(len(summary['models']) - 1, 'model')}{_doubled(summary)}.",
        f"Better, worse, equal: number of tasks, by the mean over seeds; equal is less than {100 * TIE:g} points. "
        "Clear: significant over test examples (permutation test) and over seeds (Student's t): the greater p is "
        f"below 0.05 after Holm's correction{_doubled(summary)}.",
        comparisons_words(summary),
    ]


def comparisons_words(summary: Summary) -> str:
    """Return the number of comparisons and their error rate, in a sentence."""
    count = summary["comparisons"]
    if not count:
        return "No comparison by task: each needs the predictions of both models, with at least two seeds."
    them = "any of them" if summary["families"] == 1 else "any of them, or a mean over tasks,"
    return (
        f"{counted(count, 'comparison')} by task ({counted(len(summary['models']) - 1, 'model')} compared with "
        f"{summary['baseline']}): if no model differs, the probability that {them} is called clear is at most 5%."
    )


def _doubled(summary: Summary) -> str:
    return "" if summary["families"] == 1 else " and doubled, since both single tasks and means over tasks are tested"


def _by_task(summary: Summary, model: str) -> Table:
    rows = [
        [
            task["name"],
            Entry(points(comparison["mean"]), comparison["clear"]),
            ABSENT if comparison["interval"] is None else _range(*comparison["interval"]),
            p_words(comparison["p_seeds"]),
            p_words(comparison["p"]),
            p_words(comparison["p_holm"]),
            ("better" if comparison["mean"] > 0 else "worse") if comparison["clear"] else "",
        ]
        for task in summary["tasks"]
        for comparison in [task["differences"].get(model)]
        if comparison
    ]
    remark = (
        "Over seeds: Student's t, paired by seed. Over examples: permutation test over the test examples, with "
        f"{summary['permutations']:,} permutations. After Holm: the greater of the two, corrected for all "
        f"{counted(summary['comparisons'], 'comparison')} with {summary['baseline']}{_doubled(summary)}; clear if "
        "below 0.05."
    )
    headers = ["Task", "Difference (points)", "95%, seeds", "p, seeds", "p, examples", "p after Holm", "Clear"]
    return Table(headers, rows, title=f"{model} compared with {summary['baseline']}, by task", remarks=[remark])


def _sanity(summary: Summary) -> Table:
    models = list(dict.fromkeys(model for task in summary["tasks"] for model in task["sanity"]["shuffled"]))
    rows = [
        [Entry(task["name"]), Entry(_chance(task["sanity"]["chance"]))]
        + [_shuffled(task["sanity"]["shuffled"].get(model)) for model in models]
        + [Entry(", ".join(task["sanity"]["not_above"]))]
        for task in summary["tasks"]
        if task["sanity"]["chance"] or task["sanity"]["shuffled"]
    ]
    remarks = [
        "Random baseline: the best score of guesses from the answers' frequencies without reading the texts, and the "
        "upper end of its random variation. Models trained on shuffled labels should score there, all other models "
        "above it. Runs with shuffled labels are in no other table.",
    ]
    headers = [
        "Task",
        "Random baseline (up to)",
        *(f"{model}, shuffled labels" for model in models),
        "Not above random baseline",
    ]
    return Table(headers, rows, title="Sanity", remarks=remarks)


def _chance(chance: dict[str, float] | None) -> str:
    return f"{percent(chance['score'])} ({percent(chance['high'])})" if chance else ABSENT


def _shuffled(score: dict[str, Any] | None) -> Entry:
    if not score:
        return Entry(ABSENT)
    sd = "" if score["sd"] is None else f" ± {percent(score['sd'])}"
    verdict = {True: ", at random baseline", False: ", above random baseline", None: ""}[score["at_chance"]]
    return Entry(f"{percent(score['mean'])}{sd} ({score['seeds']}){verdict}", score["at_chance"] is False)


def _tasks(summary: Summary) -> Table:
    rows = [
        [
            task["name"],
            task["title"],
            task["language"] or ABSENT,
            metric_words(task["metric"]),
            Entry(f"{task['test']:,}"),
        ]
        for task in summary["tasks"]
    ]
    return Table(["Task", "Title", "Language", "Metric", "Test examples"], rows, "llllr", "Tasks")


def _cost(summary: Summary) -> Table:
    rows = [
        [
            cost["model"],
            Entry(f"{cost['runs']:,}"),
            duration(cost["seconds"]),
            duration(cost["seconds"] / cost["runs"]) if cost["runs"] else ABSENT,
            duration(cost["shuffled_seconds"]) if cost["shuffled_runs"] else ABSENT,
        ]
        for cost in summary["cost"]
    ]
    headers = ["Model", "Fine-tunings", "Time", "Mean time", "Time with shuffled labels"]
    machines = ", ".join(summary["machines"]) or "unknown devices"
    remark = f"The total duration of the fine-tunings, on {machines}."
    return Table(headers, rows, title="Cost", remarks=[remark])


def metric_words(metric: str) -> str:
    """Return e.g. ``entity F1``, ``accuracy``."""
    return metric.replace("_f1", " F1").replace("_", " ")


def percent(share: float) -> str:
    return f"{100 * share:.1f}".replace("-", "−")


def points(share: float) -> str:
    """Return a difference in points with its sign; ``0.0`` has none."""
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def p_words(p: float | None) -> str:
    """Return p with its meaningful digits."""
    if p is None:
        return ABSENT
    if p < 0.0001:
        return "<0.0001"
    return f"{p:.4f}" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def interval_words(comparison: dict[str, float]) -> str:
    return ABSENT if comparison["low"] is None else _range(comparison["low"], comparison["high"])


def _range(low: float, high: float) -> str:
    return f"{points(low)} to {points(high)}"
