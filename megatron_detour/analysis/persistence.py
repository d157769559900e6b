"""Whether a decay undoes the detour's drift: divergence of its checkpoints from one reference model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.analysis.drift import Measurement, Rows, numbers, regions_of, rows, spread
from megatron_detour.checkpoint.store import RUN_STATE, find_checkpoints
from megatron_detour.errors import DetourError
from megatron_detour.structured import read_json_object

Checkpoint = tuple[int, Path]  # tokens seen, folder


@dataclass(frozen=True)
class Persistence:
    """Divergence [checkpoints][draws][layers] of checkpoints, by their tokens, from a reference model.

    The paper's reference is the control before its decay, so that a decay back to the control would go to its noise.
    """

    tokens: tuple[int, ...]
    divergence: tuple[Rows, ...]
    reference: str
    checkpoints: tuple[str, ...]
    texts: int  # per draw
    measurement: Measurement

    @property
    def mean(self) -> np.ndarray:
        """Mean over draws, [checkpoints, layers]."""
        return np.mean(self.divergence, 1)

    @property
    def sd(self) -> np.ndarray:
        """Standard deviation over draws, [checkpoints, layers]; NaN for one draw."""
        return np.stack([spread(each) for each in self.divergence])

    def regions(self) -> dict[str, list[float]]:
        """Return the mean over the layers of each region, by checkpoint."""
        mean = self.mean
        return {name: mean[:, where].mean(1).tolist() for name, where in regions_of(mean.shape[1]).items()}

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and the figures that follow from them under `summary`."""
        figures = {name: [numbers(each) for each in getattr(self, name)] for name in ("mean", "sd")}
        return asdict(self) | {"summary": figures | {"regions": self.regions()}}


def measure_persistence(
    reference: Path,
    checkpoints: Sequence[Checkpoint],
    draws: Sequence[Sequence[str]],
    measurement: Measurement | None = None,
    report: Callable[[str, int], None] = lambda model, texts: None,
) -> Persistence:
    """Compare each checkpoint with the reference on the same texts. `report` and errors as in `measure_drift`."""
    if not checkpoints:
        raise DetourError("no checkpoints to compare with the reference")
    measurement = measurement or Measurement()

    def states(folder: Path) -> np.ndarray:
        return measurement.states(folder, draws, lambda texts: report(str(folder), texts))

    fixed = states(reference)
    ordered = sorted(checkpoints)
    found = tuple(rows(measurement.divergence(states(folder), fixed)) for _, folder in ordered)
    names = tuple(str(folder) for _, folder in ordered)
    return Persistence(tuple(t for t, _ in ordered), found, str(reference), names, len(draws[0]), measurement)


def find_decay(words: Sequence[str]) -> list[Checkpoint]:
    """Return the checkpoints that words name: a checkpoint, a run directory (all of its checkpoints), or TOKENS=DIR.

    Raises DetourError for folders whose tokens are unknown.
    """
    found: list[Checkpoint] = []
    for word in words:
        count, equals, folder = word.partition("=")
        if equals and count.replace("_", "").isdecimal() and not Path(word).is_dir():
            found.append((int(count), Path(folder)))
        elif (Path(word) / "checkpoints").is_dir():
            found += [(_tokens_of(path), path) for path in find_checkpoints(Path(word) / "checkpoints")]
        else:
            found.append((_tokens_of(Path(word)), Path(word)))
    if not found:
        raise DetourError(f"{', '.join(words)}: no checkpoints; a run keeps them as checkpoint.keep says")
    return found


def _tokens_of(checkpoint: Path) -> int:
    if not checkpoint.is_dir():
        raise DetourError(f"{checkpoint}: no such folder")
    if not (checkpoint / RUN_STATE).is_file():
        raise DetourError(f"{checkpoint}: no {RUN_STATE}, so its tokens are unknown; give TOKENS={checkpoint}")
    tokens = read_json_object(checkpoint / RUN_STATE).get("tokens")
    if type(tokens) is not int or tokens < 0:
        raise DetourError(f"{checkpoint / RUN_STATE}: tokens is {tokens!r}, not a count")
    return tokens
