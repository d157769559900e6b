"""How well models predict masked words of a text: perplexity, bits per byte and accuracy, without labels.

The masked words are chosen in the text (positions.py), so that models with different tokenizers are scored on the same
words.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.masked_words.figures import SUMS, compared, draws, measured
from megatron_detour.evaluation.masked_words.positions import folded
from megatron_detour.evaluation.masked_words.tables import as_markdown, print_tables, warn
from megatron_detour.evaluation.masked_words.texts import Domain, IntrinsicOptions, Text, texts_of
from megatron_detour.evaluation.models import check_model, model_identity
from megatron_detour.files import write_whole
from megatron_detour.structured import parse_json, read_json_object
from megatron_detour.ui.progress import CountProgress

if TYPE_CHECKING:
    from megatron_detour.evaluation.masked_words.score import WordScore

LINES, TABLES, CELLS = "intrinsic.jsonl", "intrinsic.md", "cells"
CIRCUMSTANCES = {"windows", "domain_words", "device", "dtype", "seconds", "versions"}
Place = tuple[str, str]  # the names of a model and a corpus
Cell = dict[str, Any]  # the sums by document


def measure(
    models: dict[str, Path], corpora: list[Path], options: IntrinsicOptions, output: Path
) -> list[dict[str, Any]]:
    """Measure every model on every corpus, write intrinsic.jsonl and intrinsic.md into `output`, print the tables.

    Returns the lines of intrinsic.jsonl, one per model and corpus. Results in output/cells for the same weights, texts
    and settings are reused. Every model is compared with the first. Lines of earlier calls are kept, unless their
    corpus is now measured with different settings. Raises DetourError for unreadable files, corpora without words to
    mask, and texts that do not fit a model.
    """
    if not models or not corpora:
        raise DetourError("give at least one model and one corpus")
    options.check()
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise DetourError(f"{output} is a file; choose another --output")
    for folder in models.values():
        check_model(folder)
    device, dtype = _device(options.device)
    domain = Domain(options)
    if domain.lines_unused:
        warn(f"{options.words}: {domain.lines_unused:,} lines do not contain exactly one word; skipped")
    texts = texts_of(corpora, options, domain)
    identities = {name: model_identity(folder) for name, folder in models.items()}
    keys = {
        (name, text.name): _hash({"text": text.settings, "model": identities[name], "dtype": dtype})
        for name in models
        for text in texts
    }
    cells = {place: cell for place, key in keys.items() if (cell := _read_cell(output, key)) is not None}

    def lines() -> list[dict[str, Any]]:
        return _lines(models, texts, cells, keys, options)

    def keep(place: Place, cell: Cell) -> None:
        (output / CELLS).mkdir(parents=True, exist_ok=True)
        write_whole(output / CELLS / f"{keys[place]}.json", json.dumps(cell))
        cells[place] = cell
        _write(output, lines())

    _fill(models, texts, set(cells), device, dtype, options, keep)
    final = lines()
    _write(output, final)
    print_tables(final)
    return final


def _fill(
    models: dict[str, Path],
    texts: list[Text],
    done: set[Place],
    device: str,
    dtype: str,
    options: IntrinsicOptions,
    keep: Callable[[Place, Cell], None],
) -> None:
    """Measure the missing cells. All texts are read before the first model is loaded, to report their faults early."""
    todo = {name: [text for text in texts if (name, text.name) not in done] for name in models}
    windows = sum(len(text.content[0]) for missing in todo.values() for text in missing)
    if not windows:
        return
    import torch

    from megatron_detour.evaluation.masked_words.score import score_windows
    from megatron_detour.evaluation.probes import load_model

    with CountProgress(windows, "windows") as progress:
        for name, missing in todo.items():
            if not missing:
                continue
            model, tokenizer = load_model(models[name], device, getattr(torch, dtype))
            for text in missing:
                began = time.monotonic()
                progress.on(f"{name}, {text.name}")
                try:
                    scores = score_windows(model, tokenizer, text.content[0], options.batch_tokens, progress.add)
                except DetourError as error:
                    raise DetourError(f"{models[name]} on {text.path}: {error}") from None
                cell = _cell(text, scores)
                keep((name, text.name), cell | _circumstances(device, dtype, time.monotonic() - began))
            del model  # free its memory before loading the next one


def _cell(text: Text, scores: Sequence[Sequence[WordScore]]) -> Cell:
    windows, known = text.content
    numbers = sorted({window.document for window in windows})
    rows = {number: row for row, number in enumerate(numbers)}
    sums = {kind: {name: [0.0] * len(numbers) for name in SUMS} for kind in ("all", "domain")}
    for window, of_window in zip(windows, scores, strict=True):
        for word, score in zip(window.words(), of_window, strict=True):
            facts = (1, len(word.encode()), score.tokens, score.unknown, score.right, score.loss)
            for kind in ("all", "domain") if known is not None and folded(word) in known else ("all",):
                for name, fact in zip(SUMS, facts, strict=True):
                    sums[kind][name][rows[window.document]] += fact
    return {
        "documents": len(numbers),
        "windows": len(windows),
        "domain_words": None if known is None else len(known),
        "all": sums["all"],
        "domain": None if known is None else sums["domain"],
    }


def _lines(
    models: dict[str, Path],
    texts: list[Text],
    cells: dict[Place, Cell],
    keys: dict[Place, str],
    options: IntrinsicOptions,
) -> list[dict[str, Any]]:
    baseline = next(iter(models))
    results = []
    for text in texts:
        for name, folder in models.items():
            cell, first = cells.get((name, text.name)), cells.get((baseline, text.name))
            if cell is None:
                continue
            drawn = draws(cell["documents"], options.resamples, options.seed)
            kinds = [kind for kind in ("all", "domain") if cell[kind] is not None]
            compare = name != baseline and first is not None
            results.append(
                {
                    "model": name,
                    "path": str(folder),
                    "corpus": text.name,
                    "corpus_path": str(text.path),
                    **{key: cell[key] for key in ("documents", "windows", "domain_words")},
                    **{kind: measured(cell[kind], drawn) if kind in kinds else None for kind in ("all", "domain")},
                    "compared_with": baseline if compare else None,
                    "change": {kind: compared(cell[kind], first[kind], drawn) for kind in kinds} if compare else None,
                    **{key: cell[key] for key in ("device", "dtype", "seconds", "versions")},
                    "settings": text.settings,
                    "key": keys[name, text.name],
                }
            )
    return results


def _write(output: Path, lines: list[dict[str, Any]]) -> None:
    """Write these lines after the lines of earlier calls that they do not replace."""
    output.mkdir(parents=True, exist_ok=True)
    now = {line["corpus"]: line["settings"] for line in lines}
    models = {(line["model"], line["corpus"]) for line in lines}
    kept = [
        line
        for line in _read_lines(output / LINES)
        if (line["model"], line["corpus"]) not in models
        and now.get(line["corpus"], line["settings"]) == line["settings"]
    ]
    content = [json.dumps(line, ensure_ascii=False) + "\n" for line in kept + lines]
    write_whole(output / LINES, "".join(content))
    write_whole(output / TABLES, as_markdown(kept + lines))


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of earlier calls. Raises DetourError for any other content."""
    if not path.exists():
        return []
    try:
        lines = [parse_json(line, str(path)) for line in path.read_text(encoding="utf-8").splitlines()]
        as_markdown(lines)
        if not all(isinstance(line[key], str) for line in lines for key in ("model", "corpus")):
            raise TypeError("a name is not a string")
        [line["settings"] for line in lines]
    except (DetourError, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DetourError(
            f"{path}: not output of megatron-detour evaluate intrinsic ({error!r:.200}); remove the file, the "
            "results are kept in cells/"
        ) from None
    return lines


def _read_cell(output: Path, key: str) -> Cell | None:
    """Return an earlier result; None if it is missing or damaged, so that it is measured again."""
    path = output / CELLS / f"{key}.json"
    try:
        cell = read_json_object(path)
        for kind in ("all", "domain"):
            if cell[kind] is not None:
                measured(cell[kind], draws(cell["documents"], 1, 0))
        return cell if cell.keys() >= CIRCUMSTANCES else None
    except FileNotFoundError:
        return None
    except (DetourError, ValueError, TypeError, KeyError, OverflowError, MemoryError):
        warn(f"{path}: damaged; measuring again")
        return None


def _device(name: str) -> tuple[str, str]:
    """Return the device and the dtype of the weights."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise DetourError(f"--device {name}: give auto, cpu, cuda or cuda:N")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise DetourError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; give cpu or another GPU")
    return name, "bfloat16" if kind == "cuda" else "float32"


def _circumstances(device: str, dtype: str, seconds: float) -> dict[str, Any]:
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": device, "dtype": dtype, "seconds": round(seconds, 2), "versions": versions}


def _hash(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
