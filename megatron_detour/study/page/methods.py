"""The methods paragraph and the LaTeX table of a study, made from its registration and results."""

from __future__ import annotations

import re

from megatron_detour.evaluation.report.tables import metric_words
from megatron_detour.study.data import StudyData
from megatron_detour.study.page.tables import DIGITS, scores_table
from megatron_detour.study.records import LOSS, START, ScoreRecord
from megatron_detour.text import visible
from megatron_detour.ui.format import compact, counted
from megatron_detour.ui.tables import ABSENT

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "−": "$-$", "±": r"$\pm$", "–": "--",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
}  # fmt: skip


def methods_paragraph(data: StudyData) -> str:
    """Return how the study was done, in sentences whose every figure is in the registration or the results."""
    sentences = [_pretraining(data), _corpora(data), _evaluation(data), _analyses(data), _tests(data)]
    return visible(" ".join(filter(None, sentences)))


def _pretraining(data: StudyData) -> str:
    registration, seeds = data.registration, data.seeds
    start = registration.facts.start
    # of the configuration and each file of weights; None for a model of the Hub, and for random weights
    hashes = ", ".join(part[:DIGITS] for part in (start or "").split("-"))
    origin = f"one start model (SHA-256 of its files: {hashes}…)" if start else "one start"
    sizes = {run.parameters for run in data.runs.values() if run.parameters}
    size = f" with {compact(sizes.pop())} parameters" if len(sizes) == 1 else ""
    return (
        f"We pretrained an encoder of {counted(registration.depth, 'layer')}{size} from {origin} in "
        f"{counted(len(data.arms), 'arm')} ({', '.join(data.arms)}; see the table of arms) with "
        f"{counted(len(seeds), 'training seed')} each ({', '.join(map(str, seeds))}); a seed determines the order of "
        f"the data and the masks, so that arms are paired by it. At the time of writing {len(data.finished)} of "
        f"{len(data.arms) * len(seeds)} runs have finished."
    )


def _corpora(data: StudyData) -> str:
    corpora = data.registration.facts.corpora
    parts = [
        f"{prefix} ({compact(corpus.tokens)} tokens in {counted(corpus.documents, 'document')})"
        for prefix, corpus in corpora.items()
    ]
    return f"Corpora for training and validation: {', '.join(parts)}." if parts else ""


def _evaluation(data: StudyData) -> str:
    if not data.tasks:
        return ""
    tasks = [f"{task} ({metric_words(data.metrics[task])})" for task in data.tasks]
    protocol = data.setting("evaluation", "protocol")
    named = f" by the protocol {protocol}" if protocol else ""
    arms = counted(sum(arm != START for arm in data.scored), "arm")
    count, models = len(data.of(ScoreRecord)), f"the start model and {arms}" if START in data.scored else arms
    return (
        f"To evaluate, {models} were fine-tuned{named} on {counted(len(tasks), 'task')}: {', '.join(tasks)}, with "
        f"{counted(len(data.finetuning_seeds), 'fine-tuning seed')} each ({count:,} fine-tunings); scores are those "
        "of the test split."
    )


def _analyses(data: StudyData) -> str:
    parts = []
    if data.drifts:
        texts = data.setting("analyses", "drift", "texts") or {}
        drawn = f" of {texts['count']} held-out texts in {len(texts['draws'])} draws" if "draws" in texts else ""
        parts.append(
            f"Drift is 1 - CKA (linear, float64) of the mean hidden states{drawn}, per layer; its noise is that of "
            "two runs of the reference that differ by their seed."
        )
    if data.persistence:
        parts.append("Persistence is the same divergence of the checkpoints of a phase from the reference before it.")
    if data.needles:
        parts.append(
            "In the needle test a classifier of two layers on the frozen [CLS] tells whether a made-up fact is in a "
            "document."
        )
    if data.transplants:
        tasks = dict.fromkeys(task for *_, task in data.transplants)
        judges = " and ".join("the validation loss" if task == LOSS else f"a linear probe on {task}" for task in tasks)
        parts.append(f"Transplants copy parameter blocks of one model into its twin, judged by {judges}.")
    return " ".join(parts)


def _tests(data: StudyData) -> str:
    registration, amendments = data.registration, len(data.registration.amendments)
    criteria = "1 criterion was" if len(data.verdicts) == 1 else f"{len(data.verdicts)} criteria were"
    changes = counted(amendments, "later amendment") if amendments else "no later amendment"
    return (
        f"{criteria} registered on {registration.registered[:10]} (SHA-256 {registration.sha256[:DIGITS]}…), with "
        f"{changes}. Unless a criterion names another test, arms are compared by Student's t over the paired "
        "differences of training seeds, and the p of all claims of a difference is corrected by Holm's method."
    )


def latex_table(data: StudyData) -> str:
    """Return a table of arms by tasks for the package booktabs; an empty string without scores."""
    table = scores_table(data)
    if not table.rows:
        return ""
    body = []
    for number, (arm, mean, *tasks) in enumerate(table.rows):
        cells = [latex(arm.text)] + [_cell(cell.text, cell.note) for cell in (*tasks, mean)]
        body.append(" & ".join(cells) + r" \\")
        if not number and data.scored[0] == START and len(table.rows) > 1:
            body.append(r"\midrule")
    headers = " & ".join(map(latex, ["Arm", *data.tasks, table.headers[1]]))
    name = re.sub(r"[^a-z0-9]+", "-", data.registration.name.lower()).strip("-")
    seeds = f"{counted(len(data.seeds), 'training seed')} and {counted(len(data.finetuning_seeds), 'fine-tuning seed')}"
    metrics = ", ".join(f"{task}: {metric_words(data.metrics[task])}" for task in data.tasks)
    caption = (
        f"{data.registration.name}: test scores in percent ({metrics}), means over {seeds}. In parentheses: standard "
        "deviation over training seeds / over fine-tuning seeds."
    )
    lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering\small"]
    lines += [
        rf"\begin{{tabular}}{{l{'r' * (len(data.tasks) + 1)}}}",
        r"\toprule",
        headers + r" \\",
        r"\midrule",
        *body,
    ]
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{latex(caption)}}}",
        rf"\label{{tab:{name}}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str, note: str) -> str:
    unknown = note in ("", f"({ABSENT} / {ABSENT})")
    return latex(text) if unknown else rf"{latex(text)} {{\scriptsize {latex(note)}}}"


def latex(text: str) -> str:
    """Return `text` as LaTeX renders it literally, on one line."""
    return "".join(_LATEX.get(each, each) for each in visible(" ".join(text.split())))
