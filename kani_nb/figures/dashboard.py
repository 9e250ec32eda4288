"""The live dashboard: the conversation's figure as a plotly `FigureWidget`, redrawn in place.

A `FigureWidget` sends plotly's own 5 MB to the page, so there is at most one, and only where it was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kani_nb.figures.conversation import conversation_json
from kani_nb.metrics.recorder import GenerationMetrics

_HEIGHT = 320


class LiveFigure:
    """A figure that follows a conversation.

    Args:
        metrics: what there is at first; may be empty.

    Attributes:
        widget: to be displayed; its traces may be changed from any thread.
    """

    def __init__(self, metrics: Sequence[GenerationMetrics]) -> None:
        import plotly.graph_objects as go

        figure = conversation_json(metrics)
        layout = {**figure["layout"], "template": None, "height": _HEIGHT}
        self.widget: Any = go.FigureWidget(data=figure["data"], layout=layout)
        # Its buttons would lie over the legend.
        self.widget._config = {**self.widget._config, "displayModeBar": False}

    def draw(self, metrics: Sequence[GenerationMetrics]) -> None:
        """Show these answers instead."""
        figure = conversation_json(metrics)
        # Numbers only: plotly.js confuses a whole layout that comes while it draws.
        with self.widget.batch_update():
            for trace, new in zip(self.widget.data, figure["data"], strict=True):
                trace.x, trace.y = new["x"], new["y"]
                if "customdata" in new:
                    trace.customdata = new["customdata"]
            for axis in ("xaxis", "xaxis2", "yaxis3"):
                for name in ("range", "dtick", "tickmode", "tickvals"):
                    self.widget.layout[axis][name] = figure["layout"][axis].get(name)

    def close(self) -> None:
        """Take it away. Safe to call twice."""
        self.widget.close()
