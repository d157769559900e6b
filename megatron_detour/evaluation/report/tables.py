"""The figures of an evaluation in words: tables that Markdown, HTML and terminal show alike. Scores in percent."""

from __future__ import annotations

from typing import Any

from megatron_detour.evaluation.report.statistics import TIE
from megatron_detour.ui.format import counted, duration
from megatron_detour.ui.tables import ABSENT, Entry, Table

Summary = dict[str, Any]


def tables(summary: Summary) -> list[Table]:
    """All tables of a report, those that would be empty left out."""
    found = [scores_table(summary), against_table(summary)]
    found += [_by_task(summary, model) for model in summary["models"][1:]]
    found += [_sanity(summary), _tasks(summary), _cost(summary)]
    return [table for table in found if table.rows]


def scores_table(summary: Summary) -> Table:
    """Tasks in rows, models in columns, and the average over what all models have finished."""
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
    remarks = [f"{_of_seeds(summary)} In percent, on the test split."]
    if len(models) > 1:
        remarks.append(
            "Bold: better than every other model, by the permutation test and over seeds (the greater p is below 0.05 "
            "after Holm's correction over "
            f"{counted(sum(task['best'] is not None for task in summary['tasks']), 'task')})."
        )
    return Table(["Task", "Metric", *models], rows, "llr", "Scores", remarks, names=2)


def _of_seeds(summary: Summary) -> str:
    count = len(summary["seeds"])
    if count < 2:
        return "One seed."
    return f"Mean ± standard deviation over {count} seeds, or as many as stand in brackets."


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
    """Every other model against the baseline, over all cells that both have."""
    rows = [
        [
            found["model"],
            Entry(points(found["cells"]["mean"]), found["by_tasks"]["clear"]),
            interval_words(found["cells"]),
            p_words(found["cells"]["p"]),
            interval_words(found["by_tasks"]),
            p_words(found["by_tasks"]["p"]),
            "{wins} / {losses} / {ties}".format(**found["tally"]),
            "{clear_wins} / {clear_losses}".format(**found["tally"]),
        ]
        for found in summary["against_baseline"]
        if found["cells"]
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
    return Table(headers, rows, title=f"Against {summary['baseline']}", remarks=_of_the_comparison(summary))


def _of_the_comparison(summary: Summary) -> list[str]:
    return [
        "Points: the mean difference over all cells (a task with a seed) that both models have; above 0 the model is "
        "better. 95%: its interval; p: two-sided, below 0.05 where the interval leaves out 0. Of cells by paired "
        f"bootstrap ({summary['resamples']:,} resamples), as in arXiv 2605.12438; of tasks by Student's t of their "
        "mean differences, which is the one to go by where other tasks of the kind are meant. Bold: by tasks p is "
        f"below 0.05 after Holm's correction over {counted(len(summary['models']) - 1, 'model')}{_doubled(summary)}.",
        f"Better, worse, equal: on how many tasks, by the mean over seeds; equal is less than {100 * TIE:g} points. "
        "Clear: more than chance for other test examples (permutation test) and for other seeds (Student's t), the "
        f"greater p being below 0.05 after Holm's correction{_doubled(summary)}.",
        comparisons_words(summary),
    ]


def comparisons_words(summary: Summary) -> str:
    """How many comparisons were made, and what that means."""
    count = summary["comparisons"]
    if not count:
        return "No comparison by task was made: each needs the predictions of both models, with two seeds at least."
    them = "any of them" if summary["families"] == 1 else "any of them, or a mean over tasks,"
    return (
        f"{counted(count, 'comparison')} by task ({counted(len(summary['models']) - 1, 'model')} against "
        f"{summary['baseline']}): where no model differs, the chance that {them} is called clear is 5% at most."
    )


def _doubled(summary: Summary) -> str:
    return "" if summary["families"] == 1 else " and doubled, as single tasks and means over tasks are both looked at"


def _by_task(summary: Summary, model: str) -> Table:
    rows = [
        [
            task["name"],
            Entry(points(found["mean"]), found["clear"]),
            ABSENT if found["interval"] is None else _range(*found["interval"]),
            p_words(found["p_seeds"]),
            p_words(found["p"]),
            p_words(found["p_holm"]),
            ("better" if found["mean"] > 0 else "worse") if found["clear"] else "",
        ]
        for task in summary["tasks"]
        for found in [task["differences"].get(model)]
        if found
    ]
    remark = (
        "Over seeds: Student's t, paired by seed. Over examples: a permutation test of the test examples, with "
        f"{summary['permutations']:,} permutations. After Holm: the greater of the two, corrected for all "
        f"{counted(summary['comparisons'], 'comparison')} with {summary['baseline']}{_doubled(summary)}; clear "
        "where it is below 0.05."
    )
    headers = ["Task", "Difference (points)", "95%, seeds", "p, seeds", "p, examples", "p after Holm", "Clear"]
    return Table(headers, rows, title=f"{model} against {summary['baseline']}, by task", remarks=[remark])


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
        "Chance: the best of guesses that know the answers' frequencies and none of the texts, and up to where the "
        "luck of a test split reaches. A model trained on shuffled labels belongs there, any other one above it. Runs "
        "with shuffled labels are in no other table.",
    ]
    headers = ["Task", "Chance (up to)", *(f"{model}, shuffled labels" for model in models), "No better than chance"]
    return Table(headers, rows, title="Sanity", remarks=remarks)


def _chance(chance: dict[str, float] | None) -> str:
    return f"{percent(chance['score'])} ({percent(chance['high'])})" if chance else ABSENT


def _shuffled(score: dict[str, Any] | None) -> Entry:
    if not score:
        return Entry(ABSENT)
    sd = "" if score["sd"] is None else f" ± {percent(score['sd'])}"
    verdict = {True: ", at chance", False: ", above chance", None: ""}[score["at_chance"]]
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
    return Table(["Task", "What it is", "Language", "Metric", "Test examples"], rows, "llllr", "Tasks")


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
    machines = ", ".join(summary["machines"]) or "machines that the results do not name"
    remark = f"The sum of the fine-tunings' own times, on {machines}."
    return Table(headers, rows, title="Cost", remarks=[remark])


def metric_words(metric: str) -> str:
    """E.g. ``entity F1``, ``accuracy``."""
    return metric.replace("_f1", " F1").replace("_", " ")


def percent(share: float) -> str:
    return f"{100 * share:.1f}".replace("-", "−")


def points(share: float) -> str:
    """A difference with its sign, ``0.0`` without one."""
    text = f"{100 * share:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def p_words(p: float | None) -> str:
    """As many digits as mean something."""
    if p is None:
        return ABSENT
    if p < 0.0001:
        return "<0.0001"
    return f"{p:.4f}" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def interval_words(found: dict[str, float]) -> str:
    return ABSENT if found["low"] is None else _range(found["low"], found["high"])


def _range(low: float, high: float) -> str:
    return f"{points(low)} to {points(high)}"
