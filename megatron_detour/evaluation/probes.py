"""Fill-in-the-mask probes: does a model put the right word in place of a mask?"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from megatron_detour.corpus.documents import read_documents
from megatron_detour.errors import DetourError
from megatron_detour.evaluation.models import opening
from megatron_detour.structured import parse_json
from megatron_detour.text import visible

PLACEHOLDER = "[MASK]"
_DOCUMENTS_READ = 10_000
_WINDOW_WORDS = 40
# a whole word of five letters or more, after a space, as a mask takes the space before it
_WORD = re.compile(r"(?<=\S )[^\W\d_]{5,}(?=[\s.,;:!?)]|$)")


@dataclass(frozen=True)
class Probe:
    """A text with one [MASK] and the word that belongs there; `lang` may be empty."""

    text: str
    answer: str
    lang: str = ""

    def filled(self) -> tuple[str, int, int]:
        """The text with its answer, and the answer's first and one-past-last character."""
        start = self.text.index(PLACEHOLDER)
        return self.text.replace(PLACEHOLDER, self.answer), start, start + len(self.answer)


@dataclass(frozen=True)
class Guess:
    """What a model put in place of a mask: `tops` are its best words, best first, `tokens` the answer's length."""

    tops: tuple[str, ...]
    right: bool
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """The guesses of one model, one a probe and in their order."""

    label: str
    guesses: tuple[Guess, ...]

    @property
    def right(self) -> int:
        return sum(guess.right for guess in self.guesses)


@dataclass(frozen=True)
class Report:
    """Probes and what each model answered."""

    probes: tuple[Probe, ...]
    outcomes: tuple[Outcome, ...]


def read_probes(path: Path) -> list[Probe]:
    """Reads lines {"text", "answer", "lang"?}; raises DetourError that names the line for anything else."""
    if not path.is_file():
        raise DetourError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DetourError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    probes = [_probe(line, f"{path} line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not probes:
        raise DetourError(f"{path}: holds no probes")
    return probes


def _probe(line: str, place: str) -> Probe:
    record = parse_json(line, place)
    if not isinstance(record, dict):
        raise DetourError(f'{place}: not a JSON object such as {{"text": "... {PLACEHOLDER}.", "answer": "..."}}')
    for key in ("text", "answer"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise DetourError(f"{place}: no text under the key {key!r}")
    if record["text"].count(PLACEHOLDER) != 1:
        raise DetourError(f"{place}: the text needs exactly one {PLACEHOLDER}")
    return Probe(record["text"], record["answer"].strip(), str(record.get("lang", "")))


def probes_from_corpus(path: Path, count: int = 10, seed: int = 0, text_key: str = "text") -> list[Probe]:
    """Masks one random word (five letters or more) in each of `count` random documents of the first 10,000.

    The text around it is its sentence, at most 40 words. The same arguments give the same probes; there are fewer when
    documents are few. Raises DetourError if `count` is below 1 or no document has such a word.
    """
    if count < 1:
        raise DetourError(f"--count {count}: give a number above 0")
    rng = random.Random(seed)
    documents = list(islice(read_documents(path, text_key), _DOCUMENTS_READ))
    rng.shuffle(documents)
    probes = list(islice(_masked_words(documents, rng), count))
    if not probes:
        raise DetourError(f"{path}: no document has a word of five letters or more to mask")
    return probes


def _masked_words(documents: Sequence[str], rng: random.Random) -> Iterator[Probe]:
    for document in documents:
        sentences = [" ".join(sentence.split()) for sentence in re.split(r"(?<=[.!?])\s+|\n+", document)]
        usable = [text for text in sentences if PLACEHOLDER not in text and _WORD.search(text)]
        if usable:
            yield _masked_word(rng.choice(usable), rng)


def _masked_word(sentence: str, rng: random.Random) -> Probe:
    word = rng.choice(list(_WORD.finditer(sentence)))
    before, after = sentence[: word.start()].split(), sentence[word.end() :]
    # the text after the word starts with its punctuation or a space, which must stay as it is
    kept = before[-_WINDOW_WORDS // 2 :]
    tail = " ".join(after.split(" ")[: _WINDOW_WORDS - len(kept)])
    return Probe(f"{' '.join(kept)} {PLACEHOLDER}{tail}", word.group())


def masked_ids(
    probe: Probe, tokenizer: PreTrainedTokenizerBase, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (ids [1, n] with the answer masked, positions [k] of the masks, the answer's ids [k]).

    The filled-in sentence is tokenized and its answer's tokens are replaced, so all other tokens are those that the
    model would read in the true sentence. Raises DetourError if the answer shares a token with its neighbours.
    """
    text, start, end = probe.filled()
    encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"][0].tolist()
    # a mask stands for the space before its word too, be that a token or a part of one
    start -= text[:start].endswith(" ")
    positions = [at for at, (first, last) in enumerate(offsets) if first < end and last > start and last > first]
    if not positions:
        raise DetourError(f"probe {probe.text!r}: the answer {probe.answer!r} has no token of its own")
    covered = text[offsets[positions[0]][0] : offsets[positions[-1]][1]]
    if covered.strip() != probe.answer:
        raise DetourError(f"probe {probe.text!r}: the answer shares the token of {covered.strip()!r}, reword the probe")
    where = torch.tensor(positions)
    answer = ids[0, where].clone()
    ids[0, where] = mask_token_id
    return ids, where, answer


def load_model(
    folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Opens a Hugging Face folder; raises DetourError if it lacks files, weights or a mask."""
    if not (folder / "config.json").is_file():
        raise DetourError(f"{folder}: no config.json there, give the folder of a Hugging Face model")
    logging.disable_progress_bar()
    with opening(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, loading = AutoModelForMaskedLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    # transformers fills missing weights with random numbers, whose answers would mean nothing
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise DetourError(f"{folder}: {len(missing)} weights are missing, {missing[0]} first, give a masked-LM model")
    if tokenizer.mask_token_id is None or not tokenizer.is_fast:
        raise DetourError(f"{folder}: the tokenizer has no mask token or no tokenizer.json, give one that has both")
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def guess(probe: Probe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, top: int = 3) -> Guess:
    """The model's arg-max at each mask; for an answer of one token also its next best words, `top` in all."""
    ids, where, answer = masked_ids(probe, tokenizer, tokenizer.mask_token_id)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, where]
    best = logits.topk(top if len(where) == 1 else 1, dim=-1).indices
    words = tuple(tokenizer.decode(column).strip() for column in best.T)
    return Guess(words, bool((best[:, 0] == answer).all()), len(where))


def run_probes(
    folders: Sequence[Path], probes: Sequence[Probe], labels: Sequence[str] | None = None, top: int = 3
) -> Report:
    """Asks every model every probe. `labels` head the columns; without them, the folders' names do.

    Raises DetourError if labels and folders differ in number, `top` is below 1 or a model cannot be opened.
    """
    if labels and len(labels) != len(folders):
        raise DetourError(f"{len(labels)} --label for {len(folders)} --model, give one for each model or none")
    if top < 1:
        raise DetourError(f"--top {top}: give a number above 0")
    names = labels or [folder.resolve().name for folder in folders]
    outcomes = []
    for folder, label in zip(folders, names, strict=True):
        model, tokenizer = load_model(folder)
        top_here = min(top, model.config.vocab_size)
        outcomes.append(Outcome(label, tuple(guess(probe, model, tokenizer, top_here) for probe in probes)))
    return Report(tuple(probes), tuple(outcomes))


def print_report(report: Report, console: Console | None = None) -> None:
    """Prints a line a probe, a column a model, and below them how many are right."""
    # Text, not str, since rich would read the brackets of a user's text as its own markup
    table = Table("probe", "answer", show_lines=True)
    for outcome in report.outcomes:
        table.add_column(Text(visible(outcome.label)))
    for number, probe in enumerate(report.probes):
        cells = [_cell(outcome.guesses[number]) for outcome in report.outcomes]
        table.add_row(Text(visible(probe.text)), Text(visible(probe.answer)), *cells)
    count = len(report.probes)
    table.add_row("", "", *(Text(f"right: {outcome.right} of {count}", "bold") for outcome in report.outcomes))
    (console or Console()).print(table)


def _cell(answer: Guess) -> Text:
    mark = ("✓ ", "green") if answer.right else ("✗ ", "red")
    others = f" ({', '.join(answer.tops[1:])})" if len(answer.tops) > 1 else ""
    return Text.assemble(mark, visible(answer.tops[0]), (visible(others), "dim"))
