"""The result of a comparison of runs in one sentence."""

from __future__ import annotations

from megatron_detour.objectives import REFERENCE
from megatron_detour.observe.run_folder import VALIDATION_FIGURES, Run
from megatron_detour.ui.format import compact

KEY = f"val_{REFERENCE.name}_loss"
SAME = 0.0005  # nats; smaller differences are invisible with three decimals
ONE_RUN = "with one run each, the effect of the recipe cannot be distinguished from that of seed and data order"


def verdict(runs: list[Run], labels: list[str], compared: list[tuple[str, str]]) -> str:
    """`compared` are answers (Yes, No, Unknown) with explanations: whether data and validation were the same."""
    held = [{run.tokens_at(record["step"]): record[KEY] for record in run.validations if KEY in record} for run in runs]
    common = set(held[0]).intersection(*held[1:])
    if not common:
        return f"No result yet: the runs have no held-out {REFERENCE.label} loss at the same number of tokens."
    if any(answer == "No" and "validated" in text for answer, text in compared):
        return "Unknown which run is better: the runs were validated differently, so their losses are not comparable."
    tokens = max(common)
    figure, first = VALIDATION_FIGURES[KEY], held[0][tokens]
    against = [_against(label, own[tokens] - first) for label, own in zip(labels[1:], held[1:], strict=True)]
    begun = f"After {compact(tokens)} tokens" if tokens else "Before training"
    doubt = " The runs did not read the same data." if any(answer == "No" for answer, _ in compared) else ""
    return (
        f"{begun} the held-out {REFERENCE.label} loss of {labels[0]} is {figure.value(first)} {figure.unit}; "
        f"{'; '.join(against)}; {ONE_RUN}.{doubt}"
    )


def _against(label: str, difference: float) -> str:
    if abs(difference) < SAME:
        return f"that of {label} is the same"
    return f"that of {label} is {abs(difference):.3f} {'lower' if difference < 0 else 'higher'}"
