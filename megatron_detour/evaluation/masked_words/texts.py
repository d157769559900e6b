"""The texts of the masked-word evaluation: the masked words of each, and which of them are domain words."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.masked_words.positions import (
    DomainRule,
    Window,
    count_words,
    domain_words,
    folded,
    read_corpus,
    read_words,
    windows_of,
)
from megatron_detour.files import file_facts
from megatron_detour.settings import AnyText, Faults, Flag, Range, validate

VERSION = 1  # of the choice of words


ABOVE_ZERO, DOMAIN = Range(above=0), Flag("FILE", "domain words")


@dataclass(frozen=True)
class IntrinsicOptions:
    """Options of the masked-word evaluation: each field is a flag of megatron-detour evaluate intrinsic."""

    documents: Annotated[int, ABOVE_ZERO, "maximum documents per corpus"] = 500
    windows: Annotated[int, ABOVE_ZERO, "maximum windows per document"] = 4
    window_words: Annotated[int, ABOVE_ZERO, "words per window"] = 200
    mask_rate: Annotated[float, Range(above=0, below=1), "fraction of words to mask"] = 0.15
    seed: Annotated[int, Range(least=0), "seed of documents, windows, masks and bootstrap"] = 0
    words: Annotated[Path | None, DOMAIN, "domain words, one per line"] = None
    reference: Annotated[tuple[Path, ...], DOMAIN, "general texts, in which domain words are rarer"] = ()
    domain: Annotated[tuple[Path, ...], DOMAIN, "further domain texts in which to count words, with --reference"] = ()
    ratio: Annotated[float, ABOVE_ZERO, Flag(group="domain words"), "minimum frequency ratio"] = 8.0
    text_key: Annotated[AnyText, "JSON key of the text"] = "text"
    resamples: Annotated[int, ABOVE_ZERO, "bootstrap resamples"] = 2000
    device: Annotated[str, "auto, cpu, cuda or cuda:N; bf16 on a GPU"] = "auto"
    batch_tokens: Annotated[int, ABOVE_ZERO, "positions per forward pass"] = 8192

    def check(self) -> None:
        """Raises DetourError for options that are invalid or exclude each other."""
        validate(self, _check_domain)


def _check_domain(options: IntrinsicOptions, faults: Faults) -> None:
    if options.words and (options.reference or options.domain):
        faults.add("words", "already lists the domain words; omit --reference and --domain")
    elif options.domain and not options.reference:
        faults.add("domain", "requires --reference")


class Domain:
    """The domain words: those of a file, or those much rarer in general text, or undefined."""

    def __init__(self, options: IntrinsicOptions) -> None:
        self.options = options
        for path in (*options.reference, *options.domain):
            _refuse_missing(path)
        self.listed, self.lines_unused = read_words(options.words) if options.words else (None, 0)

    @cached_property
    def settings(self) -> dict[str, Any] | None:
        """Return what determines the domain words, besides the corpus."""
        options = self.options
        if options.words:
            return {"words": _sha256(options.words)}
        if not options.reference:
            return None
        files = {name: [_sha256(path) for path in getattr(options, name)] for name in ("reference", "domain")}
        return files | {"ratio": float(options.ratio)}

    @cached_property
    def _counts(self) -> tuple[Counter[str], Counter[str]]:
        key = self.options.text_key
        return count_words(self.options.reference, key), count_words(self.options.domain, key)

    def words_of(self, path: Path, counts: Counter[str]) -> frozenset[str] | None:
        """Return the domain words of a corpus with these counts; None if no domain is defined."""
        if self.listed is not None or not self.options.reference:
            return self.listed
        reference, domain = self._counts
        rule = DomainRule(self.options.ratio)
        words = domain_words(counts + domain, reference, rule)
        if not words:
            raise DetourError(
                f"{path}: no domain words: none has {rule.letters} letters or more, occurs {rule.occurrences} times "
                f"and {rule.ratio:g} times as often as in --reference; give --words, --domain or a lower --ratio"
            )
        return words


class Text:
    """A corpus: its name, the settings of its figures, and its windows and domain words, read on first access."""

    def __init__(self, name: str, path: Path, options: IntrinsicOptions, domain: Domain) -> None:
        _refuse_missing(path)
        self.name, self.path, self._options, self._domain = name, path, options, domain
        self.settings: dict[str, Any] = {
            "version": VERSION,
            "corpus": _sha256(path),
            "domain": domain.settings,
            **{key: getattr(options, key) for key in ("documents", "windows", "window_words", "mask_rate", "seed")},
            "text_key": options.text_key,
        }

    @cached_property
    def content(self) -> tuple[list[Window], frozenset[str] | None]:
        """Return windows and domain words. Raises DetourError for a corpus with nothing to mask."""
        options = self._options
        corpus = read_corpus(self.path, options.text_key, options.seed, options.documents)
        shape = {"words": options.window_words, "windows": options.windows, "mask_rate": options.mask_rate}
        windows = [
            window
            for number, text in corpus.documents.items()
            for window in windows_of(number, text, seed=options.seed, **shape)
        ]
        if not windows:
            raise DetourError(f"{self.path}: the chosen documents have no words; increase --documents")
        words = self._domain.words_of(self.path, corpus.counts)
        if words is not None and not any(folded(word) in words for window in windows for word in window.words()):
            raise DetourError(
                f"{self.path}: no domain words among the masked ones; increase --documents or give more --words"
            )
        return windows, words


def texts_of(corpora: list[Path], options: IntrinsicOptions, domain: Domain) -> list[Text]:
    """Return texts named by their files, or by their paths if file names collide."""
    names = [path.name for path in corpora]
    labels = [name if names.count(name) == 1 else str(path) for name, path in zip(names, corpora, strict=True)]
    if len(set(labels)) < len(labels):
        raise DetourError("--corpus: the same corpus twice; give each once")
    return [Text(label, path, options, domain) for label, path in zip(labels, corpora, strict=True)]


def _refuse_missing(path: Path) -> None:
    if not path.is_file():
        raise DetourError(f"{path}: no such file")


def _sha256(path: Path) -> str:
    return file_facts(path)["sha256"]
