"""What all our plotly figures look like: axes and a layout that read on a light and on a dark page."""

from __future__ import annotations

from typing import Any

from kani_nb.figures.svg import INK

_GRID = "rgba(128,134,143,0.25)"
AXIS: dict[str, Any] = {"gridcolor": _GRID, "zerolinecolor": _GRID, "linecolor": _GRID, "automargin": True}
LAYOUT: dict[str, Any] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"color": INK, "size": 11},
    "barmode": "stack",
    "bargap": 0.35,
    "hoverlabel": {"bgcolor": "#2b2f36", "font": {"color": "#f2f3f5"}},
}
