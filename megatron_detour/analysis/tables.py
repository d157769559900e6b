"""Tables of the analyses for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from megatron_detour.analysis.drift import Drift, layer_words, regions_of
from megatron_detour.analysis.layer_choice import Proposal
from megatron_detour.analysis.linear_probe import ProbeResult
from megatron_detour.analysis.needle import NeedleResult, Rate
from megatron_detour.analysis.persistence import Persistence
from megatron_detour.ui.format import compact
from megatron_detour.ui.tables import ABSENT, Entry, Table


def drift_table(drift: Drift) -> Table:
    """Return divergence, noise and ratio of each layer, then of the regions."""
    columns = (drift.mean, drift.sd, drift.noise_mean, drift.noise_sd, drift.ratio)
    rows = [[str(layer), *(_figure(column, layer) for column in columns)] for layer in range(drift.layers)]
    for name, figures in drift.regions().items():
        own, noise, ratio = (figures[key] for key in ("divergence", "noise", "ratio"))
        label = f"{name}, {layer_words(regions_of(drift.layers)[name])}"
        rows.append(
            [label, _number(own), "", *(("", "", "") if noise is None else (_number(noise), "", _number(ratio)))]
        )
    headers = ("Layers", "1 − CKA", "sd over draws", "Noise of seeds", "sd over draws", "Ratio")
    return Table(headers, rows, "lr").without_empty_columns()


def persistence_table(result: Persistence) -> Table:
    """Return the mean divergence of each region at each checkpoint."""
    regions = result.regions()
    rows = [
        [compact(tokens), *(_number(values[at]) for values in regions.values())]
        for at, tokens in enumerate(result.tokens)
    ]
    where = regions_of(result.mean.shape[1])
    return Table(("Tokens", *(f"{name}, {layer_words(where[name])}" for name in regions)), rows, "r")


def probe_table(results: Mapping[str, ProbeResult]) -> Table:
    """Return a row per layer with the score of each model in percent, sd over seeds below; the best layer is bold."""
    first = next(iter(results.values()))
    rows = []
    for at, layer in enumerate(first.layers):
        cells = [_score(result, at) for result in results.values()]
        rows.append([str(layer), *cells])
    rows.append(["most frequent label", *(f"{100 * result.baseline:.1f}" for result in results.values())])
    return Table(("Layer", *results), rows, "lr", title=f"{first.task}: {first.metric} on test, %")


def loss_table(results: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a row per model: losses in nats per predicted token, accuracy in percent."""
    shown = {"val_mlm_loss": "MLM loss", "val_mlm_accuracy": "MLM accuracy, %", "val_clm_loss": "CLM loss"}

    def cell(key: str, figure: float | None) -> str:
        if figure is None:  # the tokenizer lacks what this objective needs
            return ABSENT
        return f"{100 * figure:.1f}" if key == "val_mlm_accuracy" else f"{figure:.4f}"

    rows = [[name, *(cell(key, figures.get(key)) for key in shown)] for name, figures in results.items()]
    return Table(("Model", *shown.values()), rows, "lr")


def needle_table(results: Mapping[str, NeedleResult]) -> Table:
    """Return accuracy in percent with its interval: of all, by length and by place."""
    rows = []
    for label, cell in _needle_rows(next(iter(results.values()))):
        rows.append([label, *(_rate(cell(result)) for result in results.values())])
    return Table(("Examples", *results), rows, "lr", title="accuracy on test, % (guessing: 50)")


def layer_table(proposal: Proposal) -> Table:
    """Return ratio, shares of the gradients, and what is proposed for each layer."""
    shares = proposal.gradients or {}
    needed = range(0) if proposal.first is None else range(proposal.first, proposal.last + 1)
    rows = [
        [
            str(layer),
            _number(ratio),
            *(f"{100 * values[layer]:.1f}" for values in shares.values()),
            ("needed" if layer in needed else "freeze") if proposal.freeze else "",
        ]
        for layer, ratio in enumerate(proposal.ratio)
    ]
    headers = ("Layer", "Drift ratio", *(f"{name.upper()} gradient, %" for name in shares), "")
    return Table(headers, rows, "lr").without_empty_columns()


def _needle_rows(result: NeedleResult) -> Iterable[tuple[str, Any]]:
    yield "all", lambda result: result.all
    for length in result.by_length:
        yield f"{length:,} tokens", lambda result, n=length: result.by_length[n]
    for place in result.by_place:
        yield f"at the {place}", lambda result, name=place: result.by_place[name]


def _rate(rate: Rate) -> Entry:
    return Entry(f"{100 * rate.accuracy:.1f}", note=f"{100 * rate.low:.1f} to {100 * rate.high:.1f}")


def _score(result: ProbeResult, at: int) -> Entry:
    scores = result.scores[at]
    note = f"± {100 * np.std(scores, ddof=1):.1f}" if len(scores) > 1 else ""
    return Entry(f"{100 * np.mean(scores):.1f}", bold=result.layers[at] == result.best_layer, note=note)


def _figure(column: np.ndarray | None, layer: int) -> str:
    return "" if column is None or np.isnan(column).all() else _number(column[layer])


def _number(value: float | None) -> str:
    if value is None or not np.isfinite(value):
        return ABSENT
    return f"{value:.2f}" if abs(value) >= 2 else f"{value:.4f}"
