"""Amounts with a unit: tokens such as 50B or "3 steps", and times such as 23h30m."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated, Any

from megatron_detour.settings import Enclosing, FaultElsewhere, Parsed

LARGEST = 10**15  # tokens or seconds: larger amounts are typing errors, and beyond the precision of a float
UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# Commas separate thousands: 1,5B is not a number.
_NUMBER = r"(?:\d{1,3}(?:,\d{3}){1,10}|[\d_]{0,30}\.?\d{1,30})(?:[eE][+-]?\d\d?)?"
_AMOUNT = rf"\s*({_NUMBER})\s*(k|M|B|T|steps?)?\s*"
_TIME = "".join(rf"\s*(?:(\d{{1,9}}){unit})?\s*" for unit in "dhms")


def parse_tokens(value: Any, tokens_per_step: int | None = None) -> int:
    """Parse an amount of tokens: an integer, "50B", "1.5M", "200k" or "3 steps".

    Raise ValueError with what the value must be, and FaultElsewhere for steps of unknown size.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return _within(value)
    match = re.fullmatch(_AMOUNT, str(value))
    if not match or isinstance(value, bool):
        raise ValueError('an amount of tokens such as 50B, 1.5B, 3145728 or "3 steps"')
    unit = match[2] or ""
    scale = tokens_per_step if unit.startswith("step") else UNITS[unit]
    if scale is None:
        raise FaultElsewhere("steps need batch.sequences and data.sequence_length, which are missing or wrong")
    amount = Fraction(match[1].replace(",", "").replace("_", "")) * scale
    if amount.denominator != 1:
        raise ValueError("a whole amount of tokens")
    return _within(int(amount))


def parse_seconds(value: Any, _: Enclosing = []) -> int:  # noqa: B006 never mutated
    """Parse a time: seconds as an integer, or "23h30m", "90m", "2d", "45s". Raise ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return _within(value)
    match = re.fullmatch(_TIME, str(value))
    if not match or not any(match.groups()):
        raise ValueError("a time such as 23h30m, 90m or 3600")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return _within(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _within(amount: int) -> int:
    if abs(amount) > LARGEST:
        raise ValueError(f"an amount up to {LARGEST:,}")
    return amount


def read_tokens(value: Any, enclosing: Enclosing) -> int:
    """Parse an amount of tokens of a run file; steps are those of the enclosing phase. Raise as `parse_tokens` does."""
    return parse_tokens(value, _tokens_per_step(enclosing))


def _tokens_per_step(enclosing: Enclosing) -> int | None:
    """Return sequences x sequence length of the enclosing phase or of the run; None if the run file lacks them."""

    def size(section: str, key: str) -> Any:
        phase_value = next((raw.get(key) for cls, raw in enclosing if cls.__name__ == "Phase"), None)
        run_section = enclosing[0][1].get(section)
        return phase_value or (run_section.get(key) if isinstance(run_section, dict) else None)

    sizes = size("batch", "sequences"), size("data", "sequence_length")
    known = all(type(size) is int and size > 0 for size in sizes)
    return sizes[0] * sizes[1] if known else None


TEXT_SCHEMA = {"pattern": f"^{_AMOUNT}$"}
Tokens = Annotated[int, Parsed(read_tokens, {"type": ["number", "string"], **TEXT_SCHEMA})]
Seconds = Annotated[int, Parsed(parse_seconds, {"type": ["integer", "string"], "pattern": f"^{_TIME}$"})]
