"""What is written or drawn can be read, in light and in dark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_detour.observe import plots
from megatron_detour.observe.run_folder import read_run
from megatron_detour.ui import page
from megatron_detour.ui.colors import DARK, LIGHT, PAIRS, with_variables
from megatron_detour.ui.figures import svg
from tests.observe.runs import five_phases, make_run

GROUNDS = {"page", "card", "band"}
DIVIDERS = {"line"}  # rules between rows, and the grid behind curves: nothing is known by them alone
TINTS = (0.2, 0.055)  # of a phase's color: behind its name, and behind the curves


def luminance(color: str) -> float:
    """By WCAG 2."""
    shares = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def tinted(ground: str, color: str, share: float) -> str:
    mixed = (round((1 - share) * int(ground[i : i + 2], 16) + share * int(color[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def test_the_measure() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#c8540a", "#ffffff") == pytest.approx(4.44, abs=0.01)  # what CLM once had
    assert tinted("#ffffff", "#000000", 0.5) == "#808080"


@pytest.mark.parametrize("mode", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("name", sorted(PAIRS.keys() - GROUNDS - DIVIDERS))
def test_every_color_stands_out_from_every_ground(name: str, mode: dict[str, str]) -> None:
    grounds = [mode[ground] for ground in GROUNDS]
    if name not in ("good", "open"):  # words of a page, which no phase tints
        grounds += [tinted(mode["page"], mode[objective], TINTS[1]) for objective in ("mlm", "clm")]
    least = min(contrast(mode[name], ground) for ground in grounds)
    assert least >= (2.9 if name == "axis" else 4.5), f"{least:.2f}"


@pytest.mark.parametrize("mode", [LIGHT, DARK], ids=["light", "dark"])
def test_the_names_of_phases_stand_out_from_their_bands(mode: dict[str, str]) -> None:
    for objective in ("mlm", "clm", "soft"):
        assert contrast(mode["ink"], tinted(mode["page"], mode[objective], TINTS[0])) >= 4.5


def test_drawings_have_no_colors_of_their_own(tmp_path: Path) -> None:
    run = read_run(five_phases(tmp_path / "a"))
    other = read_run(make_run(tmp_path / "b", done=150))
    figures = [plot.draw([run], ["a"]) for plot in plots.PLOTS]
    figures += [plot.draw([run, other], ["1: a", "2: b"]) for plot in plots.PLOTS if plot.compared]
    for number, figure in enumerate(figures):
        drawn = svg(figure, str(number), "title", "description")
        assert not re.search(
            r"#[0-9a-f]{6}\b|rgb\(|(fill|stroke): (black|white)", re.sub(r"<text.*?</text>", "", drawn)
        )
        for group in re.findall(r"var\(--([\w-]+)\)", drawn):
            assert group in PAIRS
    with pytest.raises(KeyError):
        with_variables('style="fill: #123456"')


def test_every_variable_of_the_templates_is_defined() -> None:
    for template in Path(page.__file__).parent.glob("*.html.j2"):
        text = template.read_text(encoding="utf-8")
        assert not set(re.findall(r"var\(--([\w-]+)\)", text)) - PAIRS.keys()
        assert not re.search(r"#[0-9a-f]{3,6}\b(?!})", text), "a color without a name"
