"""`megatron-detour batches`: show what the model reads in given steps, as text and as arrays.

No weights and no GPU are needed. The documents of a step and their corruption do not depend on the number of ranks or
micro-batches, so the arrays hold the documents in stream order.
"""

from __future__ import annotations

import argparse
import errno
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megatron_detour.commands.parser import COUNT, add_control, add_run_file, read_run_file
from megatron_detour.config import RunConfig
from megatron_detour.data.batches import split
from megatron_detour.data.phase_data import PhaseData
from megatron_detour.errors import DetourError, format_faults
from megatron_detour.objectives import IGNORE
from megatron_detour.plan import Plan, Step
from megatron_detour.preflight import look
from megatron_detour.text import visible
from megatron_detour.tokenizer.vocabulary import find_tokenizer, load_tokenizer
from megatron_detour.tokenizer.word_boundaries import Words

LAYOUT = (
    "FILE.npz holds four int64 arrays per step, where N is the step in eight digits: step-N/input_ids [tokens], the "
    "corrupted documents, concatenated; step-N/labels [tokens], the token to predict at each position (in causal "
    "phases the next one) or -100; step-N/document_lengths [documents]; step-N/sequence_numbers [documents], the seeds "
    "of the masks"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    add_control(parser)
    add = parser.add_argument
    add(
        "--steps",
        type=_steps,
        default="1",
        metavar="A-B",
        help="counted from 1 as in metrics.jsonl (%(default)s)",
    )
    add("--documents", type=COUNT, default=3, metavar="N", help="documents to show per step (%(default)s)")
    add("--output", type=Path, metavar="FILE.npz", help="write all documents of these steps as arrays")
    parser.description += f". {LAYOUT}."


def run(options: argparse.Namespace) -> None:
    """Print the steps, and write them to --output. Raises DetourError."""
    config = read_run_file(options.run_file, options.overrides, options.control)
    plan = Plan.from_config(config)
    if options.steps.stop > plan.total_steps + 1:
        raise DetourError(f"--steps: {options.steps.stop - 1:,} is past the run's last step, {plan.total_steps:,}")
    if not options.steps.start:
        print("step 0 is the state before training: it reads no text")
    source = Source.from_config(config, plan)
    with _archive(options.output) as archive:
        for number in options.steps:
            if number:
                batch = source.read(plan.step(number))
                shown = batch.shown(source.tokenizer, options.documents)
                print("\n".join(visible(line) for line in shown), flush=True)
                for name, array in batch.arrays().items() if archive else ():
                    with archive.open(f"step-{number:08d}/{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array(member, array)
    if options.output:
        print(f"arrays  {options.output}")


@contextmanager
def _archive(path: Path | None) -> Iterator[zipfile.ZipFile | None]:
    """Open a new archive, if any is wanted, that has its name once it is whole. Raise FileExistsError."""
    if path is None:
        yield None
        return
    if path.exists():
        raise FileExistsError(errno.EEXIST, "File exists", str(path))
    aside = path.with_name(f".{path.name}.part")
    try:
        with zipfile.ZipFile(aside, "w") as archive:
            yield archive
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@dataclass(frozen=True)
class StepBatch:
    """The documents of a step, over all ranks."""

    step: Step
    causal: np.ndarray  # bool [documents]: the direction of attention
    input_ids: np.ndarray  # int64 [tokens]
    labels: np.ndarray  # int64 [tokens], IGNORE where unlabeled
    lengths: np.ndarray  # int64 [documents]
    numbers: np.ndarray  # int64 [documents]

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "document_lengths": self.lengths,
            "sequence_numbers": self.numbers,
        }

    def shown(self, tokenizer: Tokenizer, documents: int) -> Iterator[str]:
        """Yield a heading, then the first documents of the step, each under its own heading."""
        step, count = self.step, int(self.causal.sum())
        direction = {len(self.lengths): "causal", 0: "bidirectional"}.get(count, f"{count:,} causal")
        yield (
            f"step {step.number:,}  phase {step.phase.name} ({step.objective.label}), "
            f"{direction}: {len(self.lengths):,} documents, "
            f"{len(self.input_ids):,} tokens, {(self.labels != IGNORE).sum():,} labels"
        )
        parts = zip(split(self.input_ids, self.lengths), split(self.labels, self.lengths), strict=True)
        for at, (ids, labels) in zip(range(documents), parts, strict=False):
            yield f"--- document {self.numbers[at]}, {len(ids):,} tokens"
            yield (
                tokenizer.decode(ids, skip_special_tokens=False) if self.causal[at] else marked(tokenizer, ids, labels)
            )


def marked(tokenizer: Tokenizer, ids: np.ndarray, labels: np.ndarray) -> str:
    """Return the text, with each labeled position as <input token|label>."""
    text, kept = [], []
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        if label == IGNORE:
            kept.append(token)
            continue
        text.append(tokenizer.decode(kept, skip_special_tokens=False))
        shown, target = (tokenizer.decode([id_], skip_special_tokens=False) for id_ in (token, label))
        text.append(f"<{shown}|{target}>")
        kept = []
    return "".join([*text, tokenizer.decode(kept, skip_special_tokens=False)])


@dataclass(frozen=True)
class Source:
    """Reads the documents of a step as training does (training/trainer.py)."""

    data: PhaseData
    words: Words | None
    tokenizer: Tokenizer
    seed: int

    @classmethod
    def from_config(cls, config: RunConfig, plan: Plan) -> Source:
        """Raises DetourError if the tokenizer or a corpus does not exist."""
        start = look(config.model, config.phases)
        needs_words = any(phase.objective.needs_word_boundaries for phase in config.phases)
        if start.vocabulary is None or (needs_words and start.words is None):
            raise DetourError(format_faults(list(start.faults)))
        file = find_tokenizer(config.model.tokenizer or config.model.start, config.model.download)
        data = PhaseData(plan, config.data.order_seed, start.vocabulary)
        return cls(data, start.words, load_tokenizer(file), config.seed)

    def read(self, step: Step) -> StepBatch:
        mixture = self.data.mixture(step.phase)
        objective = step.objective.bind(mixture.vocabulary, self.words)
        documents = mixture.documents(step.start, step.tokens)
        inputs, labels = np.empty((2, documents.lengths.sum()), dtype=np.int64)
        causal = np.zeros(len(documents), dtype=bool)
        for corruption, which in objective.groups(self.seed, documents.numbers):
            chosen, here = documents[which], np.isin(np.arange(len(documents)), which).repeat(documents.lengths)
            corrupted = corruption.apply(mixture.tokens(chosen), chosen.lengths, self.seed, chosen.numbers)
            inputs[here], labels[here], causal[which] = corrupted.inputs, corrupted.all_labels(), corruption.causal
        return StepBatch(step, causal, inputs, labels, documents.lengths, documents.numbers)


def _steps(text: str) -> range:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
        raise argparse.ArgumentTypeError(f"expected a step or a range such as 1-12, not {text!r}")
    return range(int(first), int(last or first) + 1)
