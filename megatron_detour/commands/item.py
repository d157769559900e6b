"""A line of the doctor's answer."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_detour.text import visible

OK, NOTE, FAULT = "ok", "note", "fault"


@dataclass(frozen=True)
class Item:
    """`remedy` says what to do about a note or a fault, where something can be done."""

    state: str
    what: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return visible(f"{self.state:5}  {self.what:13} {'; '.join(filter(None, [self.text, self.remedy]))}")


def item(good: bool, what: str, text: str, remedy: str, otherwise: str = NOTE) -> Item:
    """Ok where `good`, else `otherwise` with the remedy."""
    return Item(OK, what, text) if good else Item(otherwise, what, text, remedy)
