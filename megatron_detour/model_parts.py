"""The parts of a model that `freeze` in a run file can name: embeddings, layers.N, layers.N-M, final_norm, head."""

from __future__ import annotations

import re
from typing import Annotated, Any

from megatron_detour.settings import Enclosing, Parsed

SINGLE_PARTS = ("embeddings", "final_norm", "head")
_LAYERS = r"layers\.(\d{1,6})(?:-(\d{1,6}))?"


def layers_of(part: str) -> range:
    """The numbers of the layers that a part consists of, none for the other parts."""
    match = re.fullmatch(_LAYERS, part)
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)


def name_layers(layers: range) -> str:
    """The part that consists of these layers, of which there is one at least."""
    return f"layers.{layers[0]}" if len(layers) == 1 else f"layers.{layers[0]}-{layers[-1]}"


def _parse(raw: Any, _: Enclosing) -> str:
    if not isinstance(raw, str) or (raw not in SINGLE_PARTS and not layers_of(raw)):
        raise ValueError("one of embeddings, layers.N, layers.N-M, final_norm, head")
    return raw


_WRITTEN = {"type": "string", "pattern": f"^(?:{'|'.join(SINGLE_PARTS)}|{_LAYERS})$"}
Part = Annotated[str, Parsed(_parse, _WRITTEN, ("layers.0-7", *SINGLE_PARTS))]
