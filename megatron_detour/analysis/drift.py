"""How far two models' representations of the same texts have drifted apart, layer by layer, beyond seed noise."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from megatron_detour.analysis.cka import ESTIMATORS
from megatron_detour.analysis.hidden_states import Report, mean_states
from megatron_detour.corpus.documents import read_documents
from megatron_detour.counter_rng import streams
from megatron_detour.errors import DetourError
from megatron_detour.settings import AnyText, Choice, Entries, Range

DRAWS, COUNT, DOCUMENTS = (42, 43, 44), 500, 7  # seeds, texts of a draw, stream of random numbers
REGIONS = ("low", "mid", "deep")
Rows = tuple[tuple[float, ...], ...]  # [draws][layers]
ABOVE_ZERO, SEED = Range(above=0), Range(least=0, below=2**31)


@dataclass(frozen=True)
class Draws:
    """Which texts are drawn from a corpus: each field is a flag of megatron-detour analyze drift and persistence."""

    count: Annotated[int, Range(least=4), "texts per draw"] = COUNT
    draws: Annotated[tuple[Annotated[int, SEED], ...], Entries(least=1, unique=True), "seeds of the draws"] = DRAWS
    text_key: Annotated[AnyText, "JSON key of the text"] = "text"


def thirds(layers: int) -> dict[str, range]:
    """Return the thirds of the depth; the lower ones are longer where 3 does not divide it.

    >>> thirds(22)
    {'low': range(0, 8), 'mid': range(8, 15), 'deep': range(15, 22)}
    """
    short, longer = divmod(layers, 3)
    starts = [short * i + min(i, longer) for i in range(4)]
    return {name: range(start, end) for name, start, end in zip(REGIONS, starts[:-1], starts[1:], strict=True)}


def draw_texts(
    sources: Path | Sequence[Path],
    count: int = COUNT,
    draws: Sequence[int] = DRAWS,
    text_key: str = "text",
    *,
    fewer: bool = False,
) -> list[list[str]]:
    """Return `count` documents of the files for each seed of `draws`, drawn without replacement; with `fewer` all of
    them if there are less.

    A document's chance depends on its number alone, so that every model gets the same texts. Draws overlap if the files
    have few documents. Raises DetourError for unreadable files, and for fewer than `count` documents.
    """
    files = [Path(sources)] if isinstance(sources, str | Path) else [Path(source) for source in sources]
    chosen: list[list[tuple[int, int, str]]] = [[] for _ in draws]
    number = -1
    for number, text in enumerate(text for file in files for text in read_documents(file, text_key)):
        for heap, seed in zip(chosen, draws, strict=True):
            entry = (-int(streams(seed, DOCUMENTS, np.array([number]))[0]), number, text)
            heapq.heappush(heap, entry) if len(heap) < count else heapq.heappushpop(heap, entry)
    if number + 1 < (1 if fewer else count):
        names = ", ".join(map(str, files))
        raise DetourError(
            f"{names}: {number + 1:,} documents, fewer than the {count:,} of a draw; lower count, or give more"
        )
    return [[text for _, _, text in sorted(heap, key=lambda entry: entry[1])] for heap in chosen]


@dataclass(frozen=True)
class Measurement:
    """How hidden states are computed and compared; part of every result. Each field is a flag as well."""

    max_tokens: Annotated[int, ABOVE_ZERO, "tokens of a text; longer ones are cut"] = 512
    batch: Annotated[int, ABOVE_ZERO, "texts per forward pass"] = 16
    dtype: Annotated[str, Choice(("float32", "float16")), "of the models; CKA is always float64"] = "float32"
    estimator: Annotated[str, Choice(ESTIMATORS), "of CKA"] = "linear"

    def states(self, model: Path, draws: Sequence[Sequence[str]], report: Report = lambda texts: None) -> np.ndarray:
        """Return mean states [draws, layers, texts, hidden]; a text of several draws is computed once."""
        numbers = {text: i for i, text in enumerate(dict.fromkeys(text for draw in draws for text in draw))}
        options = {"max_tokens": self.max_tokens, "batch": self.batch, "dtype": self.dtype}
        states = mean_states(model, list(numbers), report=report, **options)
        return np.stack([states[:, [numbers[text] for text in draw]] for draw in draws])

    def divergence(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return 1 - CKA of states [draws, layers, texts, hidden] as [draws, layers]."""
        if a.shape[:3] != b.shape[:3]:
            raise DetourError(f"the models have {a.shape[1]} and {b.shape[1]} layers; compare models of one depth")
        cka = ESTIMATORS[self.estimator]
        return np.array([[1 - cka(x, y) for x, y in zip(*pair, strict=True)] for pair in zip(a, b, strict=True)])


@dataclass(frozen=True)
class Drift:
    """Divergence of a detour from its control, and of a second control, trained with another seed, from the first.

    `detour` and `noise` are [draws][layers]; without a second control `noise` is None, and so are noise and ratio.
    """

    detour: Rows
    noise: Rows | None
    models: dict[str, str]  # folders by role: detour, control, second_control
    texts: int  # per draw
    measurement: Measurement

    @property
    def layers(self) -> int:
        return len(self.detour[0])

    @property
    def mean(self) -> np.ndarray:
        """Divergence [layers], mean over draws."""
        return np.mean(self.detour, 0)

    @property
    def sd(self) -> np.ndarray:
        """Its standard deviation over draws [layers]: of the choice of texts, not of training. NaN for one draw."""
        return spread(self.detour)

    @property
    def noise_mean(self) -> np.ndarray | None:
        return None if self.noise is None else np.mean(self.noise, 0)

    @property
    def noise_sd(self) -> np.ndarray | None:
        return None if self.noise is None else spread(self.noise)

    @property
    def ratio(self) -> np.ndarray | None:
        """r = d(detour, control) / d(second control, control) of the means over draws, [layers]."""
        return None if self.noise is None else ratio_of(self.mean, np.mean(self.noise, 0))

    def regions(self) -> dict[str, dict[str, float | None]]:
        """Return `divergence`, `noise` and `ratio` of low, mid and deep layers and of all: means over their layers."""
        return {name: self._region(where) for name, where in regions_of(self.layers).items()}

    def _region(self, layers: range) -> dict[str, float | None]:
        own = float(self.mean[layers].mean())
        if self.noise is None:
            return {"divergence": own, "noise": None, "ratio": None}
        noise = float(np.mean(self.noise, 0)[layers].mean())
        return {"divergence": own, "noise": noise, "ratio": numbers([ratio_of(own, noise)])[0]}

    def to_json(self) -> dict[str, Any]:
        """Return the fields, and the figures that follow from them under `summary`."""
        figures = {name: getattr(self, name) for name in ("mean", "sd", "noise_mean", "noise_sd", "ratio")}
        summary = {name: None if value is None else numbers(value) for name, value in figures.items()}
        return asdict(self) | {"summary": summary | {"regions": self.regions()}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Drift:
        """Read what `to_json` returned. Raises DetourError for anything else."""
        try:
            noise = None if content["noise"] is None else rows(content["noise"])
            measurement = Measurement(**content["measurement"])
            return cls(rows(content["detour"]), noise, dict(content["models"]), int(content["texts"]), measurement)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DetourError(f"not a result of megatron-detour analyze drift ({error!r:.200})") from None


def measure_drift(
    detour: Path,
    control: Path,
    draws: Sequence[Sequence[str]],
    second_control: Path | None = None,
    measurement: Measurement | None = None,
    report: Callable[[str, int], None] = lambda model, texts: None,
) -> Drift:
    """Compare a detour with its control on the same texts, and the second control with the first.

    `report` gets the folder that is being read and the number of texts done since its last call. Raises DetourError for
    folders that are not encoders, and for models of different depths.
    """
    measurement = measurement or Measurement()
    folders = {"detour": detour, "control": control}
    folders |= {"second_control": second_control} if second_control else {}

    def states(folder: Path) -> np.ndarray:
        return measurement.states(folder, draws, lambda texts: report(str(folder), texts))

    reference = states(control)
    noise = rows(measurement.divergence(states(second_control), reference)) if second_control else None
    own = rows(measurement.divergence(states(detour), reference))
    return Drift(own, noise, {role: str(path) for role, path in folders.items()}, len(draws[0]), measurement)


def regions_of(layers: int) -> dict[str, range]:
    """Return the thirds that have layers, and all layers."""
    return {name: where for name, where in thirds(layers).items() if where} | {"all": range(layers)}


def layer_words(layers: range) -> str:
    """Return e.g. ``0-7``."""
    return f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"


def spread(values: Any) -> np.ndarray:
    """Return the standard deviation (n - 1) over the first axis; NaN for a single value."""
    values = np.asarray(values, dtype=np.float64)
    return values.std(0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)


def rows(values: Any) -> Rows:
    """Return numbers [draws][layers] as tuples. Raises ValueError unless all rows have the same length."""
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise ValueError("not a table of numbers")
    return tuple(map(tuple, table.tolist()))


def numbers(values: Any) -> list[float | None]:
    """Return a list for JSON, which has no NaN and no infinity."""
    return [float(value) if np.isfinite(value) else None for value in values]


def ratio_of(above: Any, below: Any) -> np.ndarray:
    """Return the ratio; NaN where the divergence below is zero, as of a model from itself."""
    above, below = np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
