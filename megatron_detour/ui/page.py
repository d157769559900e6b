"""Self-contained HTML pages: rendered templates with embedded plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_detour.files import write_whole
from megatron_detour.objectives import KINDS, read_objective
from megatron_detour.text import visible
from megatron_detour.ui.colors import DARK, LIGHT
from megatron_detour.ui.figures import described, png, svg
from megatron_detour.ui.format import byte_size, compact, format_lr

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A plot: file name and content, and its appearance in a page; empty if there was nothing to draw."""

    file: str
    caption: str
    content: bytes
    drawing: str  # an SVG element

    @classmethod
    def from_figure(cls, file: str, title: str, caption: str, figure: Figure | None, description: str = "") -> Picture:
        """`description` is the alternative text, by default the curves' figures."""
        if figure is None:
            return cls(file, caption, b"", "")
        return cls(file, caption, png(figure), svg(figure, file, title, description or described(figure)))


def write_pictures(pictures: list[Picture], folder: Path) -> None:
    """Write the pictures as PNG files; remove old files of empty ones."""
    for picture in pictures:
        if picture.content:
            write_whole(folder / picture.file, picture.content)
        else:
            (folder / picture.file).unlink(missing_ok=True)


def render(template: str, folder: Path, **values: Any) -> str:
    """Render the file `template` of `folder` with `values`; base and parts are beside this file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters.update(
        compact=compact,
        byte_size=byte_size,
        format_lr=format_lr,
        objective=read_objective,
        count="{:,}".format,
    )
    return environment.get_template(template).render(light=LIGHT, dark=DARK, objectives=list(KINDS), **values)


def _shown(value: Any) -> Any:
    """Make a template's value printable, unless it is markup already."""
    return visible(value) if type(value) is str else value
