"""The tables of a study's analyses: drift, persistence, decay sweep, transplants, needles and layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_detour.analysis.drift import layer_words
from megatron_detour.analysis.layer_choice import Proposal, as_arm, propose
from megatron_detour.evaluation.report.statistics import LEVEL, Spread, holm
from megatron_detour.evaluation.report.tables import percent, points
from megatron_detour.objectives import read_objective
from megatron_detour.study.data import StudyData, last_tokens, regions, share_kept
from megatron_detour.study.page.tables import interval_or_absent, loss_words, mean_header
from megatron_detour.study.records import LOSS, NEEDLE
from megatron_detour.study.statistics import compare_values
from megatron_detour.ui.format import compact
from megatron_detour.ui.tables import ABSENT, Entry, Table


def drift_table(data: StudyData) -> Table:
    """Return divergence, noise and their ratio by arm and region."""
    rows = []
    for arm, drifts in data.drifts.items():
        for region, layers in regions(data).items():
            own, noise, ratio = (np.array(x) for x in zip(*(drift.region(layers) for drift in drifts), strict=True))
            known = ratio[~np.isnan(ratio)]
            test = compare_values(list(known), log=True) if len(known) and (known > 0).all() else None
            row = [arm, f"{region} ({layer_words(layers)})", f"{own.mean():.4f}"]
            row.append(f"{np.nanmean(noise):.4f}" if len(known) else ABSENT)
            rows.append(
                [*row, f"{test.mean:.2f}" if test else ABSENT, interval_or_absent(test, 2, ""), str(len(drifts))]
            )
    headers = ["Arm", "Layers", "Divergence", "Noise of seeds", "Ratio", "95%", "Training seeds"]
    remark = (
        "Divergence: 1 − CKA, the mean over draws of texts, layers and training seeds. Noise: the same of two runs "
        "of the reference that differ by their seed. Ratio: divergence / noise, the geometric mean over training "
        "seeds with its interval by Student's t over logarithms."
    )
    return Table(headers, rows, "llr", remarks=[remark], names=2)


def persistence_table(data: StudyData) -> Table:
    """Return the divergence at the first and at the last checkpoint, by region."""
    rows = []
    for arm, records in data.persistence.items():
        ends = [sorted(record.points)[end] for record in records for end in (0, -1)]
        tokens = [compact(np.mean([each[0] for each in part])) for part in (ends[::2], ends[1::2])]
        for region, layers in regions(data).items():
            values = np.array([np.mean(table, 0)[layers].mean() for _, table in ends])
            kept = [100 * share for record in records if (share := share_kept(record, layers)) == share]
            row = [arm, f"{region} ({layer_words(layers)})"]
            row += [
                f"{part.mean():.4f} ({after})" for part, after in zip((values[::2], values[1::2]), tokens, strict=True)
            ]
            rows.append([*row, f"{np.mean(kept):.0f}%" if kept else ABSENT, str(len(records))])
    headers = ["Arm", "Layers", "First checkpoint (tokens)", "Last checkpoint (tokens)", "Kept", "Training seeds"]
    remark = "Tokens: since the phase began. Kept: last over first checkpoint, the mean of the training seeds' shares."
    return Table(headers, rows, "llr", remarks=[remark], names=2)


def sweep_table(data: StudyData, arms: Sequence[str]) -> Table:
    rows = []
    for arm in arms:
        phases, means = data.arms[arm].phases, list(data.seed_means(arm).values())
        tokens, before = last_tokens(phases[-1]), sum(last_tokens(phase) for phase in phases[:-1])
        share = f"{100 * tokens / before:.3g}%" if before else ABSENT
        row = [arm, compact(tokens), share, loss_words(data.losses(arm).values())]
        rows.append([*row, mean_words(means), str(max(len(means), len(data.losses(arm))))])
    headers = ["Arm", "Decay tokens", "Of the phases before", "Final loss", mean_header(data), "Training seeds"]
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
    open_ = [arm for arm, p in zip(ps, holm(ps.values()), strict=True) if p >= LEVEL]
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
    """Return the score or loss by the parts that were copied, and the part of the difference that they make up."""
    found, task = data.transplants[key], key[2]
    words = loss_words if task == LOSS else mean_words
    rows = [[parts, words(list(own.values())), _gap_share(found, parts), str(len(own))] for parts, own in found.items()]
    measure, remark = f"Probe on {task}", "In percent: the mean with its 95% interval over training seeds."
    if task == LOSS:
        measure, remark = "MLM loss", "In nats per masked token: mean ± standard deviation over training seeds."
    return Table(["Parts of the donor", measure, "Of the difference", "Training seeds"], rows, "lr", remarks=[remark])


def _gap_share(found: dict[str, dict[int, float]], parts: str) -> str:
    """Return how much of the difference between `none` and `all` these parts make up, over the seeds of all three."""
    ends = found.get("none", {}), found.get("all", {})
    seeds = [seed for seed in found[parts] if seed in ends[0] and seed in ends[1]]
    if not seeds or parts in ("none", "all"):
        return ABSENT
    none, whole, own = (np.mean([figures[seed] for seed in seeds]) for figures in (*ends, found[parts]))
    return f"{round(100 * (own - none) / (whole - none)):+d}%".replace("-", "−") if whole != none else ABSENT


def needle_table(data: StudyData) -> Table:
    """Return the accuracy of each arm: of all test questions with its difference from the control, and of parts."""
    rows, parts = [], {}
    for records in data.needles.values():
        parts |= dict.fromkeys(part for record in records.values() for part, _ in (*record.by_length, *record.by_place))
    for arm, records in data.needles.items():
        found = data.difference_of(NEEDLE, arm)
        row = [Entry(arm, bold=arm == data.control), mean_words([record.accuracy for record in records.values()])]
        row.append(ABSENT if found is None else points(found.mean))
        shares = [dict((*record.by_length, *record.by_place)) for record in records.values()]
        row += [percent(np.mean(own)) if (own := [s[part] for s in shares if part in s]) else ABSENT for part in parts]
        rows.append([*row, str(len(records))])
    headers = ["Arm", "All questions", f"Difference from {data.control}"]
    headers += [f"{part:,} tokens" if isinstance(part, int) else f"at the {part}" for part in parts]
    counts = sorted({record.examples for records in data.needles.values() for record in records.values()})
    remark = (
        "In percent, means over training seeds; in parentheses the 95% interval over training seeds. A model answers "
        f"{' or '.join(f'{count:,}' for count in counts)} questions, which alone moves its accuracy by up to "
        f"±{98 / counts[0] ** 0.5:.1f} points."
        if counts
        else ""
    )
    return Table([*headers, "Training seeds"], rows, "lr", remarks=[remark])


def proposals(data: StudyData) -> dict[str, Proposal]:
    """Return the proposal of each training seed, then that of their ratios' geometric means; none without noise."""
    chosen = data.setting("analyses", "layers")
    ratios = {drift.seed: drift.ratio() for drift in data.drifts.get(chosen["arm"], ())} if chosen else {}
    known = {str(seed): ratio for seed, ratio in ratios.items() if np.isfinite(ratio).all() and (ratio > 0).all()}
    if len(known) > 1:
        known["all, by geometric means"] = np.exp(np.mean(np.log(list(known.values())), 0))
    return {name: propose(ratio, threshold=chosen["threshold"]) for name, ratio in known.items()}


def proposals_table(data: StudyData) -> Table:
    rows = []
    for name, found in proposals(data).items():
        layers = range(0) if found.first is None else range(found.first, found.last + 1)
        needed = layer_words(layers) if layers else "none"
        ratios = [found.ratio[layer] for layer in layers]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ABSENT
        rows.append([name, needed, spread, ", ".join(found.freeze) or "nothing"])
    headers = ["Training seed", "Layers needed", "Their ratios", "To freeze"]
    return Table(headers, rows, "l")


def proposed_arm(data: StudyData) -> str:
    """Return the proposal of all seeds as an arm of a further study, in a sentence; nothing if nothing is proposed."""
    found = list(proposals(data).values())
    if not found or not found[-1].freeze:
        return ""
    phases = data.arms[data.setting("analyses", "layers", "arm")].phases
    detour = next((phase["name"] for phase in phases if read_objective(phase).detour), None)
    return f"As an arm of a further study: {as_arm(detour, found[-1].freeze)}" if detour else ""
