"""What a model would take under each scheme, as stacked bars against the memory there is.

A pure function from a `Plan` to a `FigureBundle`: plotly as plain JSON without a template, our SVG, and a line of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from xml.sax.saxutils import quoteattr

from kani_nb.figures import svg
from kani_nb.figures.bundle import PLOTLY_MIME, FigureBundle, in_html
from kani_nb.figures.look import AXIS, LAYOUT
from kani_nb.hardware.plans import Plan, PlanRow

_MIB, _GIB = 2**20, 2**30
# Told apart on white and on near-black, by the colour-blind too (after Okabe and Ito); in the order they are stacked.
_PARTS: tuple[tuple[str, str, Callable[[PlanRow], int]], ...] = (
    ("weights", "#8a8f98", lambda row: row.weight_bytes - row.scale_bytes),
    ("scales", "#c26fa0", lambda row: row.scale_bytes),
    ("KV cache", "#2f86c8", lambda row: row.kv_bytes),
    ("working", "#d9822b", lambda row: row.working_bytes),
)
_LIMIT = "#1f9e78"
_BAR, _LEFT, _RIGHT, _TOP, _BOTTOM, _WIDTH = 22, 150, 64, 34, 24, 720
#: Width of the number behind a bar.
_NUMBER = 42
#: Memory beyond this many times the largest bar would flatten them all: it is said in words then.
_LIMIT_IN_SCALE = 2.5
_LONGEST_LABEL = 26


def plan_figure(plan: Plan, *, for_colab: bool = False) -> FigureBundle:
    """One bar for each scheme: weights, scales, KV cache and working memory, with a line where the memory ends.

    Args:
        plan: with at least one row.
        for_colab: add `text/html` that loads plotly.js from its CDN, instead of plotly's own MIME type.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not plan.rows:
        raise ValueError("a plan without a row has no figure")
    caption = _caption(plan)
    figure = _plotly(plan)
    data: dict[str, Any] = {"image/svg+xml": _svg(plan, caption), "text/plain": caption}
    data["text/html" if for_colab else PLOTLY_MIME] = in_html(figure) if for_colab else figure
    return FigureBundle(data)


def _caption(plan: Plan) -> str:
    parts = [f"{plan.model[:80]} at {plan.context_tokens:,} tokens"]
    if plan.budgets:
        parts.append(f"{plan.usable_bytes / _GIB:,.1f} GiB usable ({plan.kind})")
    if plan.best is not None:
        unit, divisor, digits = _unit(plan)
        parts.append(f"recommended: {plan.best.label}, {plan.best.peak_bytes / divisor:,.{digits}f} {unit}")
    else:
        parts.append("none fits")
    return " · ".join(parts)


def _unit(plan: Plan) -> tuple[str, int, int]:
    """The unit of the axis, its bytes, and the digits of a number in it."""
    return ("MiB", _MIB, 0) if max(row.peak_bytes for row in plan.rows) < _GIB else ("GiB", _GIB, 2)


def _labels(rows: Sequence[PlanRow], recommended: int | None) -> list[str]:
    """The schemes' names, with the recommendation and the refusals marked in words."""
    named = []
    for index, row in enumerate(rows):
        long = len(row.label) > _LONGEST_LABEL
        label = row.label[: _LONGEST_LABEL - 1] + "…" if long else row.label
        named.append(f"→ {label}" if index == recommended else label if row.fits else f"{label} ✗")
    # Plotly adds up bars of one name.
    return [label + "\u200b" * named[:index].count(label) for index, label in enumerate(named)]


def _limit(plan: Plan) -> float | None:
    """Where the line stands, in bytes; None where it would be far outside."""
    usable = plan.usable_bytes
    largest = max(row.peak_bytes for row in plan.rows)
    return usable if plan.budgets and usable <= _LIMIT_IN_SCALE * largest else None


def _svg(plan: Plan, caption: str) -> str:
    unit, divisor, digits = _unit(plan)
    limit = _limit(plan)
    ends = None if limit is None else limit / divisor
    ticks = svg.nice_ticks(max(ends or 0.0, *(row.peak_bytes / divisor for row in plan.rows)), 5)
    base = _TOP + _BAR * len(plan.rows)

    def at(amount: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * amount / ticks[-1]

    parts = [_legend(limit is not None)]
    for tick in ticks:
        x = at(tick)
        parts.append(f'<path d="M{x:.1f} {_TOP}V{base}" stroke="{svg.GRID}" stroke-opacity=".25"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 15}" text-anchor="middle">{tick:,.4g}</text>')
    parts.append(f'<text x="{_WIDTH - 8}" y="{base + 15}" text-anchor="end">{unit}</text>')
    for index, (row, label) in enumerate(zip(plan.rows, _labels(plan.rows, plan.recommended), strict=True)):
        weight = ' font-weight="600"' if index == plan.recommended else ""
        y = _TOP + _BAR * index
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 15}" text-anchor="end"{weight}>{svg.words(label)}</text>')
        parts.append(_bar(row, y, divisor, at))
        x = at(row.peak_bytes / divisor) + 5
        if ends is not None and x - 5 <= at(ends) <= x + _NUMBER:  # beside the line, not across it
            x = at(ends) + 5
        parts.append(f'<text x="{x:.1f}" y="{y + 15}"{weight}>{row.peak_bytes / divisor:,.{digits}f}</text>')
    if ends is not None:
        line = f'stroke="{_LIMIT}" stroke-width="1.8" stroke-dasharray="5 3"'
        parts.append(f'<path d="M{at(ends):.1f} {_TOP - 4}V{base}" {line}/>')
    height = base + _BOTTOM + 20
    label = f"Memory by scheme: {caption}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        f' role="img" aria-label={quoteattr(svg.words(label))} font-family="system-ui,sans-serif" font-size="11"'
        f' style="max-width:100%;height:auto" fill="{svg.INK}">{"".join(parts)}'
        f'<text x="8" y="{height - 6}">{svg.words(caption)}</text></svg>'
    )


def _bar(row: PlanRow, y: int, divisor: int, at: Callable[[float], float]) -> str:
    begin, parts = 0.0, []
    for _, colour, size in _PARTS:
        amount = max(0, size(row)) / divisor
        if amount:
            wide = max(0.3, at(begin + amount) - at(begin))
            parts.append(
                f'<rect x="{at(begin):.1f}" y="{y + 4}" width="{wide:.1f}" height="{_BAR - 8}" fill="{colour}"/>'
            )
            begin += amount
    return "".join(parts)


def _legend(has_limit: bool) -> str:
    x, parts = 8.0, []
    for name, colour in [*((name, colour) for name, colour, _ in _PARTS), *([("usable", _LIMIT)] if has_limit else [])]:
        parts.append(f'<rect x="{x:.0f}" y="10" width="9" height="9" rx="2" fill="{colour}"/>')
        parts.append(f'<text x="{x + 13:.0f}" y="18">{name}</text>')
        x += 24 + 6.2 * len(name)
    return "".join(parts)


def _plotly(plan: Plan) -> dict[str, Any]:
    unit, divisor, _ = _unit(plan)
    labels = [svg.words(label) for label in _labels(plan.rows, plan.recommended)]
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": labels,
            "x": [round(max(0, size(row)) / divisor, 4) for row in plan.rows],
            "marker": {"color": colour, "line": {"width": 0}},
            "hovertemplate": f"%{{x:,.3~f}} {unit}",
        }
        for name, colour, size in _PARTS
    ]
    limit = _limit(plan)
    if limit is not None:
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": "usable",
                "x": [round(limit / divisor, 3)] * len(labels),
                "y": labels,
                "line": {"color": _LIMIT, "width": 2, "dash": "dash"},
                "hovertemplate": f"%{{x:,.1f}} {unit}",
            }
        )
    layout = {
        **LAYOUT,
        "height": 70 + 26 * len(labels),
        "margin": {"l": 20, "r": 20, "t": 30, "b": 30},
        "hovermode": "y unified",
        "legend": {"orientation": "h", "traceorder": "normal", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {**AXIS, "title": {"text": unit}, "rangemode": "tozero"},
        "yaxis": {**AXIS, "autorange": "reversed", "showgrid": False},
    }
    return {"data": traces, "layout": layout, "config": {"displaylogo": False}}
