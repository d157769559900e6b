"""`tools/benchmark.py preprocess`: the corpus builder compared with its peers, with several workers, and its memory."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np

from benchmarks.builders import BUILDERS, NEEDS
from benchmarks.process import cores, run_builder
from benchmarks.texts import Slice, Texts, link_many, write_texts
from megatron_detour.corpus.engines import ENGINES
from megatron_detour.errors import DetourError
from megatron_detour.files import write_whole
from megatron_detour.settings import Choice, Entries, Faults, Flag, Range, validate
from megatron_detour.tokenizer.vocabulary import load_tokenizer
from megatron_detour.ui.tables import Table

CLOCKS = {"wall": "seconds", "cpu": "cpu_seconds"}
WHOLE = ("ours", "engine")  # fast enough for the whole text
MIN_FRACTION = 0.1  # of the startup time: shorter times cannot be measured
VERSIONS = ("tokenizers", "fastokens", "sentencepiece", "datasets", "numpy")


HELP = "the corpus builder, its engine alone and other builders: MB/s of UTF-8 text, tokens/s, memory"
ABOVE_ZERO = Range(above=0)


@dataclass(frozen=True)
class Settings:
    """One measurement."""

    tokenizer: Annotated[str, "a folder, a tokenizer.json, a SentencePiece model or a hub id"]
    input: Annotated[
        tuple[str, ...], Flag("FILE"), "texts in any format of the builder; synthetic ones unless given"
    ] = ()
    text_key: Annotated[str, "key of the text in the input"] = "text"
    megabytes: Annotated[float, ABOVE_ZERO, "of text for ours and the engine; shorter input is repeated"] = 200.0
    peer_megabytes: Annotated[float, ABOVE_ZERO, "of text for the peers, from the beginning"] = 10.0
    contenders: Annotated[
        tuple[Annotated[str, Choice(BUILDERS)], ...], Entries(), "in this order; none for no table"
    ] = tuple(BUILDERS)
    peer_python: Annotated[
        str | None, Flag("PATH"), "Python of another environment, for peers that are missing in this one"
    ] = None
    workers: Annotated[tuple[Annotated[int, ABOVE_ZERO], ...], "ours with these numbers of processes"] = ()
    memory: Annotated[
        tuple[Annotated[float, ABOVE_ZERO], ...], Flag("GB"), "peak memory of builds from this much text"
    ] = ()
    rounds: Annotated[int, ABOVE_ZERO, "in which contenders alternate"] = 3
    clock: Annotated[str, Choice(CLOCKS), "cpu for a busy machine; excludes waiting, e.g. for the disk"] = "wall"
    scratch: Annotated[
        str | None, Flag("FOLDER"), "for texts and corpora, 4 bytes per byte of text; the system's unless set"
    ] = None
    seed: Annotated[int, Range(least=0), "of synthetic texts"] = 0
    json: Annotated[str | None, Flag("FILE"), "write all figures to this file"] = None


@dataclass
class Timed:
    """A contender, its text and the seconds of each round, for the whole text and for one document."""

    name: str
    job: dict[str, Any]
    python: str
    text: Slice
    one: Slice
    core: int | None
    clock: str
    seconds: list[float] = field(default_factory=list)
    start_up: list[float] = field(default_factory=list)
    tokens: int = 0

    def run(self) -> None:
        self.start_up.append(self._run(self.one)[CLOCKS[self.clock]])
        result = self._run(self.text)
        self.seconds.append(result[CLOCKS[self.clock]])
        self.tokens = result["tokens"]
        if result["documents"] != self.text.documents:
            raise DetourError(f"{self.name}: wrote {result['documents']:,} of {self.text.documents:,} documents")

    def _run(self, text: Slice) -> dict[str, Any]:
        return run_builder(self.python, self.job | {"input": [str(text.path)], "show": 0}, self.core)

    def rates(self) -> list[float] | None:
        """Return MB/s of each round, without startup; None if the rest is too short to measure."""
        start_up = statistics.median(self.start_up)
        net = [seconds - start_up for seconds in self.seconds]
        return None if min(net) < MIN_FRACTION * start_up else [self.text.megabytes / seconds for seconds in net]


def run(settings: Settings, say: Callable[[str], None]) -> None:
    """Measure and print the table. Raises DetourError."""
    result = measure(settings, say)
    print(table(result))
    if settings.json:
        write_whole(Path(settings.json), json.dumps(result, indent=1) + "\n")


def measure(settings: Settings, say: Callable[[str], None]) -> dict[str, Any]:
    """Return all figures as plain values. Raises DetourError for invalid settings and if ids differ."""
    validate(settings, _check)
    with TemporaryDirectory(dir=settings.scratch, prefix="benchmark-") as scratch:
        folder = Path(scratch)
        sizes = (settings.megabytes, settings.peer_megabytes)
        texts = write_texts(folder, settings.input, settings.text_key, *sizes, settings.seed)
        say(f"{texts.whole.megabytes:,.1f} MB of text in {texts.whole.documents:,} documents")
        if texts.passes > 1:
            say(f"the input is repeated {texts.passes} times; engines cache words, so new text would be slower")
        tokenizer_file = folder / "tokenizer.json"
        load_tokenizer(settings.tokenizer).save(str(tokenizer_file))
        bench = _Bench(settings, texts, folder, str(tokenizer_file), say)
        return {
            "settings": dataclasses.asdict(settings),
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": _versions(),
            "engine": bench.engine,
            "megabytes": texts.whole.megabytes,
            "documents": texts.whole.documents,
            "passes": texts.passes,
            "contenders": bench.contenders(),
            "workers": bench.workers(),
            "memory": bench.memory(),
        }


class _Bench:
    """The three measurements over the same texts."""

    def __init__(self, settings: Settings, texts: Texts, folder: Path, tokenizer_file: str, say) -> None:
        self._settings, self._texts, self._folder, self._say = settings, texts, folder, say
        self._tokenizer_file = tokenizer_file
        shown = self._shown("ours", sys.executable)
        self.engine = shown["engine"]
        self._ours = shown["shown"]

    def _job(self, name: str, workers: int = 1) -> dict[str, Any]:
        tokenizer = self._settings.tokenizer if name == "ours" else self._tokenizer_file
        job = {"builder": name, "tokenizer": tokenizer, "workers": workers, "scratch": str(self._folder)}
        return job | ({"engine": self.engine} if name == "engine" else {})

    def _shown(self, name: str, python: str) -> dict[str, Any]:
        few = self._texts.few
        return run_builder(python, self._job(name) | {"input": [str(few.path)], "show": few.documents}, None)

    def contenders(self) -> list[dict[str, Any]]:
        """Return a row per contender, without figures for those that are not installed."""
        pythons = {name: self._python(name) for name in self._settings.contenders}
        self._compare({name: python for name, python in pythons.items() if python})
        core = max(cores(), default=None)
        timed = [
            Timed(name, self._job(name), python, self._text(name), self._texts.one, core, self._settings.clock)
            for name, python in pythons.items()
            if python
        ]
        self._take_turns(timed)
        rates = {one.name: one.rates() for one in timed}
        rows = {one.name: _row(one, rates.get("encode_batch"), rates.get("engine")) for one in timed}
        return [rows.get(name, {"name": name, "missing": NEEDS.get(name, "")}) for name in pythons]

    def _python(self, name: str) -> str | None:
        """Return the interpreter that has the contender's packages: this one, else the other environment's."""
        modules = NEEDS.get(name, "").split()
        if all(importlib.util.find_spec(module) for module in modules):
            return sys.executable
        if self._settings.peer_python is None:
            return None
        look = "import importlib.util as u, sys; sys.exit(not all(u.find_spec(m) for m in sys.argv[1:]))"
        installed = subprocess.run([self._settings.peer_python, "-c", look, *modules], check=False).returncode == 0
        return self._settings.peer_python if installed else None

    def _text(self, name: str) -> Slice:
        return self._texts.whole if name in WHOLE else self._texts.peers

    def _compare(self, pythons: dict[str, str]) -> None:
        """Raise DetourError unless all contenders give ids equivalent to encode_batch's for the first documents."""
        shown = {"ours": self._ours}
        shown |= {name: self._shown(name, python)["shown"] for name, python in pythons.items() if name != "ours"}
        reference = "encode_batch" if "encode_batch" in shown else "ours"
        compare_ids(shown, reference, ENGINES[self.engine](Path(self._tokenizer_file)).agrees)
        self._say(f"{', '.join(shown)}: same ids in the first {self._texts.few.documents} documents")

    def _take_turns(self, timed: list[Timed]) -> None:
        for number in range(1, self._settings.rounds + 1):
            for one in timed:
                one.run()
                self._say(
                    f"round {number} of {self._settings.rounds}: {one.name} {one.seconds[-1]:.2f} s for "
                    f"{one.text.megabytes:.1f} MB, {one.start_up[-1]:.2f} s for one document"
                )

    def workers(self) -> list[dict[str, Any]]:
        """Measure ours with several numbers of processes, on any core."""
        timed = []
        for count in self._settings.workers:
            job, texts = self._job("ours", count), self._texts
            timed.append(Timed(f"workers {count}", job, sys.executable, texts.whole, texts.one, None, "wall"))
        self._take_turns(timed)
        first = timed[0].rates() if timed else None
        rows = [_row(one, first, None) for one in timed]
        return [row | {"workers": count} for row, count in zip(rows, self._settings.workers, strict=True)]

    def memory(self) -> list[dict[str, Any]]:
        """Measure peak resident bytes of the builder's process and of its worker by the size of the text."""
        rows = []
        for gigabytes in self._settings.memory:
            with TemporaryDirectory(dir=self._folder) as place:
                links, size = link_many(self._texts.whole, Path(place), gigabytes)
                job = self._job("ours") | {"input": [str(links)], "show": 0}
                result = run_builder(sys.executable, job, None, watched=True)
            rows.append({"bytes": size, "seconds": result["seconds"], "tokens": result["tokens"], **result["peak"]})
            self._say(f"memory: {size / 1e9:.2f} GB in {result['seconds']:.1f} s")
        return rows


def compare_ids(
    shown: dict[str, list[list[int]]], reference: str, agrees: Callable[[np.ndarray, np.ndarray], bool]
) -> None:
    """Raise DetourError for the first contender and document whose ids are not equivalent to the reference's."""
    for name, rows in shown.items():
        if len(rows) != len(shown[reference]):
            raise DetourError(f"{name}: wrote {len(rows)} documents, but {reference} wrote {len(shown[reference])}")
        for number, (ids, expected) in enumerate(zip(rows, shown[reference], strict=True), start=1):
            if not agrees(np.array(ids), np.array(expected)):
                raise DetourError(f"{name}: its ids of document {number} differ from those of {reference}")


def _row(one: Timed, base: list[float] | None, engine: list[float] | None) -> dict[str, Any]:
    """Return figures; ratios are medians over rounds, as adjacent runs are most comparable, None without a base."""
    rates = one.rates()
    rate = statistics.median(rates) if rates else None
    return {
        "name": one.name,
        "megabytes": one.text.megabytes,
        "documents": one.text.documents,
        "tokens": one.tokens,
        "seconds": one.seconds,
        "start_up_seconds": one.start_up,
        "mb_per_second": rate,
        "mtokens_per_second": rate and rate * one.tokens / one.text.bytes,
        "times": _ratio(rates, base),
        "share_of_engine": _ratio(rates, engine),
    }


def _ratio(rates: list[float] | None, base: list[float] | None) -> float | None:
    if rates is None or base is None:
        return None
    return statistics.median(a / b for a, b in zip(rates, base, strict=True))


def table(result: dict[str, Any]) -> str:
    """Return Markdown tables: contenders, workers, memory. "-" means too short to measure, or without a base."""
    parts = []
    if result["contenders"]:
        head = ("contender", "MB/s", "Mtokens/s", "times encode_batch", "of the engine's", "MB of text", "start-up s")
        parts.append(Table(head, [_cells(row) for row in result["contenders"]]).markdown())
    if result["workers"]:
        rows = [(str(row["workers"]), *_cells(row)[1:4]) for row in result["workers"]]
        parts.append(Table(("workers", "MB/s", "Mtokens/s", "times the first"), rows).markdown())
    if result["memory"]:
        rows = [
            (f"{row['bytes'] / 1e9:.2f}", f"{row['worker'] / 1e6:,.0f}", f"{row['parent'] / 1e6:,.0f}")
            for row in result["memory"]
        ]
        parts.append(Table(("GB of text", "peak MB of the worker", "of the parent"), rows).markdown())
    return "\n\n".join(parts)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "missing" in row:
        return (row["name"], "not installed", "", "", "", "", "")
    share = "-" if row["share_of_engine"] is None else f"{row['share_of_engine']:.0%}"
    figures = (_figure(row[key]) for key in ("mb_per_second", "mtokens_per_second", "times"))
    start_up = f"{statistics.median(row['start_up_seconds']):.2f}"
    return (row["name"], *figures, share, f"{row['megabytes']:,.1f}", start_up)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _versions() -> dict[str, str]:
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _check(settings: Settings, faults: Faults) -> None:
    if settings.scratch and not Path(settings.scratch).is_dir():
        faults.add("scratch", f"no such folder: {settings.scratch}")
    if settings.json and not Path(settings.json).parent.is_dir():
        faults.add("json", f"no such folder: {Path(settings.json).parent}")
