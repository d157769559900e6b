"""The tables of a study's page. Scores are in percent, differences of scores in points, losses in nats per token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_detour.evaluation.report.statistics import Spread, holm
from megatron_detour.evaluation.report.tables import interval_words, metric_words, p_words, percent, points
from megatron_detour.objectives import read_objective
from megatron_detour.study.page.data import StudyData, last_tokens, regions
from megatron_detour.study.power import luck
from megatron_detour.study.records import START, FailureRecord, ScoreRecord
from megatron_detour.study.statistics import Comparison, compare_values
from megatron_detour.ui.format import compact, counted, duration, frozen_words
from megatron_detour.ui.tables import ABSENT, Entry, Table

STATES = {True: "Met", False: "Not met", None: "Not judged"}
NOT_YET = "There is no verdict yet."


def arm_label(arm: str) -> str:
    return "start model" if arm == START else arm


def verdicts_table(data: StudyData) -> Table:
    rows = []
    for name, verdict in data.verdicts.items():
        text = verdict.text if verdict else str(data.setting("criteria", name))
        state = STATES[verdict.met if verdict else None]
        rows.append([Entry(state, bold=True), Entry(name, note=text), verdict.sentence if verdict else NOT_YET])
    return Table(["Verdict", "Criterion", "Found"], rows, "l", names=2)


def arms_table(data: StudyData) -> Table:
    rows = []
    for arm, facts in data.arms.items():
        phases = "; ".join(phase_words(phase) for phase in facts.phases)
        rows.append([Entry(arm, bold=arm == data.control), facts.about or _about(data, arm), phases])
    remarks = [f"Bold: {data.control}, the arm that others are compared with."] if data.control else []
    return Table(["Arm", "What it is", "Phases"], rows, "l", remarks=remarks)


def _about(data: StudyData, arm: str) -> str:
    """Return what the study file changes for an arm."""
    parts = []
    if (rate := data.setting("arms", arm, "control")) is not None:
        parts.append(f"causal phases become MLM with {100 * rate:.3g}% masked")
    parts += [f"{key} = {value}" for key, value in (data.setting("arms", arm, "set") or {}).items()]
    if data.setting("arms", arm, "seed_offset"):
        parts.append("other seeds of the masks")
    if count := data.setting("arms", arm, "average"):
        parts.append(f"mean of the last {count} checkpoints")
    return "; ".join(parts) or "the base run file"


def phase_words(phase: dict[str, Any]) -> str:
    """Return e.g. ``decay: 1M tokens of MLM, 15% masked``."""
    objective = read_objective(phase).describe() if phase.get("objective") else "training"
    frozen = f" ({frozen_words(phase)} frozen)" if phase.get("freeze") else ""
    return f"{phase.get('name', 'phase')}: {compact(last_tokens(phase))} tokens of {objective}{frozen}"


def scores_table(data: StudyData) -> Table:
    """Return arms (rows) by tasks (columns), with both kinds of luck below each mean."""
    rows = []
    for arm in data.scored:
        table = data.scores(arm)
        cells = [_score(table[[task]]) for task in range(len(data.tasks))]
        rows.append([Entry(arm_label(arm), bold=arm == data.control), *cells, _mean_score(data, arm)])
    headers = [f"{task} ({metric_words(data.metrics[task])})" for task in data.tasks]
    remarks = [
        "In percent, the mean over training seeds and fine-tuning seeds. Below: the standard deviation over training "
        "seeds, beyond what fine-tuning explains (0.0: it explains everything) / over fine-tuning seeds of one model; "
        f"{ABSENT} where there is one seed only."
    ]
    if (left := [task for number, task in enumerate(data.tasks) if number not in data.common_tasks]) and rows:
        remarks.append(f"The mean leaves out {', '.join(left)}: not every arm has it.")
    return Table(["Arm", *headers, _mean_header(data)], rows, "lr", remarks=remarks)


def _mean_header(data: StudyData) -> str:
    return f"Mean of {counted(len(data.common_tasks), 'task')}"


def _score(table: np.ndarray) -> Entry:
    """Return the mean of scores [1, training seeds, fine-tuning seeds]."""
    found = table[:, ~np.isnan(table).all((0, 2))]
    if not found.size:
        return Entry(ABSENT)
    both = luck(found)
    text = percent(float(np.nanmean(found, 2).mean()))
    return Entry(text, note=f"{_sd(both.training[0])} / {_sd(both.finetuning[0])}")


def _mean_score(data: StudyData, arm: str) -> Entry:
    """Return the mean over the common tasks; its luck is that of these means."""
    means = list(data.seed_means(arm).values())
    if not means:
        return Entry(ABSENT)
    both = luck(data.scores(arm)[data.common_tasks].mean(0, keepdims=True))
    return Entry(percent(float(np.mean(means))), note=f"{_sd(both.training[0])} / {_sd(both.finetuning[0])}")


def _sd(deviation: float | None) -> str:
    return ABSENT if deviation is None else percent(deviation)


def differences_table(data: StudyData) -> Table:
    rows = []
    for arm in data.scored:
        mean = data.difference(arm)
        cells = [_difference(data.difference(arm, task), arm) for task in range(len(data.tasks))]
        if mean or any(cell.text != ABSENT for cell in cells):
            p = p_words(mean.p) if mean and mean.low is not None and arm != START else ABSENT
            rows.append([Entry(arm_label(arm)), *cells, _difference(mean, arm), p])
    remarks = [
        f"In points; above 0 the arm is better than {data.control}. Below: the 95% interval by Student's t over training "
        "seeds, paired. Bold: it excludes 0. These intervals and p are not corrected for their number; the verdicts are."
    ]
    return Table(["Arm", *data.tasks, _mean_header(data), "p, mean"], rows, "lr", remarks=remarks)


def _difference(comparison: Comparison | None, arm: str) -> Entry:
    if comparison is None:
        return Entry(ABSENT)
    text = points(comparison.mean)
    if comparison.low is None or arm == START:  # one model has no training seeds
        return Entry(text)
    clear = comparison.low > 0 or comparison.high < 0
    return Entry(text, clear, interval_words({"low": comparison.low, "high": comparison.high}))


def losses_table(data: StudyData) -> Table:
    rows = []
    for arm in data.arms:
        if own := data.losses(arm):
            found = data.loss_difference(arm)
            row = [Entry(arm, bold=arm == data.control), loss_words(own.values()), str(len(own))]
            row += [loss_words(data.losses(arm, "before_decay").values())]
            rows.append([*row, ABSENT if found is None else f"{found.mean:+.4f}".replace("-", "−"), _interval(found)])
    headers = ["Arm", "Final loss", "Training seeds", "Before the decay"]
    headers += [f"Difference from {data.control}", "95%"]
    return Table(
        headers, rows, "lr", remarks=["Mean ± standard deviation over training seeds, in nats per masked token."]
    )


def loss_words(values: Iterable[float]) -> str:
    values = list(values)
    if not values:
        return ABSENT
    spread = Spread.from_values(values)
    return f"{spread.mean:.4f}" + ("" if spread.sd is None else f" ± {spread.sd:.4f}")


def _interval(found: Comparison | None, digits: int = 4, sign: str = "+") -> str:
    if found is None or found.low is None:
        return ABSENT
    return f"{found.low:{sign}.{digits}f} to {found.high:{sign}.{digits}f}".replace("-", "−")


def drift_table(data: StudyData) -> Table:
    """Return divergence, noise and their ratio by arm and region."""
    rows = []
    for arm, drifts in data.drifts.items():
        for region, layers in regions(data).items():
            own, noise, ratio = (np.array(x) for x in zip(*(drift.region(layers) for drift in drifts), strict=True))
            known = ratio[~np.isnan(ratio)]
            test = compare_values(list(known), log=True) if len(known) and (known > 0).all() else None
            row = [arm, f"{region} ({_layer_words(layers)})", f"{own.mean():.4f}"]
            row.append(f"{np.nanmean(noise):.4f}" if len(known) else ABSENT)
            rows.append([*row, f"{test.mean:.2f}" if test else ABSENT, _interval(test, 2, ""), str(len(drifts))])
    headers = ["Arm", "Layers", "Divergence", "Noise of seeds", "Ratio", "95%", "Training seeds"]
    remark = (
        "Divergence: 1 − CKA, the mean over draws of texts, layers and training seeds. Noise: the same of two runs of the "
        "reference that differ by their seed. Ratio: divergence / noise, the geometric mean over training seeds with its "
        "interval by Student's t over logarithms."
    )
    return Table(headers, rows, "llr", remarks=[remark], names=2)


def _layer_words(layers: range) -> str:
    return f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"


def sweep_table(data: StudyData, arms: Sequence[str]) -> Table:
    rows = []
    for arm in arms:
        phases, means = data.arms[arm].phases, list(data.seed_means(arm).values())
        tokens, before = last_tokens(phases[-1]), sum(last_tokens(phase) for phase in phases[:-1])
        share = f"{100 * tokens / before:.3g}%" if before else ABSENT
        row = [arm, compact(tokens), share, loss_words(data.losses(arm).values())]
        rows.append([*row, mean_words(means), str(max(len(means), len(data.losses(arm))))])
    headers = ["Arm", "Decay tokens", "Of the phases before", "Final loss", _mean_header(data), "Training seeds"]
    return Table(headers, rows, "lr").without_empty_columns()


def mean_words(means: Sequence[float]) -> str:
    """Return the mean of scores with its 95% interval, in percent."""
    if not means:
        return ABSENT
    spread = Spread.from_values(means)
    interval = spread.interval()
    return percent(spread.mean) + ("" if interval is None else f" ({percent(interval[0])} to {percent(interval[1])})")


def best_budget(data: StudyData, arms: Sequence[str]) -> str:
    """Return which decay scored best (or had the lowest loss), and which could be as good, in a sentence."""
    scores = {arm: data.seed_means(arm) for arm in arms}
    if sum(map(bool, scores.values())) > 1:
        figure, best = "mean score", max((arm for arm in arms if scores[arm]), key=lambda x: _mean(scores[x]))
    else:
        scores, figure = {arm: data.losses(arm) for arm in arms}, "final loss"
        if sum(map(bool, scores.values())) < 2:
            return ""
        best = min((arm for arm in arms if scores[arm]), key=lambda x: _mean(scores[x]))
    ps = {}
    for arm in (arm for arm in arms if arm != best and scores[arm]):
        shared = [seed for seed in scores[arm] if seed in scores[best]]
        pair = [[scores[x][seed] for seed in shared] for x in (best, arm)]
        ps[arm] = compare_values(*pair).p if shared else 1.0
    open_ = [arm for arm, p in zip(ps, holm(ps.values()), strict=True) if p >= 0.05]
    tokens = compact(last_tokens(data.arms[best].phases[-1]))
    rest = (
        f"the difference from {', '.join(open_)} could be luck (p of at least 0.05 over training seeds, after Holm)"
        if open_
        else "every other budget is worse (p below 0.05 over training seeds, after Holm)"
    )
    return f"Best {figure}: {best} ({tokens} tokens); {rest}."


def _mean(values: dict[Any, float]) -> float:
    return float(np.mean(list(values.values())))


def transplant_table(data: StudyData, key: tuple[str, str, str]) -> Table:
    """Return the probe's score by the parts that were copied, and the part of the gap that they close."""
    found = data.transplants[key]
    rows = []
    for parts, scores in found.items():
        rows.append([parts, mean_words(list(scores.values())), _gap_share(found, parts), str(len(scores))])
    return Table(["Parts of the donor", "Score", "Of the gap", "Training seeds"], rows, "lr")


def _gap_share(found: dict[str, dict[int, float]], parts: str) -> str:
    """Return how much of the difference between `none` and `all` these parts make up, over the seeds of all three."""
    ends = found.get("none", {}), found.get("all", {})
    seeds = [seed for seed in found[parts] if seed in ends[0] and seed in ends[1]]
    if not seeds or parts in ("none", "all"):
        return ABSENT
    low, high, own = (np.mean([scores[seed] for seed in seeds]) for scores in (*ends, found[parts]))
    return f"{100 * (own - low) / (high - low):+.0f}%".replace("-", "−") if high > low else ABSENT


def runs_table(data: StudyData) -> Table:
    rows = []
    for run in (run for arm in data.arms for run in data.runs_of(arm)):
        rate = compact(run.tokens / run.seconds) if run.seconds > 0 else ABSENT
        parameters = ABSENT if run.parameters is None else compact(run.parameters)
        final = run.loss.get("mlm")
        row = [run.arm, str(run.seed), compact(run.tokens), duration(run.seconds), rate, parameters]
        rows.append([*row, ABSENT if final is None else f"{final:.4f}"])
    headers = ["Arm", "Training seed", "Tokens", "Time", "Tokens per second", "Parameters", "Final loss"]
    return Table(headers, rows, "lr", title="Pretraining")


def finetunings_table(data: StudyData) -> Table:
    rows = []
    for arm in data.scored:
        own = [record for record in data.of(ScoreRecord) if record.arm == arm]
        seconds = sum(record.seconds or 0.0 for record in own)
        seeds = len({record.seed for record in own})
        rows.append([arm_label(arm), str(len({r.task for r in own})), str(seeds), f"{len(own):,}", duration(seconds)])
    headers = ["Arm", "Tasks", "Pretrained models", "Fine-tunings", "Time"]
    return Table(headers, rows, "lr", title="Fine-tuning")


def failures_table(data: StudyData) -> Table:
    rows = [[record.job, record.status, record.message] for record in data.of(FailureRecord)]
    return Table(["Job", "Status", "Message"], rows, "l", title="Failed")


def corpora_table(data: StudyData) -> Table:
    corpora = data.registration.facts.corpora
    rows = [
        [prefix, compact(corpus.tokens), f"{corpus.documents:,}", corpus.sha256[:16]]
        for prefix, corpus in corpora.items()
    ]
    return Table(["Corpus", "Tokens", "Documents", "SHA-256, first digits"], rows, "lrrl", title="Corpora")


def protocol_table(data: StudyData) -> Table:
    """Return the settings of fine-tuning: a column per group of tasks with the same settings."""
    groups: dict[str, list[str]] = {}
    protocol = data.registration.facts.protocol
    for task, settings in protocol.items():
        groups.setdefault(repr(settings), []).append(task)
    columns = [(", ".join(tasks), protocol[tasks[0]]) for tasks in groups.values()]
    keys = dict.fromkeys(key for _, settings in columns for key in settings)
    rows = [[key, *(_plain(settings.get(key)) for _, settings in columns)] for key in keys]
    return Table(["Setting", *(tasks for tasks, _ in columns)], rows, "l", title="Fine-tuning settings")


def _plain(value: Any) -> str:
    return ABSENT if value is None else f"{value:g}" if isinstance(value, float) else str(value)
