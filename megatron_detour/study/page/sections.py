"""The sections of a study's page, in order; each says in a sentence how to read it. Those without data are left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_detour.study.data import StudyData, decay_sweeps
from megatron_detour.study.page import analysis_tables, tables
from megatron_detour.study.page.tables import Table
from megatron_detour.study.records import START, FailureRecord, ScoreRecord
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
        "An arm is one way of pretraining; all start from the same model, read the same text in the same order for a "
        "training seed, and differ in what is written here.",
        [tables.arms_table(data)],
    )
    yield Section(
        "Scores on tasks",
        "Each row is an arm and each column a task: two arms differ if their means differ by much more than the "
        "deviations below them." + (" The start model was not trained further." if START in data.scored else ""),
        [tables.scores_table(data)],
    )
    yield Section(
        "Differences from the control",
        "Each figure is an arm's score minus the control's; an interval that contains 0 means that other training "
        "seeds could turn it around.",
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
        "Drift tells in which layers an arm represents the same texts differently from the reference.",
        [analysis_tables.drift_table(data)],
        "drift",
    )
    yield Section(
        "Drift beyond the noise of seeds",
        "Another seed changes representations too, so drift counts where it is greater than that: a ratio above 1.",
        plot="drift_ratio",
    )
    yield Section(
        "Persistence",
        "Persistence tells whether training on after the detour takes the representations back: 100% is kept if not.",
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
        "Parts of the donor are copied into the recipient: those that move the score towards the donor's carry the "
        "difference. Shares of the gap say little where the gap itself is small or uncertain.",
        found,
        "transplants",
    )


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
    return (
        f"{done}; {counted(failed, 'job')} failed or {'was' if failed == 1 else 'were'} skipped."
        if failed
        else f"{done}."
    )


def verdict(data: StudyData) -> str:
    """Return the count of verdicts in a sentence."""
    found = [verdict.met if verdict else None for verdict in data.verdicts.values()]
    if not found:
        return "The study has no criteria."
    parts = [f"{found.count(True)} met", f"{found.count(False)} not met"]
    parts += [f"{found.count(None)} not judged"] * bool(found.count(None))
    total = "1 criterion" if len(found) == 1 else f"{len(found)} criteria"
    return f"{total}: {', '.join(parts)}."
