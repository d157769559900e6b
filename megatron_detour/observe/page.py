"""Self-contained HTML pages: templates filled in, with the plots inside."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_detour.files import write_whole
from megatron_detour.observe import words
from megatron_detour.observe.frame import COLOURS, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def embed(path: Path, figure: Figure | None, title: str, caption: str) -> list[dict[str, str]]:
    """Writes the figure as a PNG file and returns it, in a list, as a page shows it.

    Where there is no figure the list is empty and an older file is removed.
    """
    if figure is None:
        path.unlink(missing_ok=True)
        return []
    content = png(figure)
    write_whole(path, content)
    image = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
    return [{"title": title, "caption": caption, "image": image}]


def render(template: str, **values: Any) -> str:
    """Returns the page that `template`, a file beside this one, makes of `values`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        compact=words.compact,
        byte_size=words.byte_size,
        rate_words=words.rate_words,
        mask_words=words.mask_words,
        frozen_words=words.frozen_words,
        batch_words=words.batch_words,
        count="{:,}".format,
    )
    return environment.get_template(template).render(colours=COLOURS, **values)
