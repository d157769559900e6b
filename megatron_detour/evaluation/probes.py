"""Fill-mask probes: does a model predict the right word for a mask?"""

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
# a whole word of five letters or more, after a space, since a mask includes the preceding space
_WORD = re.compile(r"(?<=\S )[^\W\d_]{5,}(?=[\s.,;:!?)]|$)")


@dataclass(frozen=True)
class Probe:
    """A text with one [MASK] and its answer; `lang` may be empty."""

    text: str
    answer: str
    lang: str = ""

    def filled(self) -> tuple[str, int, int]:
        """Return the text with its answer, and the answer's start and end character."""
        start = self.text.index(PLACEHOLDER)
        return self.text.replace(PLACEHOLDER, self.answer), start, start + len(self.answer)


@dataclass(frozen=True)
class Guess:
    """A model's prediction for a mask: `tops` are its best words, best first; `tokens` is the answer's length."""

    tops: tuple[str, ...]
    right: bool
    tokens: int


@dataclass(frozen=True)
class Outcome:
    """The answers of one model, one per probe, in order."""

    label: str
    guesses: tuple[Guess, ...]

    @property
    def right(self) -> int:
        return sum(guess.right for guess in self.guesses)


@dataclass(frozen=True)
class Report:
    """Probes and each model's answers."""

    probes: tuple[Probe, ...]
    outcomes: tuple[Outcome, ...]


def read_probes(path: Path) -> list[Probe]:
    """Read lines {"text", "answer", "lang"?}. Raises DetourError, naming the line, for any other content."""
    if not path.is_file():
        raise DetourError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DetourError(f"{path}: cannot read as UTF-8 text ({error})") from None
    probes = [_probe(line, f"{path} line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not probes:
        raise DetourError(f"{path}: no probes; add one JSON object per line")
    return probes


def _probe(line: str, place: str) -> Probe:
    record = parse_json(line, place)
    if not isinstance(record, dict):
        raise DetourError(f'{place}: not a JSON object such as {{"text": "... {PLACEHOLDER}.", "answer": "..."}}')
    for key in ("text", "answer"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise DetourError(f"{place}: {key!r} is not a string or is empty")
    if record["text"].count(PLACEHOLDER) != 1:
        raise DetourError(f"{place}: the text needs exactly one {PLACEHOLDER}")
    return Probe(record["text"], record["answer"].strip(), str(record.get("lang", "")))


def probes_from_corpus(path: Path, count: int = 10, seed: int = 0, text_key: str = "text") -> list[Probe]:
    """Mask one random word (five letters or more) in each of `count` random documents of the first 10,000.

    The context is the word's sentence, at most 40 words. Deterministic; returns fewer probes if there are too few
    documents. Raises DetourError if `count` is below 1 or no document has such a word.
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
    # the text after the word starts with punctuation or a space, which must be kept
    kept = before[-_WINDOW_WORDS // 2 :]
    tail = " ".join(after.split(" ")[: _WINDOW_WORDS - len(kept)])
    return Probe(f"{' '.join(kept)} {PLACEHOLDER}{tail}", word.group())


def masked_ids(
    probe: Probe, tokenizer: PreTrainedTokenizerBase, mask_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (ids [1, n] with the answer masked, positions [k] of the masks, the answer's ids [k]).

    The complete sentence is tokenized and the answer's tokens are replaced, so all other tokens are those of the
    original sentence. Raises DetourError if the answer shares a token with its neighbors.
    """
    text, start, end = probe.filled()
    encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"][0].tolist()
    # a mask also covers the space before its word, whether a separate token or part of one
    start -= text[:start].endswith(" ")
    positions = [at for at, (first, last) in enumerate(offsets) if first < end and last > start and last > first]
    if not positions:
        raise DetourError(f"probe {probe.text!r}: the answer {probe.answer!r} has no tokens; choose another answer")
    covered = text[offsets[positions[0]][0] : offsets[positions[-1]][1]]
    if covered.strip() != probe.answer:
        raise DetourError(f"probe {probe.text!r}: the answer shares a token with {covered.strip()!r}; reword the probe")
    where = torch.tensor(positions)
    answer = ids[0, where].clone()
    ids[0, where] = mask_token_id
    return ids, where, answer


def load_model(
    folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a Hugging Face folder. Raises DetourError for missing files, weights or mask token."""
    if not (folder / "config.json").is_file():
        raise DetourError(f"{folder}: no config.json; give the folder of a Hugging Face model")
    logging.disable_progress_bar()
    with opening(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model, loading = AutoModelForMaskedLM.from_pretrained(
            folder, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    # transformers initializes missing weights randomly, which would make the answers meaningless
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise DetourError(f"{folder}: {len(missing)} weights are missing, {missing[0]} first; give a masked-LM model")
    if tokenizer.mask_token_id is None or not tokenizer.is_fast:
        raise DetourError(f"{folder}: the tokenizer needs a tokenizer.json and a mask token")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and texts have many
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def guess(probe: Probe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, top: int = 3) -> Guess:
    """Return the model's argmax at each mask; for single-token answers the `top` best words."""
    ids, where, answer = masked_ids(probe, tokenizer, tokenizer.mask_token_id)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, where]
    best = logits.topk(top if len(where) == 1 else 1, dim=-1).indices
    words = tuple(tokenizer.decode(column).strip() for column in best.T)
    return Guess(words, bool((best[:, 0] == answer).all()), len(where))


def run_probes(
    folders: Sequence[Path], probes: Sequence[Probe], labels: Sequence[str] | None = None, top: int = 3
) -> Report:
    """Run every probe on every model. `labels` are the column headers, by default the folder names.

    Raises DetourError if labels and folders differ in number, `top` is below 1 or a model cannot be loaded.
    """
    if labels and len(labels) != len(folders):
        raise DetourError(f"{len(labels)} --label for {len(folders)} --model; give one per model or none")
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
    """Print a row per probe, a column per model, and the number of right answers."""
    # Text, not str: rich would interpret brackets in a user's text as markup
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
    runners_up = f" ({', '.join(answer.tops[1:])})" if len(answer.tops) > 1 else ""
    return Text.assemble(mark, visible(answer.tops[0]), (visible(runners_up), "dim"))
