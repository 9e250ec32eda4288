"""A small writer of SVG charts: panels with axes, lines, stacked bars and a legend, for light and dark pages.

It exists so that a saved notebook shows its figures where no script runs. Everything that enters is a number or is
escaped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape, quoteattr

#: Middle grey: stands out from white and from near-black alike. An SVG shown as an image sees no page colours.
INK = "#80868f"
GRID = "#80868f"

#: Fewer values than this leave room at the right.
_FEWEST_SLOTS = 4

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Line:
    """A line through `values`, one per x; None leaves a gap."""

    name: str
    values: Sequence[float | None]
    colour: str
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars of `values`, one per x, stacked upon those of the same panel before it."""

    name: str
    values: Sequence[float | None]
    colour: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: bars behind, lines in front, one vertical axis. `titles` name each x when pointed at."""

    title: str
    bars: Sequence[Bars]
    lines: Sequence[Line]
    titles: Sequence[str]


def words(text: str) -> str:
    """`text` escaped for XML, without characters that XML does not know."""
    return escape(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text))


def draw(panels: Sequence[Panel], *, label: str, caption: str, width: int = 720, height: int = 250) -> str:
    """The panels side by side, with `caption` below and `label` for who cannot see them."""
    across = width / max(1, len(panels))
    inside = "".join(
        f'<g transform="translate({index * across:.0f},0)">{_panel(panel, across, height - 24)}</g>'
        for index, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" aria-label={quoteattr(_NOT_XML.sub("", label))} font-family="system-ui,sans-serif" font-size="11"'
        ' style="max-width:100%;height:auto"'
        f' fill="{INK}">{inside}<text x="8" y="{height - 6}">{words(caption)}</text></svg>'
    )


def nice_ticks(highest: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to at least `highest`."""
    if not highest > 1e-9 or not math.isfinite(highest):
        return [0.0, 1.0]
    raw = highest / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    return [step * index for index in range(math.ceil(highest / step - 1e-9) + 1)]


def _panel(panel: Panel, width: float, height: float) -> str:
    left, right, top, bottom = 50.0, 10.0, 44.0, 18.0
    count = max((len(each.values) for each in _series(panel)), default=0)
    if count == 0:
        return ""
    stacked = [sum(each.values[index] or 0 for each in panel.bars) for index in range(count)]
    peaks = [value for each in panel.lines for value in each.values if value is not None]
    ticks = nice_ticks(max([*stacked, *peaks, 0]))
    tall, wide = height - top - bottom, width - left - right
    slot = wide / max(count, _FEWEST_SLOTS)

    def at(value: float) -> float:
        return top + tall * (1 - value / ticks[-1])

    parts = [f'<text x="8" y="14" font-weight="600">{words(panel.title)}</text>', _legend(panel, width)]
    for tick in ticks:
        y = at(tick)
        parts.append(f'<path d="M{left:.0f} {y:.1f}H{width - right:.0f}" stroke="{GRID}" stroke-opacity=".25"/>')
        parts.append(f'<text x="{left - 5:.0f}" y="{y + 4:.1f}" text-anchor="end">{tick:,.4g}</text>')
    for index in _marked(count):
        x = left + slot * (index + 0.5)
        parts.append(f'<text x="{x:.1f}" y="{height - 4:.0f}" text-anchor="middle">{words(panel.titles[index])}</text>')
    parts.append(_bars(panel, left, slot, at))
    parts += [_line(line, left, slot, at) for line in panel.lines]
    return "".join(parts)


def _series(panel: Panel) -> list[Bars | Line]:
    return [*panel.bars, *panel.lines]


def _bars(panel: Panel, left: float, slot: float, position: Callable[[float], float]) -> str:
    below = [0.0] * max((len(each.values) for each in panel.bars), default=0)
    parts: list[str] = []
    for bars in panel.bars:
        for index, value in enumerate(bars.values):
            if not value:
                continue
            top, base = position(below[index] + value), position(below[index])
            below[index] += value
            wide = min(slot * 0.7, 36)
            parts.append(
                f'<rect x="{left + slot * (index + 0.5) - wide / 2:.1f}" y="{top:.1f}" width="{wide:.1f}"'
                f' height="{max(base - top, 0.3):.1f}" fill="{bars.colour}"/>'
            )
    return "".join(parts)


def _line(line: Line, left: float, slot: float, position: Callable[[float], float]) -> str:
    path, is_down, dots = "", False, []
    for index, value in enumerate(line.values):
        if value is None:
            is_down = False
            continue
        x, y = left + slot * (index + 0.5), position(value)
        path += f"{'L' if is_down else 'M'}{x:.1f} {y:.1f}"
        is_down = True
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{line.colour}"/>')
    dashes = ' stroke-dasharray="4 3"' if line.is_dashed else ""
    drawn = f'<path d="{path}" fill="none" stroke="{line.colour}" stroke-width="1.6"{dashes}/>' if path else ""
    return drawn + ("".join(dots) if len(dots) <= 40 and not line.is_dashed else "")


def _legend(panel: Panel, width: float) -> str:
    x, y, parts = 8.0, 30.0, []
    for each in _series(panel):
        wide = 17 + 5.6 * len(each.name)
        if x + wide > width and x > 8:
            break
        parts.append(f'<rect x="{x:.0f}" y="{y - 8:.0f}" width="9" height="9" rx="2" fill="{each.colour}"/>')
        parts.append(f'<text x="{x + 13:.0f}" y="{y:.0f}">{words(each.name)}</text>')
        x += wide + 6
    return "".join(parts)


def _marked(count: int) -> list[int]:
    """Which of `count` positions carry a label: at most ten, the last one always."""
    step = max(1, math.ceil(count / 10))
    return sorted({*range(0, count, step)} - set(range(count - step // 2, count)) | {count - 1})
