"""A figure as what a notebook shows: one bundle of plotly JSON, our SVG and a line of text, from the same numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PLOTLY_MIME = "application/vnd.plotly.v1+json"


@dataclass(frozen=True, slots=True)
class FigureBundle:
    """Ready for `display(bundle.data, raw=True)`. A front end shows the richest type it knows.

    Attributes:
        data: MIME types and their content.
        metadata: for the same call.
    """

    data: dict[str, Any]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def still(self) -> dict[str, Any]:
        """The same without a script: drawn at once, where loading plotly would hold up the page for a second."""
        return {mime: content for mime, content in self.data.items() if mime in ("image/svg+xml", "text/plain")}

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What IPython shows of it."""
        return self.data, self.metadata


def in_html(plotly_json: dict[str, Any]) -> str:
    """A plotly figure as HTML that loads plotly.js from its CDN, for Colab, which has no plotly renderer of its own."""
    import plotly.graph_objects as go
    import plotly.io as pio

    figure = go.Figure(data=plotly_json["data"], layout={**plotly_json["layout"], "template": None})
    return str(
        pio.to_html(
            figure, include_plotlyjs="cdn", full_html=False, default_height="220px", config={"displaylogo": False}
        )
    )
