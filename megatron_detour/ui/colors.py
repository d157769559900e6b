"""The named colors of pages and plots, for light and dark pages.

Plots are drawn in light colors; in a page each becomes a CSS variable, so that plots follow the page's dark mode. Text
and curves have a contrast of at least 4.5 to page and card, axes 3; `line` and `band` are separators only.
"""

from __future__ import annotations

import re

from megatron_detour.objectives import KINDS

PAIRS = {
    "page": ("#ffffff", "#14181d"),
    "card": ("#f5f7f9", "#1d232a"),
    "ink": ("#1f2933", "#e4e9ee"),
    "soft": ("#5b6672", "#9daab7"),
    "line": ("#dce1e6", "#323b45"),
    "band": ("#f1f4f7", "#20272f"),
    "axis": ("#828c97", "#76818d"),
    **{name: kind.color for name, kind in KINDS.items()},
    "good": ("#1d7a46", "#5fcf92"),
    "open": ("#8f5b00", "#f0b955"),
    "guard": ("#b3261e", "#ff8a80"),
    # For lines not distinguished by objective: different in lightness and style too, and not the objectives' colors.
    "run-1": ("#1b1b1b", "#f2f2f2"),
    "run-2": ("#00755a", "#3fc79c"),
    "run-3": ("#b0308c", "#f08fd0"),
    "run-4": ("#856000", "#e0b040"),
    "run-5": ("#0a6f94", "#62c4ec"),
    "run-6": ("#6a3fa0", "#b79cf0"),
    "run-7": ("#6a6a6a", "#a3a3a3"),
}
LIGHT = {name: light for name, (light, _) in PAIRS.items()}
DARK = {name: dark for name, (_, dark) in PAIRS.items()}
PAGE, INK, SOFT, LINE, BAND, AXIS, GUARD = (
    LIGHT[name] for name in ("page", "ink", "soft", "line", "band", "axis", "guard")
)
COLORS = {name: LIGHT[name] for name in KINDS}
PALETTE = [light for name, light in LIGHT.items() if name.startswith("run-")]
_VARIABLES = {light: f"var(--{name})" for name, light in LIGHT.items()} | {"#000000": "var(--ink)"}


def variable(light: str) -> str:
    """Return the CSS variable of a color."""
    return _VARIABLES[light]


def with_variables(svg: str) -> str:
    """Replace the colors of a drawing with CSS variables. Raises KeyError for a color without a name."""
    return re.sub(r"(?<=[:\s])#[0-9a-f]{6}(?=[;\"'])", lambda match: variable(match[0]), svg)
