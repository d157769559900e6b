"""Inspecting a corpus: integrity checks, statistics and decoded documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_detour.corpus.options import BuildOptions
from megatron_detour.corpus.publish import histogram_path, rejects_path
from megatron_detour.data.indexed import CHUNK, IndexedCorpus
from megatron_detour.data.manifest import Manifest, held_out_prefix, read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.files import file_facts
from megatron_detour.tokenizer.vocabulary import Vocabulary, fingerprint, load_tokenizer

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
CHECKED_IDS = 1 << 24
SHOWN_CHARACTERS = 500
UNKNOWN_FRACTION = 0.01  # of the tokens, above which a warning is printed


def summary(options: BuildOptions, manifest: Manifest | None) -> str:
    """Return the result of a build in a few lines."""
    if manifest is None:
        return (
            f"{options.output_prefix}: finished shard {options.shard_index} of {options.num_shards}; when all are "
            "finished, run the same command without --num-shards and --shard-index to join them"
        )
    lines = [f"{options.output_prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens"]
    left_out = [f"{manifest.empty:,} empty"] if manifest.empty else []
    left_out += [f"{count:,} {reason}" for reason, count in manifest.removed.items() if count]
    if left_out:
        lines.append(f"left out: {', '.join(left_out)}")
    if manifest.rejects:
        lines.append(f"rejected: {manifest.rejects:,}, listed in {rejects_path(options.output_prefix)}")
    if manifest.passed_over:
        some = ", ".join(manifest.passed_over[:3]) + (", ..." if len(manifest.passed_over) > 3 else "")
        lines.append(f"skipped: {len(manifest.passed_over):,} files with an unsupported extension ({some})")
    if manifest.held_out:
        lines.append(f"held out: {manifest.held_out:,} documents in {held_out_prefix(options.output_prefix)}")
    skipped = [f"{name}: {why}" for name, why in manifest.engine.get("passed_over", {}).items()]
    lines.append(f"engine: {manifest.engine['name']} {manifest.engine['version']}")
    lines[-1] += f" (not {'; not '.join(skipped)})" if skipped else ""
    return "\n".join([*lines, *_warnings(manifest)])


def _warnings(manifest: Manifest) -> list[str]:
    """Return warnings about what allows a build but hampers training."""
    lines = []
    missing = [f"[{role.upper()}]" for role in ("cls", "sep", "mask", "pad") if manifest.tokenizer[role] is None]
    if missing:
        lines.append(f"warning: the tokenizer has no {', '.join(missing)}, which training requires")
    if manifest.unknown > UNKNOWN_FRACTION * manifest.tokens:
        lines.append(
            f"warning: {manifest.unknown / manifest.tokens:.1%} of the tokens are [UNK]; does the tokenizer fit?"
        )
    return lines


def verify(prefix: str) -> str:
    """Check sizes, hashes, index and ids of a corpus. Raises DetourError for the first fault."""
    manifest = read_manifest(prefix)
    for kind, facts in manifest.files.items():
        if file_facts(Path(f"{prefix}.{kind}"))["sha256"] != facts["sha256"]:
            raise DetourError(f"{prefix}.{kind}: its SHA-256 differs from the manifest's; copy or rebuild the corpus")
    corpus = IndexedCorpus(prefix)
    vocabulary = Vocabulary.from_dict(manifest.tokenizer)
    if len(corpus) != manifest.documents or corpus.token_count != manifest.tokens:
        raise DetourError(f"{prefix}.idx: its documents or tokens differ from the manifest's; rebuild the corpus")
    _check_index(corpus)
    for start in range(0, corpus.token_count, CHECKED_IDS):
        ids = corpus.token_range(start, CHECKED_IDS)
        lowest, highest = int(ids.min()), int(ids.max())
        if lowest < 0 or highest >= vocabulary.size:
            wrong = lowest if lowest < 0 else highest
            raise DetourError(f"{prefix}.bin: contains id {wrong:,}, but the vocabulary has {vocabulary.size:,} ids")
    accounted = manifest.documents + manifest.held_out + manifest.empty + manifest.rejects
    if manifest.records != accounted + sum(manifest.removed.values()):
        raise DetourError(f"{prefix}.manifest.json: its documents and left-out records do not add up to its records")
    return (
        f"{prefix}: intact, {manifest.documents:,} documents and {manifest.tokens:,} tokens of tokenizer "
        f"{manifest.tokenizer['sha256'][:12]}"
    )


def _check_index(corpus: IndexedCorpus) -> None:
    """Raise DetourError unless documents are contiguous and non-empty."""
    end, boundaries = 0, corpus.documents
    for start in range(0, len(corpus), CHUNK):
        lengths = corpus.lengths[start : start + CHUNK].astype(np.int64) * corpus.dtype.itemsize
        ends = end + np.cumsum(lengths)
        if (lengths < 1).any() or (corpus.offsets[start : start + CHUNK] != ends - lengths).any():
            raise DetourError(f"{corpus.prefix}.idx: its documents are not contiguous; rebuild the corpus")
        end = int(ends[-1])
    if len(boundaries) != len(corpus) + 1 or (boundaries != np.arange(len(boundaries))).any():
        raise DetourError(f"{corpus.prefix}.idx: it does not have one sequence per document; rebuild the corpus")


def stats(prefix: str) -> str:
    """Return counts and lengths of a corpus; draw their histogram as PREFIX.lengths.png. Raises DetourError."""
    manifest = read_manifest(prefix)
    corpus = IndexedCorpus(prefix)
    lengths = np.asarray(corpus.lengths)
    quantiles = np.quantile(lengths, QUANTILES)
    try:
        picture = str(_draw(prefix, lengths))
    except OSError as error:
        picture = f"cannot be written: {error.strerror}"
    rows = [
        ("documents", f"{manifest.documents:,}"),
        ("tokens", f"{manifest.tokens:,}"),
        ("tokens per document", f"{lengths.mean():,.1f} (longest {lengths.max():,})"),
        *((f"  {level:.0%} have at most", f"{q:,.0f}") for level, q in zip(QUANTILES, quantiles, strict=True)),
        ("longer than 1,024", f"{(lengths > 1024).mean():.1%} of documents"),
        ("longer than 8,192", f"{(lengths > 8192).mean():.1%} of documents"),
        ("bytes of input", f"{sum(source['bytes'] for source in manifest.sources):,}"),
        ("empty, rejected", f"{manifest.empty:,}, {manifest.rejects:,}"),
        *((f"removed: {reason}", f"{count:,}") for reason, count in manifest.removed.items()),
        ("tokenizer", manifest.tokenizer["sha256"][:12]),
        ("engine", f"{manifest.engine['name']} {manifest.engine.get('version', '')}"),
        ("histogram", picture),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _draw(prefix: str, lengths: np.ndarray) -> Path:
    from matplotlib.figure import Figure

    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, 60).astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    tokens, _ = np.histogram(lengths, edges, weights=lengths.astype(np.float64))
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.stairs(counts / counts.sum(), edges, label="of documents", fill=True, alpha=0.4)
    axes.stairs(tokens / tokens.sum(), edges, label="of tokens", linewidth=1.5)
    axes.set(xscale="log", xlabel="tokens in the document", ylabel="fraction", title=Path(prefix).name)
    axes.legend()
    path = histogram_path(prefix)
    figure.savefig(path, dpi=120)
    return path


def peek(prefix: str, tokenizer: str | None, count: int, first: int | None) -> Iterator[str]:
    """Yield decoded documents, evenly spaced ones or `count` from `first`. Raises DetourError."""
    manifest = read_manifest(prefix)
    corpus = IndexedCorpus(prefix)
    if tokenizer is None:
        raise DetourError("--tokenizer: peek requires the tokenizer that the corpus was built with")
    decoder = load_tokenizer(tokenizer)
    if fingerprint(decoder) != manifest.tokenizer["sha256"]:
        raise DetourError(f"--tokenizer {tokenizer}: not the tokenizer that {prefix} was built with")
    if count < 1:
        raise DetourError(f"-n: must be at least 1, not {count}")
    if first is not None and not 0 <= first < len(corpus):
        raise DetourError(f"--first {first}: {prefix} has documents 0 to {len(corpus) - 1:,}")
    numbers = np.linspace(0, len(corpus) - 1, count, dtype=np.int64) if first is None else range(first, first + count)
    for number in dict.fromkeys(int(n) for n in numbers if n < len(corpus)):
        text = decoder.decode(corpus.tokens(number).tolist(), skip_special_tokens=False)
        more = f" ... ({len(text):,} characters)" if len(text) > SHOWN_CHARACTERS else ""
        yield f"--- document {number:,}, {int(corpus.lengths[number]):,} tokens\n{text[:SHOWN_CHARACTERS]}{more}"
