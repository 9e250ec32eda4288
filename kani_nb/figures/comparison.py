"""Schemes side by side: memory, time per token and distance from the reference, one row of bars for each.

A pure function from a `Comparison` to a `FigureBundle`. The bars lie, so that names of any length can stand before
them; each begins at 0 and has its number beside it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import quoteattr

from kani_nb.figures import svg
from kani_nb.figures.bundle import PLOTLY_MIME, FigureBundle, in_html
from kani_nb.figures.look import AXIS, LAYOUT
from kani_nb.metrics.comparison import ComparedRow, Comparison

_MIB = 2**20
# Told apart on white and on near-black, by the colour-blind too (after Okabe and Ito).
_GREY, _ORANGE, _PINK, _BLUE = "#8a8f98", "#d9822b", "#c26fa0", "#2f86c8"
_WIDTH, _LEFT, _TOP, _ROW = 720, 150, 40, 24
_ABOVE_CAPTION, _LINE, _CAPTION_CHARACTERS = 26, 15, 112
_LONGEST_LABEL = 22
#: Beyond the longest bar, for the number at its end.
_ROOM_FOR_NUMBER = 66
#: Plotly's own room for the same, as a share of the longest bar.
_PLOTLY_ROOM = 1.5


@dataclass(frozen=True, slots=True)
class _Bars:
    """Bars of one value per row, put at the end of those before them; None leaves a gap."""

    name: str
    colour: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class _Panel:
    """One quantity of every row: its bars, the number beside each, and the range where it was measured repeatedly."""

    title: str
    unit: str
    bars: Sequence[_Bars]
    texts: Sequence[str]
    ranges: Sequence[tuple[float, float] | None] = ()


def comparison_figure(comparison: Comparison, *, for_colab: bool = False) -> FigureBundle:
    """Three panels: memory (weights within the peak), time per token with its range, and KL divergence.

    Args:
        comparison: with at least one row that was measured.
        for_colab: add `text/html` that loads plotly.js from its CDN, instead of plotly's own MIME type.

    Raises:
        ValueError: there is nothing to draw.
    """
    rows = comparison.measured
    if not rows:
        raise ValueError("a comparison without a measured row has no figure")
    caption = summary_line(comparison)
    panels = _panels(rows)
    labels = _labels(rows)
    figure = _plotly(panels, labels)
    data: dict[str, Any] = {"image/svg+xml": _svg(panels, labels, caption), "text/plain": caption}
    data["text/html" if for_colab else PLOTLY_MIME] = in_html(figure) if for_colab else figure
    return FigureBundle(data)


def summary_line(comparison: Comparison) -> str:
    """Which schemes are the smallest, the fastest and the closest, in one line."""
    rows = comparison.measured
    parts = [f"{len(rows)} of {len(comparison.rows)} schemes of {comparison.model[:60]} measured"]
    sizes = [(row.weight_bytes, row.label) for row in rows if row.weight_bytes is not None]
    times = [(row.tpot_s, row.label) for row in rows if row.tpot_s]
    distances = [(row.kl_nats, row.label) for row in rows if row.kl_nats is not None]
    if sizes:
        parts.append(f"smallest {min(sizes)[1][:40]} ({min(sizes)[0] / _MIB:,.0f} MiB of weights)")
    if times:
        parts.append(f"fastest {min(times)[1][:40]} ({min(times)[0] * 1000:,.1f} ms per token)")
    if distances:
        parts.append(f"closest {min(distances)[1][:40]} (KL {min(distances)[0]:.2g})")
    return " · ".join(parts)


def _labels(rows: Sequence[ComparedRow]) -> list[str]:
    return [row.label if len(row.label) <= _LONGEST_LABEL else f"{row.label[: _LONGEST_LABEL - 1]}…" for row in rows]


def _panels(rows: Sequence[ComparedRow]) -> list[_Panel]:
    weights = [_mib(row.weight_bytes) for row in rows]
    # Growth of resident memory can be below the weights, where pages of an earlier model are used again.
    beyond = [
        None if row.peak_bytes is None else _mib(max(0, row.peak_bytes - (row.weight_bytes or 0))) for row in rows
    ]
    times = [None if row.tpot_s is None else round(row.tpot_s * 1000, 3) for row in rows]
    ranges = [
        (round(min(row.tpot_runs_s) * 1000, 3), round(max(row.tpot_runs_s) * 1000, 3)) if row.tpot_runs_s else None
        for row in rows
    ]
    # Five digits of what need not be finite where a scheme has ruined the model.
    distances = [
        float(f"{row.kl_nats:.5g}") if row.kl_nats is not None and math.isfinite(row.kl_nats) else None for row in rows
    ]
    return [
        _Panel(
            "memory, MiB",
            "MiB",
            [_Bars("weights", _GREY, weights), _Bars("more at the peak", _ORANGE, beyond)],
            [_sum_text(*pair) for pair in zip(weights, beyond, strict=True)],
        ),
        _Panel(
            "time per token, ms",
            "ms",
            [_Bars("per token", _PINK, times)],
            ["" if value is None else f"{value:,.1f}" for value in times],
            ranges,
        ),
        _Panel(
            "KL divergence, nats",
            "nats",
            [_Bars("KL", _BLUE, distances)],
            ["" if value is None else f"{value:.3g}" for value in distances],
        ),
    ]


def _sum_text(weights: float | None, beyond: float | None) -> str:
    return " + ".join(f"{value:,.0f}" for value in (weights, beyond) if value is not None)


def _mib(count: int | None) -> float | None:
    return None if count is None else round(count / _MIB, 2)


def _ends(panel: _Panel, count: int) -> list[float]:
    """Where each row's bars end."""
    return [sum(bars.values[index] or 0 for bars in panel.bars) for index in range(count)]


def _text_ends(panel: _Panel, ends: Sequence[float]) -> list[float]:
    """Where each row's number stands: after its bars, and after its whisker."""
    whiskers = [span[1] if span is not None else 0 for span in panel.ranges] or [0.0] * len(ends)
    return [max(pair) for pair in zip(ends, whiskers, strict=True)]


def _svg(panels: Sequence[_Panel], labels: Sequence[str], caption: str) -> str:
    across = (_WIDTH - _LEFT) / len(panels)
    lines = textwrap.wrap(caption, _CAPTION_CHARACTERS) or [""]
    base = _TOP + _ROW * len(labels) + _ABOVE_CAPTION
    height = base + _LINE * len(lines)
    parts = [
        f'<text x="{_LEFT - 8}" y="{_TOP + _ROW * index + 16}" text-anchor="end">{svg.words(label)}</text>'
        for index, label in enumerate(labels)
    ]
    for number, panel in enumerate(panels):
        inside = _svg_panel(panel, len(labels), across)
        parts.append(f'<g transform="translate({_LEFT + across * number:.0f},0)">{inside}</g>')
    parts += [f'<text x="8" y="{base + _LINE * index}">{svg.words(line)}</text>' for index, line in enumerate(lines)]
    label = svg.words(f"Memory, time per token and KL divergence by scheme: {caption}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        f' role="img" aria-label={quoteattr(label)} font-family="system-ui,sans-serif" font-size="11"'
        f' style="max-width:100%;height:auto" fill="{svg.INK}">{"".join(parts)}</svg>'
    )


def _svg_panel(panel: _Panel, count: int, across: float) -> str:
    text_ends = _text_ends(panel, _ends(panel, count))
    highest = svg.nice_ticks(max(text_ends), 3)[-1]
    wide = across - _ROOM_FOR_NUMBER

    def at(value: float) -> float:
        return wide * value / highest

    base = _TOP + _ROW * count
    parts = [
        f'<text x="0" y="14" font-weight="600">{svg.words(panel.title)}</text>',
        _svg_legend(panel),
        f'<path d="M0 {_TOP}V{base}" stroke="{svg.GRID}" stroke-opacity=".5"/>',
    ]
    for index in range(count):
        y, begin = _TOP + _ROW * index, 0.0
        for bars in panel.bars:
            value = bars.values[index] or 0
            if value > 0:
                parts.append(
                    f'<rect x="{at(begin):.1f}" y="{y + 5}" width="{max(0.5, at(value)):.1f}" height="{_ROW - 10}"'
                    f' fill="{bars.colour}"/>'
                )
                begin += value
        span = panel.ranges[index] if panel.ranges else None
        if span is not None:
            middle = y + _ROW / 2
            parts.append(f'<path d="M{at(span[0]):.1f} {middle}H{at(span[1]):.1f}" stroke="{svg.INK}"/>')
        parts.append(f'<text x="{at(text_ends[index]) + 5:.1f}" y="{y + 16}">{panel.texts[index]}</text>')
    return "".join(parts)


def _svg_legend(panel: _Panel) -> str:
    """What the colours mean, where there are several."""
    if len(panel.bars) < 2:
        return ""
    x, parts = 0.0, []
    for bars in panel.bars:
        parts.append(f'<rect x="{x:.0f}" y="21" width="9" height="9" rx="2" fill="{bars.colour}"/>')
        parts.append(f'<text x="{x + 13:.0f}" y="30">{bars.name}</text>')
        x += 22 + 5.8 * len(bars.name)
    return "".join(parts)


def _plotly(panels: Sequence[_Panel], labels: Sequence[str]) -> dict[str, Any]:
    # Positions with the names as their ticks: rows of one name stay rows of their own.
    positions = list(range(len(labels)))
    traces: list[dict[str, Any]] = []
    layout: dict[str, Any] = {
        **LAYOUT,
        "height": 110 + 28 * len(labels),
        "margin": {"l": 20, "r": 20, "t": 50, "b": 30},
        "bargap": 0.4,
        "showlegend": False,
        "yaxis": {
            **AXIS,
            "tickmode": "array",
            "tickvals": positions,
            "ticktext": [svg.words(label) for label in labels],
            "range": [len(labels) - 0.5, -0.5],
            "showgrid": False,
            "zeroline": False,
        },
    }
    share = 1 / len(panels)
    for number, panel in enumerate(panels):
        name = f"x{number + 1 if number else ''}"
        ends = _ends(panel, len(labels))
        highest = max(_text_ends(panel, ends)) or 1
        layout[name.replace("x", "xaxis")] = {
            **AXIS,
            "domain": [round(share * number + 0.02, 3), round(share * (number + 1) - 0.02, 3)],
            "anchor": "y",
            "title": {"text": panel.title},
            "range": [0, highest * _PLOTLY_ROOM],
        }
        traces += [_trace(panel, bars, name, positions) for bars in panel.bars]
        traces.append(
            {
                "type": "scatter",
                "mode": "text",
                "x": _text_ends(panel, ends),
                "y": positions,
                "text": [f" {text}" for text in panel.texts],
                "textposition": "middle right",
                "xaxis": name,
                "yaxis": "y",
                "hoverinfo": "skip",
                "cliponaxis": False,
            }
        )
    return {"data": traces, "layout": layout, "config": {"displaylogo": False}}


def _trace(panel: _Panel, bars: _Bars, axis: str, positions: Sequence[int]) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "bar",
        "orientation": "h",
        "name": bars.name,
        "y": list(positions),
        "x": list(bars.values),
        "xaxis": axis,
        "yaxis": "y",
        "marker": {"color": bars.colour},
        "hovertemplate": f"{bars.name} %{{x:,.4~g}} {panel.unit}<extra></extra>",
    }
    if panel.ranges:
        pairs = list(zip(bars.values, panel.ranges, strict=True))
        trace["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [0 if span is None or value is None else round(span[1] - value, 3) for value, span in pairs],
            "arrayminus": [0 if span is None or value is None else round(value - span[0], 3) for value, span in pairs],
            "color": "#80868f",
            "thickness": 1,
        }
    return trace
