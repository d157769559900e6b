"""Self-contained HTML pages: templates filled in, with the plots inside."""

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
    """A plot: its file's name and content, and how a page shows it; empty where there was nothing to draw."""

    file: str
    caption: str
    content: bytes
    drawing: str  # an SVG element

    @classmethod
    def of(cls, file: str, title: str, caption: str, figure: Figure | None, description: str = "") -> Picture:
        """`description` states the figures, by default those of the curves."""
        if figure is None:
            return cls(file, caption, b"", "")
        return cls(file, caption, png(figure), svg(figure, file, title, description or described(figure)))


def write_pictures(pictures: list[Picture], folder: Path) -> None:
    """Writes the pictures as PNG files; removes the file that an earlier time left of an empty one."""
    for picture in pictures:
        if picture.content:
            write_whole(folder / picture.file, picture.content)
        else:
            (folder / picture.file).unlink(missing_ok=True)


def render(template: str, folder: Path, **values: Any) -> str:
    """Returns the page that the file `template` of `folder` makes of `values`; base and parts lie beside this file."""
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
    """What a template puts into a page; text that is markup already has been shown."""
    return visible(value) if type(value) is str else value
