"""Memory and latency over a conversation, one point per answer.

A pure function from recorded metrics to a `FigureBundle`. The plotly figure is written as plain JSON without a
template (a few KB instead of plotly's import and its 7 KB of defaults); plotly itself is loaded only for Colab's
HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from kani_nb.figures import svg
from kani_nb.figures.bundle import PLOTLY_MIME, FigureBundle, in_html
from kani_nb.figures.look import AXIS, LAYOUT
from kani_nb.metrics.recorder import GenerationMetrics

_GIB = 1024**3
#: More answers than this are thinned out: the first, the last and the highest peak stay.
_MOST_POINTS = 120
#: Fewer answers than this leave room at the right: the first ones are not drawn as walls.
_FEWEST_SLOTS = 4
#: Free memory beyond this many times the rest would flatten everything else.
_FREE_IN_SCALE = 3.0

# Middle tones that stand out from white and near-black, told apart by the colour-blind too (after Okabe and Ito).
_GREY, _BLUE, _ORANGE, _GREEN, _PINK, _SKY = "#8a8f98", "#2f86c8", "#d9822b", "#1f9e78", "#c26fa0", "#63b3dd"
_GOLD = "#a58d00"


def conversation_figure(metrics: Sequence[GenerationMetrics], *, for_colab: bool = False) -> FigureBundle:
    """Two panels over the answers: memory (weights, KV, peak, free), and latency with prompt tokens (cached, computed).

    Args:
        metrics: at least one, oldest first.
        for_colab: add `text/html` that loads plotly.js from its CDN, instead of plotly's own MIME type.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not metrics:
        raise ValueError("a conversation without an answer has no figure")
    kept = _thinned(metrics)
    figure = _plotly(kept)
    summary = summary_line(metrics)
    data: dict[str, Any] = {"image/svg+xml": _svg(kept, summary), "text/plain": summary}
    if for_colab:
        data["text/html"] = in_html(figure)
    else:
        data[PLOTLY_MIME] = figure
    return FigureBundle(data)


def conversation_json(metrics: Sequence[GenerationMetrics]) -> dict[str, Any]:
    """The same as plotly's `data`, `layout` and `config`; as many traces, in that order, even without an answer."""
    return _plotly(_thinned(metrics))


def summary_line(metrics: Sequence[GenerationMetrics]) -> str:
    """The last answer's numbers in one line."""
    last = metrics[-1]
    parts = [f"{len(metrics)} answer{'s' * (len(metrics) != 1)}"]
    if last.peak_bytes is not None:
        parts.append(f"peak {last.peak_bytes / _GIB:.2f} GiB ({last.peak_source})")
    if last.free_bytes is not None:
        parts.append(f"free {last.free_bytes / _GIB:.1f} GiB")
    if last.ttft_s is not None:
        parts.append(f"first text {last.ttft_s * 1000:,.0f} ms")
    if last.tpot_s is not None:
        parts.append(f"{last.tpot_s * 1000:,.1f} ms per token")
    if last.prompt_tokens is not None:
        parts.append(f"{last.cached_tokens or 0:,} of {last.prompt_tokens:,} prompt tokens cached")
    return " · ".join(parts)


def _thinned(metrics: Sequence[GenerationMetrics]) -> list[tuple[int, GenerationMetrics]]:
    """At most about `_MOST_POINTS` of the answers, each with its position from 1."""
    count = len(metrics)
    if count <= _MOST_POINTS:
        return list(enumerate(metrics, 1))
    positions = {round(index * (count - 1) / (_MOST_POINTS - 1)) for index in range(_MOST_POINTS)}
    positions.add(max(range(count), key=lambda index: metrics[index].peak_bytes or 0))
    return [(index + 1, metrics[index]) for index in sorted(positions)]


def _gib(value: int | None) -> float | None:
    return None if value is None else round(value / _GIB, 3)


def _ms(value: float | None) -> float | None:
    return None if value is None else round(value * 1000, 2)


def _computed(each: GenerationMetrics) -> int | None:
    return None if each.prompt_tokens is None else max(0, each.prompt_tokens - (each.cached_tokens or 0))


Points = Sequence[tuple[int, GenerationMetrics]]


def _values(points: Points, of: Callable[[GenerationMetrics], float | None]) -> list[float | None]:
    return [of(each) for _, each in points]


def _is_free_in_scale(points: Points) -> bool:
    """Whether free memory can share the axis with what is used."""
    used = [max(each.peak_bytes or 0, (each.weight_bytes or 0) + (each.kv_bytes or 0)) for _, each in points]
    return max((each.free_bytes or 0 for _, each in points), default=0) <= _FREE_IN_SCALE * max(used, default=0)


def _svg(points: Points, summary: str) -> str:
    titles = [str(position) for position, _ in points]
    lines = [svg.Line("peak", _values(points, lambda each: _gib(each.peak_bytes)), _ORANGE)]
    if _is_free_in_scale(points):
        lines.append(svg.Line("free", _values(points, lambda each: _gib(each.free_bytes)), _GREEN, is_dashed=True))
    memory = svg.Panel(
        "memory, GiB",
        [
            svg.Bars("weights", _values(points, lambda each: _gib(each.weight_bytes)), _GREY),
            svg.Bars("KV cache", _values(points, lambda each: _gib(each.kv_bytes)), _BLUE),
        ],
        lines,
        titles,
    )
    latency = svg.Panel(
        "latency, ms",
        [],
        [
            svg.Line("first text", _values(points, lambda each: _ms(each.ttft_s)), _GOLD),
            svg.Line("per token", _values(points, lambda each: _ms(each.tpot_s)), _PINK),
        ],
        titles,
    )
    prompt = svg.Panel(
        "prompt tokens",
        [
            svg.Bars("cached", _values(points, lambda each: each.cached_tokens), _SKY),
            svg.Bars("computed", _values(points, _computed), _BLUE),
        ],
        [],
        titles,
    )
    label = f"Memory, latency and prompt tokens by answer: {summary}"
    return svg.draw([memory, latency, prompt], label=label, caption=summary)


def _plotly(points: Points) -> dict[str, Any]:
    x = [position for position, _ in points]
    names = [f"turn {each.turn or position} · {svg.words(each.model[:60])}" for position, each in points]
    is_free_shown = _is_free_in_scale(points)

    def trace(name: str, values: list[float | None], colour: str, unit: str, axes: str, **more: Any) -> dict[str, Any]:
        hover = f"%{{y:,.4~g}} {unit}"
        common = {
            "name": name,
            "x": x,
            "y": values,
            "xaxis": f"x{axes[0].strip('1')}",
            "yaxis": f"y{axes[1].strip('1')}",
        }
        return {
            **common,
            "hovertemplate": hover,
            **_look(colour, more.pop("kind", "scatter"), more.pop("symbol", "circle")),
            **more,
        }

    memory = [
        trace("weights", _values(points, lambda each: _gib(each.weight_bytes)), _GREY, "GiB", "11", kind="bar"),
        trace("KV cache", _values(points, lambda each: _gib(each.kv_bytes)), _BLUE, "GiB", "11", kind="bar"),
        trace("peak", _values(points, lambda each: _gib(each.peak_bytes)), _ORANGE, "GiB", "11"),
        trace(
            "free",
            _values(points, lambda each: _gib(each.free_bytes)),
            _GREEN,
            "GiB",
            "11",
            kind="dashed",
            visible=True if is_free_shown else "legendonly",
        ),
    ]
    latency = [
        trace(
            "cached", _values(points, lambda each: each.cached_tokens), _SKY, "tokens", "22", kind="bar", opacity=0.45
        ),
        trace("computed", _values(points, _computed), _BLUE, "tokens", "22", kind="bar", opacity=0.45),
        trace("first text", _values(points, lambda each: _ms(each.ttft_s)), _GOLD, "ms", "23", symbol="diamond"),
        trace("per token", _values(points, lambda each: _ms(each.tpot_s)), _PINK, "ms", "23", symbol="square"),
    ]
    # The turn's name is said once per panel, by a trace that is always there.
    for first in (memory[2], latency[2]):
        first["customdata"] = names
        first["hovertemplate"] += "<br>%{customdata}"
    return {
        "data": memory + latency,
        "layout": _layout(points),
        # Not "responsive": JupyterLab resizes it itself, and both together make it 0 pixels high.
        "config": {"displaylogo": False},
    }


def _look(colour: str, kind: str, symbol: str) -> dict[str, Any]:
    if kind == "bar":
        return {"type": "bar", "marker": {"color": colour}}
    line = {"color": colour, "width": 2, **({"dash": "dash"} if kind == "dashed" else {})}
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "line": line,
        "marker": {"color": colour, "size": 6, "symbol": symbol},
    }


def _decades(points: Points) -> tuple[int, int]:
    """The powers of ten around every latency in ms: the same axis from answer to answer, with round numbers on it."""
    values = [value for _, each in points for value in (_ms(each.ttft_s), _ms(each.tpot_s)) if value]
    if not values:
        return 0, 3
    lowest, highest = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return lowest, max(highest, lowest + 1)


def _layout(points: Points) -> dict[str, Any]:
    last = points[-1][0] if points else 0
    lowest, highest = _decades(points)
    across = {
        **AXIS,
        "showgrid": False,
        "range": [0.4, max(last, _FEWEST_SLOTS) + 0.6],
        "title": {"text": "answer", "standoff": 2},
        # Where there is room for it, a number for each answer, and none for those that are not there yet.
        **({"tickmode": "array", "tickvals": [position for position, _ in points]} if last <= 15 else {}),
    }
    return {
        **LAYOUT,
        "height": 236,
        "margin": {"l": 50, "r": 50, "t": 36, "b": 40},
        "hovermode": "x unified",
        "legend": {"orientation": "h", "traceorder": "normal", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {**across, "domain": [0, 0.45], "anchor": "y"},
        "yaxis": {**AXIS, "title": {"text": "GiB"}, "rangemode": "tozero", "anchor": "x"},
        "xaxis2": {**across, "domain": [0.55, 1], "anchor": "y2"},
        "yaxis2": {
            **AXIS,
            "title": {"text": "prompt tokens"},
            "side": "right",
            "anchor": "x2",
            "rangemode": "tozero",
            "showgrid": False,
        },
        # Above the bars, so that they do not hide the lines.
        "yaxis3": {
            **AXIS,
            "title": {"text": "ms"},
            "type": "log",
            "range": [lowest, highest],
            "dtick": 1 if highest - lowest > 1 else "D2",
            "overlaying": "y2",
            "side": "left",
            "anchor": "x2",
        },
    }
