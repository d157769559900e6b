"""The tables of a study's page. Scores are in percent, differences of scores in points, losses in nats per token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from megatron_detour.evaluation.report.statistics import Spread
from megatron_detour.evaluation.report.tables import interval_words, metric_words, p_words, percent, points
from megatron_detour.objectives import read_objective
from megatron_detour.study.data import StudyData, last_tokens, task_means
from megatron_detour.study.power import luck
from megatron_detour.study.records import LOSS, OUTCOMES, START, FailureRecord, ScoreRecord, VerdictRecord
from megatron_detour.study.statistics import Comparison
from megatron_detour.ui.format import compact, counted, duration, frozen_words
from megatron_detour.ui.tables import ABSENT, Entry, Table

STATES = {True: "Met", False: "Not met", None: "Not judged"}  # of a verdict without an outcome
DIGITS = 12  # of a hash in prose; the registration has all
NOT_YET = "There is no verdict yet."


def arm_label(arm: str) -> str:
    return "start model" if arm == START else arm


def verdicts_table(data: StudyData) -> Table:
    rows = []
    for name, verdict in data.verdicts.items():
        text = verdict.text if verdict else str(data.setting("criteria", name))
        rows.append([Entry(outcome(verdict), bold=True), name, text, verdict.sentence if verdict else NOT_YET])
    used = [name for name in OUTCOMES if name in {outcome(verdict) for verdict in data.verdicts.values()}]
    remark = "; ".join(f"{name}: {OUTCOMES[name]}" for name in used) + "."
    return Table(["Verdict", "Criterion", "Claim", "Found"], rows, "l", remarks=[remark] * bool(used), names=2)


def outcome(verdict: VerdictRecord | None) -> str:
    return (verdict.outcome or STATES[verdict.met]) if verdict else STATES[None]


def arms_table(data: StudyData) -> Table:
    rows = []
    for arm, facts in data.arms.items():
        phases = ", then ".join(_phase_words(phase) for phase in facts.phases)
        if offset := data.setting("arms", arm, "seed_offset"):
            phases += f"; masks by another seed (+{offset})"
        rows.append([Entry(arm, bold=arm == data.control), facts.about or _about(data, arm), phases])
    remarks = ["MLM: masked words are predicted from both sides. CLM: the next word is, from the left."]
    remarks += [f"Bold: {data.control}, the arm that others are compared with."] if data.control else []
    return Table(["Arm", "What it is", "Phases"], rows, "l", remarks=remarks)


def _about(data: StudyData, arm: str) -> str:
    """Return what the study file changes for an arm."""
    parts = []
    if (rate := data.setting("arms", arm, "control")) is not None:
        parts.append(f"detour phases become MLM with {100 * rate:.3g}% masked")
    parts += [f"{key} = {value}" for key, value in (data.setting("arms", arm, "set") or {}).items()]
    if data.setting("arms", arm, "seed_offset"):
        parts.append("other seeds of the masks")
    return "; ".join(parts) or "the base run file"


def _phase_words(phase: dict[str, Any]) -> str:
    """Return e.g. ``1M tokens of MLM, 15% masked``."""
    objective = read_objective(phase).describe() if phase.get("objective") else "training"
    frozen = f" ({frozen_words(phase)} frozen)" if phase.get("freeze") else ""
    return f"{compact(last_tokens(phase))} tokens of {objective}{frozen}"


def scores_table(data: StudyData) -> Table:
    """Return arms (rows) by tasks (columns), with both kinds of luck below each mean."""
    rows = []
    for arm in data.scored:
        table = data.scores(arm)
        chosen = [data.common_tasks, *([number] for number in range(len(data.tasks)))]
        cells = [_score(table[tasks]) for tasks in chosen]
        rows.append([Entry(arm_label(arm), bold=arm == data.control), *cells])
    headers = [f"{task} ({metric_words(data.metrics[task])})" for task in data.tasks]
    remarks = [
        "In percent: the mean over training seeds and fine-tuning seeds, and in parentheses two standard deviations: "
        "of the training seeds' means / of the fine-tuning seeds of one model (root mean square over models); "
        f"{ABSENT} for a single seed."
    ]
    if rows and (unscored := [arm for arm in data.arms if data.setting("arms", arm, "evaluate") not in (None, True)]):
        remarks.append(f"Not fine-tuned, as the study file says: {', '.join(unscored)}.")
    if (left := [task for number, task in enumerate(data.tasks) if number not in data.common_tasks]) and rows:
        remarks.append(f"The mean leaves out {', '.join(left)}: not every arm has it.")
    counts = {arm: len(data.seed_means(arm)) for arm in data.scored if arm != START}
    if fewer := [f"{arm} ({count})" for arm, count in counts.items() if count < max(counts.values())]:
        remarks.append(f"The mean is over fewer training seeds than others: {', '.join(fewer)}.")
    return Table(["Arm", mean_header(data), *headers], rows, "lr", remarks=remarks)


def mean_header(data: StudyData) -> str:
    return f"Mean of {counted(len(data.common_tasks), 'task')}"


def _score(table: np.ndarray) -> Entry:
    """Return the mean of scores [tasks, training seeds, fine-tuning seeds] over tasks."""
    means = task_means(table)
    means = means[:, ~np.isnan(means).any(0)].mean(0) if len(table) else []
    if not len(means):
        return Entry(ABSENT)
    spread = Spread.from_values(means)
    finetuning = luck(table.mean(0, keepdims=True)).finetuning[0]
    deviations = [ABSENT if sd is None else percent(sd) for sd in (spread.sd, finetuning)]
    return Entry(percent(spread.mean), note=f"({' / '.join(deviations)})")


def differences_table(data: StudyData) -> Table:
    rows = []
    for arm in data.scored:
        mean = data.difference(arm)
        cells = [_difference(data.difference(arm, task), arm) for task in range(len(data.tasks))]
        if mean or any(cell.text != ABSENT for cell in cells):
            p = p_words(mean.p) if mean and mean.low is not None and arm != START else ABSENT
            rows.append([Entry(arm_label(arm)), _difference(mean, arm), p, *cells])
    remarks = [
        f"In points; above 0 the arm is better than {data.control}. In parentheses: the 95% interval by Student's t "
        "over training seeds, paired. Bold: it excludes 0. These intervals and two-sided p are not corrected for their "
        "number; the verdicts are one-sided, and those that claim a difference are corrected."
    ]
    return Table(["Arm", mean_header(data), "two-sided p", *data.tasks], rows, "lr", remarks=remarks)


def _difference(comparison: Comparison | None, arm: str) -> Entry:
    if comparison is None:
        return Entry(ABSENT)
    text = points(comparison.mean)
    if comparison.low is None or arm == START:  # one model has no training seeds
        return Entry(text)
    clear = comparison.low > 0 or comparison.high < 0
    return Entry(text, clear, f"({interval_words({'low': comparison.low, 'high': comparison.high})})")


def losses_table(data: StudyData) -> Table:
    rows = []
    for arm in data.arms:
        if own := data.losses(arm):
            found = data.difference_of(LOSS, arm)
            row = [Entry(arm, bold=arm == data.control), loss_words(own.values()), str(len(own))]
            row += [loss_words(data.losses(arm, before_last_phase=True).values())]
            rows.append(
                [*row, ABSENT if found is None else f"{found.mean:+.4f}".replace("-", "−"), interval_or_absent(found)]
            )
    headers = ["Arm", "Final loss", "Training seeds", "Before the last phase"]
    headers += [f"Difference from {data.control}", "95%"]
    remarks = ["Mean ± standard deviation over training seeds, in nats per masked token."]
    if lost := [f"{run.arm} seed {run.seed}" for run in data.runs.values() if run.loss is None]:
        remarks.append(f"Without a final loss: {', '.join(lost)}.")
    return Table(headers, rows, "lr", remarks=remarks)


def loss_words(values: Iterable[float]) -> str:
    values = list(values)
    if not values:
        return ABSENT
    spread = Spread.from_values(values)
    return f"{spread.mean:.4f}" + ("" if spread.sd is None else f" ± {spread.sd:.4f}")


def interval_or_absent(found: Comparison | None, digits: int = 4, sign: str = "+") -> str:
    """Return the 95% interval with this many decimals."""
    if found is None or found.low is None:
        return ABSENT
    return f"{found.low:{sign}.{digits}f} to {found.high:{sign}.{digits}f}".replace("-", "−")


def runs_table(data: StudyData) -> Table:
    rows = []
    for run in (run for arm in data.arms for run in data.runs_of(arm)):
        loss = ABSENT if run.loss is None else f"{run.loss:.4f}"
        parameters = "" if run.parameters is None else compact(run.parameters)
        amounts = [compact(run.tokens), compact(run.tokens - run.shared_tokens), duration(run.seconds)]
        rows.append([run.arm, str(run.seed), *amounts, parameters, loss, "" if run.finished else run.status])
    headers = ["Arm", "Training seed", "Tokens", "Own tokens", "Time", "Parameters", "Final loss", "Status"]
    remarks = ["Own tokens: those not shared with another run, whose checkpoint it continued; the time is of these."]
    return Table(headers, rows, "lr", title="Pretraining", remarks=remarks).without_empty_columns()


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
        [prefix, compact(corpus.tokens), f"{corpus.documents:,}", corpus.sha256[:DIGITS]]
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
    used = [key for key in keys if any(settings.get(key) is not None for _, settings in columns)]
    rows = [[_setting(key), *(_plain(settings.get(key)) for _, settings in columns)] for key in used]
    return Table(["Setting", *(tasks for tasks, _ in columns)], rows, "l", title="Fine-tuning settings")


SETTINGS = {  # of fine-tuning, in words, where the name alone does not say it
    "batch": "examples per step",
    "max_length": "longest text (tokens)",
    "epochs": "passes over the training examples",
    "validate_every": "steps between validations",
    "head_learning_rate": "learning rate of the head",
    "warmup": "warm-up (share of the steps)",
    "schedule": "learning rate after the warm-up",
    "clip": "largest gradient norm",
    "pooling": "what represents a text",
    "head": "classifier",
    "ner_head": "classifier of named entities",
    "select_by": "validation metric that selects the epoch",
    "by_length": "batches of texts of similar length",
    "train_examples": "training examples, at most",
    "dev_examples": "validation examples, at most",
}
VALUES = {
    "True": "yes",
    "False": "no",
    "mean": "mean of its tokens",
    "cls": "[CLS]",
    "transformers": "that of transformers",
    "tokens": "a label for each token",
    "span": "a label for each span",
}


def _setting(key: str) -> str:
    return SETTINGS.get(key, key.replace("_", " "))


def _plain(value: Any) -> str:
    if value is None:
        return ABSENT
    return f"{value:g}" if isinstance(value, float) else VALUES.get(str(value), str(value))
