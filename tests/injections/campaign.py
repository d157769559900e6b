"""A run that is struck again and again until it has reached its end, and compared with one that was left alone.

python -m tests.injections.campaign --count 200 --workers 2
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megatron_detour.checkpoint import store
from megatron_detour.corpus import BuildOptions, build_corpus
from megatron_detour.corpus.train_tokenizer import train_tokenizer
from tests.conftest import VOCABULARY, sentences, write_jsonl
from tests.injections.faults import KINDS, OF_SEVERAL_RANKS, starter
from tests.injections.runs import INTERVAL, PHASE_ENDS, SETUPS, Setup, assert_same_run, begin, figures, write_run_file

# Shares of the kinds; a hanging rank takes three quarters of a minute each.
SHARES = {"SIGKILL of all": 10, "SIGKILL of one rank": 5, "rank that hangs": 0.5, "rank that raises": 3}
SHARES |= {"SIGTERM": 5, "SIGUSR1": 2, "full disk": 4, "damaged file": 4}


@dataclass
class Outcome:
    """What was done to a run, by kind and moment."""

    setup: Setup
    struck: Counter[tuple[str, str]] = field(default_factory=Counter)
    finished: int = 0  # runs that came to their end and were compared


class Victim:
    """Runs of one setup, one after the other."""

    def __init__(self, folder: Path, run_file: Path, setup: Setup, seed: int) -> None:
        self.folder, self.run_file, self.setup = folder, run_file, setup
        self.rng = random.Random(seed)
        self.outcome = Outcome(setup)
        folder.mkdir(parents=True)
        self.reference = folder / "reference"
        session = begin(self.reference, run_file, setup, folder / "reference.log")
        assert set(session.wait()) == {0}, session.output()[-4000:]

    def strike(self, kinds: list[str]) -> Outcome:
        """Strikes with these kinds, one a session, over as many runs as it takes, and lets the last one finish."""
        waiting, number = list(kinds), 0
        while waiting:
            number += 1
            run = self.folder / f"run{number}"
            while waiting and not is_finished(run):
                self._strike_once(run, waiting.pop())
            self._finish(run)
            shutil.rmtree(run)
        return self.outcome

    def _strike_once(self, run: Path, kind: str) -> None:
        log = self.folder / f"{run.name}-{self.outcome.struck.total()}.log"
        where = KINDS[kind](starter(run, self.run_file, self.setup, log), self.rng)
        self.outcome.struck[kind, where] += 1
        check_what_is_left(run, self.reference, after=f"{kind} at {where} ({log})")

    def _finish(self, run: Path) -> None:
        log = self.folder / f"{run.name}-last.log"
        session = begin(run, self.run_file, self.setup, log)
        assert set(session.wait()) == {0}, session.output()[-4000:]
        assert_same_run(run, self.reference)
        leftovers = [path for path in run.rglob(".*") if path.name != ".gitignore"]
        assert not leftovers, leftovers
        self.outcome.finished += 1


def is_finished(run: Path) -> bool:
    return store.checkpoint_folder(run / "checkpoints", PHASE_ENDS[-1]).exists() and (run / "report.html").exists()


def check_what_is_left(run: Path, reference: Path, after: str) -> None:
    """Whatever was struck: what is there is right, and no more is lost than an interval and what was being written."""
    expected = {record["step"]: record for record in figures(reference)}
    done = -1
    if (run / "metrics.jsonl").exists():
        for record in figures(run):
            assert record == expected[record["step"]], f"{after}: step {record['step']} is another"
            done = record["step"]
    if done <= 0:
        return
    newest = store.latest(run / "checkpoints")
    assert newest is not None, f"{after}: no checkpoint is whole at step {done}"
    if "damaged" in after:
        return
    saved = [step for step in range(done) if step % INTERVAL == 0 or step in PHASE_ENDS]
    # The last of them may have been under way.
    least = saved[-2] if len(saved) > 1 else 0
    assert store.step_of(newest) >= least - INTERVAL, f"{after}: step {done}, but only {newest.name} is whole"


def balance(count: int, rng: random.Random) -> dict[Setup, list[str]]:
    """`count` strikes over the setups: twelve SIGKILLs each, where there are enough, the rest by SHARES."""
    dealt: dict[Setup, list[str]] = {setup: [] for setup in SETUPS}
    kills = min(12, count // (2 * len(SETUPS)))
    for setup in SETUPS:
        dealt[setup] += ["SIGKILL of all"] * kills
    while sum(map(len, dealt.values())) < count:
        setup = rng.choices(SETUPS, [3 if setup.ranks == 1 else 2 if setup.ranks == 2 else 1 for setup in SETUPS])[0]
        kind = rng.choices(list(SHARES), list(SHARES.values()))[0]
        if setup.ranks > 1 or kind not in OF_SEVERAL_RANKS:
            dealt[setup].append(kind)
    for kinds in dealt.values():
        rng.shuffle(kinds)
    return dealt


def make_run_file(folder: Path) -> Path:
    rng = random.Random(0)
    texts = write_jsonl(folder / "texts.jsonl", [sentences(rng, rng.randint(1, 8)) for _ in range(300)])
    train_tokenizer([texts], folder / "tokenizer", VOCABULARY)
    build_corpus(BuildOptions(str(folder / "corpus"), str(folder / "tokenizer"), (str(texts),)))
    return write_run_file(folder / "run.yaml", str(folder / "corpus"), folder / "tokenizer")


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept, with the output of every session")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="injections-"))
    folder.mkdir(parents=True, exist_ok=True)
    run_file = make_run_file(folder)
    began = time.monotonic()

    def work(setup: Setup, kinds: list[str]) -> Outcome:
        return Victim(folder / str(setup).replace(" ", ""), run_file, setup, options.seed).strike(kinds)

    failed, struck, finished = 0, Counter(), 0
    with ThreadPoolExecutor(options.workers) as pool:
        dealt = balance(options.count, random.Random(options.seed))
        jobs = {setup: pool.submit(work, setup, kinds) for setup, kinds in dealt.items() if kinds}
        for setup, job in jobs.items():
            try:
                outcome = job.result()
            except Exception as error:  # the other setups go on
                failed += 1
                print(f"{setup}: FAILED:", *traceback.format_exception(error), flush=True)
                continue
            print(f"{setup}: {outcome.struck.total()} strikes, {outcome.finished} runs equal to the bit", flush=True)
            struck += outcome.struck
            finished += outcome.finished
    kinds = Counter()
    for (kind, _), number in struck.items():
        kinds[kind] += number
    for kind, number in kinds.most_common():
        where = {place: n for (k, place), n in sorted(struck.items()) if k == kind}
        print(f"{number:5} {kind}: {', '.join(f'{n} {place}' for place, n in where.items())}")
    print(f"{struck.total()} strikes, {finished} runs, {failed} setups failed, {time.monotonic() - began:.0f} s")
    (folder / "strikes.json").write_text(json.dumps({f"{k}, {w}": n for (k, w), n in struck.items()}, indent=1))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(_main())
