"""How well models restore masked words of texts: perplexity, bits a byte and accuracy, without labels."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_detour.evaluation.masked_words.texts import IntrinsicOptions
from megatron_detour.evaluation.models import named_models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `intrinsic` to a parser whose result goes to run()."""
    defaults, add = IntrinsicOptions(), parser.add_argument
    add("--model", nargs="+", action="extend", required=True, metavar="DIR", help="Hugging Face folders, or NAME=DIR")
    add("--corpus", type=Path, nargs="+", action="extend", required=True, metavar="FILE", help=".jsonl[.gz] or .txt")
    add("--output", type=Path, required=True, metavar="DIR", help="for intrinsic.jsonl, intrinsic.md and cells/")
    of_domain = parser.add_argument_group("words of the domain")
    of_domain.add_argument("--words", type=Path, metavar="FILE", help="the words, one a line")
    _add_files(of_domain, "--reference", "general texts, which have the domain's words far less often")
    _add_files(of_domain, "--domain", "texts of the domain to count beside each corpus, with --reference")
    of_domain.add_argument("--ratio", type=float, default=defaults.ratio, help="times as often, at least (%(default)g)")
    add("--documents", type=int, default=defaults.documents, help="of a corpus, at most (%(default)s)")
    add("--windows", type=int, default=defaults.windows, help="of a document, at most (%(default)s)")
    add(
        "--window-words", type=int, default=defaults.window_words, help="words that a model reads at once (%(default)s)"
    )
    add("--mask-rate", type=float, default=defaults.mask_rate, help="share of a window's words (%(default)s)")
    add("--seed", type=int, default=defaults.seed, help="of documents, windows, masks and bootstrap (%(default)s)")
    add("--text-key", default=defaults.text_key, help="the key of a JSON line that holds the text (%(default)s)")
    add("--resamples", type=int, default=defaults.resamples, help="of the bootstrap (%(default)s)")
    add("--device", default=defaults.device, help="auto, cpu, cuda or cuda:N; bf16 on a GPU (%(default)s)")
    add("--batch-tokens", type=int, default=defaults.batch_tokens, help="positions in a forward pass (%(default)s)")


def _add_files(group: argparse._ArgumentGroup, name: str, help_text: str) -> None:
    group.add_argument(name, type=Path, nargs="+", action="extend", default=[], metavar="FILE", help=help_text)


def run(options: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status. Raises DetourError as measure() does."""
    settings = IntrinsicOptions(
        **{name: getattr(options, name) for name in IntrinsicOptions.__dataclass_fields__ if name not in _LISTS},
        **{name: tuple(getattr(options, name)) for name in _LISTS},
    )
    from megatron_detour.evaluation.masked_words.measure import measure

    measure(named_models(options.model), options.corpus, settings, options.output)
    return 0


_LISTS = ("reference", "domain")
