"""Format numbers and settings for people."""

from __future__ import annotations

from typing import Any

from megatron_detour.text import visible

SHAPES = {"linear": "a straight line", "cosine": "a cosine", "1-sqrt": "one minus square root"}


def frozen_words(phase: dict[str, Any]) -> str:
    """Return what a phase freezes, e.g. ``embeddings, layers 0-7``, or an empty string."""
    return ", ".join(str(part).replace("layers.", "layers ") for part in phase.get("freeze") or [])


def batch_words(phase: dict[str, Any]) -> str:
    """Return e.g. ``64 sequences of 1,024 tokens per step`` or, with a batch warm-up, ``8 to 64 sequences ...``."""
    warmup = phase.get("batch_warmup")
    words = f"{phase['sequences']:,} sequences of {phase['sequence_length']:,} tokens per step"
    return f"{warmup['from']:,} to {words}, growing over {compact(warmup['tokens'])} tokens" if warmup else words


def common_batch(phases: list[dict[str, Any]]) -> str:
    """Return the batch of all phases in words, or nothing if phases differ or warm up."""
    alike = not (_differ(phases, "sequences") or _differ(phases, "sequence_length"))
    return batch_words(phases[0]) if phases and alike and not any(p.get("batch_warmup") for p in phases) else ""


def settings_words(phase: dict[str, Any], phases: list[dict[str, Any]]) -> str:
    """Return the settings of a phase that are not the default or differ between phases."""
    parts = []
    if phase.get("freeze"):
        parts.append(f"{frozen_words(phase)} frozen")
    if phase.get("optimizer_state") == "reset":
        parts.append("the optimizer state is reset")
    if not common_batch(phases):
        parts.append(batch_words(phase))
    if _differ(phases, "corpora"):
        weighted = (f"{corpus['prefix']} ({corpus['weight']:.4g})" for corpus in phase.get("corpora") or [])
        parts.append(f"reads {', '.join(weighted)}")
    return "; ".join(parts)


def _differ(phases: list[dict[str, Any]], key: str) -> bool:
    return len({str(phase.get(key)) for phase in phases}) > 1


def format_lr(rate: dict[str, Any]) -> str:
    """Describe the learning rate of a phase: warm-up, peak and end."""
    peak, end, shape = rate["peak"], rate.get("end"), str(rate.get("shape") or "constant")
    warmup = rate.get("warmup_tokens") or 0
    words = f"rises to {peak:.3g} over {compact(warmup)} tokens" if warmup else f"starts at {peak:.3g}"
    if shape == "constant" or end is None or end == peak:
        return f"{words}, then constant"
    return f"{words}, then follows {SHAPES.get(shape, shape)} to {end:.3g}"


def compact(number: float) -> str:
    """Return a count with three significant digits: ``950``, ``12.3k``, ``1.5M``, ``2B``, ``1.2T``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,999 rounds up to 1M, not to 1000k
        if float(f"{abs(number):.3g}") >= size:
            return f"{_three_digits(number / size)}{letter}"
    return _three_digits(number)


def _three_digits(number: float) -> str:
    whole = len(str(int(abs(number))))
    text = f"{number:.{max(0, 3 - whole)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def byte_size(count: float) -> str:
    """Return a size in binary units: ``512 B``, ``3.4 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{_three_digits(count)} {unit}"
        count /= 1024
    return f"{_three_digits(count)} TiB"


def counted(number: int, noun: str) -> str:
    """Return e.g. ``1 task`` or ``1,200 tasks``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: ``45s``, ``4m10s``, ``2h05m``, ``3d04h``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d{seconds % 86400 // 3600:02d}h"


def shortened(text: str, room: int) -> str:
    """Return `text` as one line of at most `room` characters, with ``…`` for what is omitted from its middle."""
    text = visible(" ".join(text.split()))
    if len(text) <= room:
        return text
    tail = (room - 1) // 2
    return f"{text[: room - 1 - tail]}…{text[len(text) - tail :]}"
