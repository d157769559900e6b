"""The sections of a study's page, in order; each says in a sentence how to read it. Those without data are left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_detour.study.data import StudyData, decay_sweeps
from megatron_detour.study.page import analysis_tables, tables
from megatron_detour.study.page.tables import Table
from megatron_detour.study.power import luck, power
from megatron_detour.study.records import OUTCOMES, START, FailureRecord, ScoreRecord
from megatron_detour.ui.format import compact, counted, duration


@dataclass(frozen=True)
class Section:
    """`plot` is the name of a plot, shown if it was drawn."""

    title: str
    reading: str
    tables: list[Table] = field(default_factory=list)
    plot: str = ""
    remarks: list[str] = field(default_factory=list)

    def has_content(self, plots: dict[str, object]) -> bool:
        return self.plot in plots or any(table.rows for table in self.tables) or bool(self.remarks)


def sections(data: StudyData) -> Iterator[Section]:
    """Yield all sections; some may be empty."""
    yield Section(
        "The arms",
        f"An arm is one way of pretraining; all start from {_start(data)}, read the same text in the same order for a "
        "training seed, and differ in what is written here.",
        [tables.arms_table(data)],
    )
    yield Section(
        "Scores on tasks",
        "Each row is an arm and each column a task, with the spread of the scores in parentheses; to compare arms, "
        "read the next section." + (" The start model was not trained further." if START in data.scored else ""),
        [tables.scores_table(data)],
    )
    yield Section(
        "Differences from the control",
        "Each figure is an arm's score minus the control's; an interval that contains 0 means that the "
        "results do not settle which of the two is better.",
        [tables.differences_table(data)],
        "differences",
    )
    yield Section(
        "Validation loss",
        "The loss of predicting masked words of held-out text, with the same masks for all arms: lower is better.",
        [tables.losses_table(data)],
        "curves",
    )
    yield from _analyses(data)
    yield from _records(data)


def _analyses(data: StudyData) -> Iterator[Section]:
    yield Section(
        "Drift",
        f"Drift tells in which layers an arm represents the same texts differently from {_drift_reference(data)}.",
        [analysis_tables.drift_table(data)],
        "drift",
    )
    yield Section(
        "Drift beyond the noise of seeds",
        "Another seed changes representations too, so drift counts where it is greater than that: a ratio above 1."
        + _noise(data),
        plot="drift_ratio",
    )
    yield Section(
        "Persistence",
        "Persistence tells whether the last phase takes the drift back: at 100% all of it is kept, at 0% it is undone. "
        f"The reference is {_persistence_reference(data)}. A divergence no greater than the noise of seeds above is no "
        "drift that could be kept.",
        [analysis_tables.persistence_table(data)],
        "persistence",
    )
    sweeps = [arms for arms in decay_sweeps(data) if any(data.seed_means(arm) or data.losses(arm) for arm in arms)]
    yield Section(
        "Decay sweep",
        "These arms differ only in the tokens of their last phase; the sentences below name the best and what could "
        "be as good.",
        [analysis_tables.sweep_table(data, arms) for arms in sweeps],
        "decay_sweep",
        [sentence for arms in sweeps if (sentence := analysis_tables.best_budget(data, arms))],
    )
    found = [analysis_tables.transplant_table(data, key) for key in data.transplants]
    yield Section(
        "Transplants",
        "Parts of the donor are copied into the recipient: those that move the score or the loss toward the donor's "
        "carry the difference. Shares of it say little where it is small or uncertain itself. The loss is that of "
        "the validation above.",
        found,
        "transplants",
    )
    yield Section(
        "Needle in a haystack",
        "How often a classifier on the frozen [CLS] tells whether a given fact is in a long document: guessing gives "
        "50%.",
        [analysis_tables.needle_table(data)],
    )
    arm = analysis_tables.proposed_arm(data)
    yield Section(
        "Layer choice",
        "The range of layers that as a whole most exceeds "
        f"{data.setting('analyses', 'layers', 'threshold')} times the noise of seeds is proposed as what the detour "
        "needs. This is a rule's proposal, to be tested in a further study, and no result.",
        [analysis_tables.proposals_table(data)],
        remarks=[arm] * bool(arm),
    )


def _start(data: StudyData) -> str:
    return "the same model" if data.setting("run") is None or data.registration.facts.start else "a new model"


def _drift_reference(data: StudyData) -> str:
    reference = data.setting("analyses", "drift", "reference")
    return f"{reference} at its end" if reference else "the reference"


def _noise(data: StudyData) -> str:
    """Say whose divergence is the noise."""
    noise, reference = (data.setting("analyses", "drift", key) for key in ("noise", "reference"))
    return f" Here that is {noise} against {reference}: the same recipe with other masks." if noise else ""


def _persistence_reference(data: StudyData) -> str:
    reference = data.setting("analyses", "persistence", "reference")
    return f"{reference} before its last phase" if reference else "a fixed model"


def _records(data: StudyData) -> Iterator[Section]:
    missing = missing_runs(data)
    seconds = (sum(run.seconds for run in data.runs.values()), sum(x.seconds or 0.0 for x in data.of(ScoreRecord)))
    tokens = compact(sum(run.tokens - run.shared_tokens for run in data.runs.values()))
    total = f"Pretraining took {duration(seconds[0])} for {tokens} tokens, fine-tuning {duration(seconds[1])}."
    yield Section(
        "Everything that was run",
        "Every run of the study that has ended, with what it took.",
        [tables.runs_table(data), tables.finetunings_table(data)],
        remarks=[total] * bool(data.runs) + [f"Not finished: {', '.join(missing)}."] * bool(missing),
    )
    yield Section(
        "Everything that failed",
        "A failed job has no result above; a skipped one needed a failed one.",
        [tables.failures_table(data)],
    )
    yield Section(
        "Data and settings",
        "The files that the runs read, by their hashes, and how models were fine-tuned.",
        [tables.corpora_table(data), tables.protocol_table(data)],
    )


def missing_runs(data: StudyData) -> list[str]:
    """Return the planned runs that have not finished, as words."""
    done = {(run.arm, run.seed) for run in data.finished}
    return [f"{arm} seed {seed}" for arm in data.arms for seed in data.seeds if (arm, seed) not in done]


def state(data: StudyData) -> str:
    """Return how much of the study is done, in a sentence."""
    planned, failed = len(data.arms) * len(data.seeds), len(data.of(FailureRecord))
    done = f"{len(data.finished)} of {counted(planned, 'pretraining run')} have finished"
    if failed:
        return f"{done}; {counted(failed, 'job')} failed or {'was' if failed == 1 else 'were'} skipped."
    return f"{done}, and no job failed." if len(data.finished) == planned else f"{done}."


def other_versions(data: StudyData) -> str:
    """Return which results were made under other versions than the registered ones, in a sentence; nothing if none."""
    registered = data.registration.facts.versions
    changed = [
        f"{package} {' and '.join(own[1:])} instead of {own[0]}"
        for package, own in data.versions.items()
        if package in registered and len(own) > 1
    ]
    return f"Some results were made under other versions than were registered: {', '.join(changed)}." if changed else ""


def could_find(data: StudyData) -> str:
    """Return which difference the study was planned to find, and which by the deviations of its own scores."""
    planned, scores = data.registration.power, data.scores(data.control or "")
    if planned is None:
        return ""
    if scores is None or not data.common_tasks:
        return planned.statement
    seen = luck(scores[data.common_tasks])
    needed = power(seen, len(data.seeds), len(data.finetuning_seeds), level=planned.level)
    if needed is None or None in (*seen.finetuning, seen.shared):
        return planned.statement
    return f"{planned.statement} With the deviations that {data.control} shows here it takes {100 * needed:.1f} points."


def verdict(data: StudyData) -> str:
    """Return the count of verdicts in a sentence."""
    found = [tables.outcome(verdict) for verdict in data.verdicts.values()]
    if not found:
        return "The study has no criteria."
    parts = [f"{found.count(name)} {name.lower()}" for name in OUTCOMES if name in found]
    total = "1 criterion" if len(found) == 1 else f"{len(found)} criteria"
    return f"{total}: {', '.join(parts)}."
