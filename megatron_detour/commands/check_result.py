"""One line of the output of `megatron-detour doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_detour.text import visible

OK, NOTE, FAULT = "ok", "note", "fault"


@dataclass(frozen=True)
class CheckResult:
    """`remedy` says what to do about a note or a fault, if anything can be done."""

    state: str
    what: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return visible(f"{self.state:5}  {self.what:13} {'; '.join(filter(None, [self.text, self.remedy]))}")


def check(good: bool, what: str, text: str, remedy: str, otherwise: str = NOTE) -> CheckResult:
    """Return OK if `good`, else `otherwise` with the remedy."""
    return CheckResult(OK, what, text) if good else CheckResult(otherwise, what, text, remedy)
