"""Tables of text as static, safe HTML that is readable at 600 pixels, on light pages and on dark ones."""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Sequence

from kani_nb.notebook.math import IGNORE_CLASS
from kani_nb.notebook.render import showable
from kani_nb.notebook.theme import style_tag

_SHEET = """
.kani-nb:has(>.kani-nb-grid){max-width:none}
.kani-nb:has(>.kani-nb-grid)>:not(.kani-nb-grid){max-width:60em}
.kani-nb table.kani-nb-grid{font-size:12.5px;line-height:1.35;font-variant-numeric:tabular-nums;margin:6px 0;
 width:fit-content;max-width:100%;overflow-x:auto}
.kani-nb .kani-nb-grid :is(th,td){border:0;border-bottom:1px solid var(--kn-line);padding:3px 6px;white-space:nowrap}
.kani-nb .kani-nb-grid th{font-weight:600;color:var(--kn-soft);vertical-align:bottom}
.kani-nb .kani-nb-grid .n{text-align:right}
.kani-nb .kani-nb-grid tr.take{background:var(--kn-tint);font-weight:600}
.kani-nb .kani-nb-grid tr.take td:first-child{box-shadow:inset 3px 0 var(--jp-success-color1,#1f9e78)}
.kani-nb .kani-nb-grid tr.out{color:var(--kn-soft)}
.kani-nb .kani-nb-line{border:1px solid var(--kn-line);border-radius:6px;padding:6px 10px;margin:4px 0 8px;
 white-space:pre-wrap;overflow-wrap:anywhere;background:none;color:inherit;
 font:13px/1.4 var(--jp-code-font-family,ui-monospace,monospace)}
.kani-nb ul.kani-nb-notes{font-size:12.5px;line-height:1.45;color:var(--kn-soft);margin:6px 0 2px;padding-left:18px}
.kani-nb .kani-nb-notes li{margin:0 0 2px}
"""


def framed(inner: str, label: str) -> str:
    """`inner`, which is safe HTML, in our own element with its styles; `label` is for who cannot see it."""
    sheet = re.sub(r"\s*\n\s*", "", _SHEET)
    named = html.escape(showable(label), quote=True)
    return (
        f'{style_tag()}<style>{sheet}</style><div class="kani-nb {IGNORE_CLASS}" role="group" aria-label="{named}">'
        f"{inner}</div>"
    )


def text(words: str, css_class: str = "", tag: str = "div") -> str:
    """`words` escaped, in an element of its own."""
    css = f' class="{css_class}"' if css_class else ""
    return f"<{tag}{css}>{html.escape(showable(words))}</{tag}>"


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numbers: Collection[int] = (),
    marked: int | None = None,
    dimmed: Collection[int] = (),
) -> str:
    """Rows of escaped text.

    Args:
        headers: one for each column.
        rows: as many cells each.
        numbers: columns that line up at the right.
        marked: the row to look at first; its mark is in its cells, since colour alone says nothing.
        dimmed: rows that are out of the question.
    """
    head = "".join(_cell(word, at in numbers, "th") for at, word in enumerate(headers))
    body = "".join(
        f"<tr{_row_class(index, marked, dimmed)}>"
        + "".join(_cell(word, at in numbers, "td") for at, word in enumerate(row))
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f'<table class="kani-nb-grid"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _row_class(index: int, marked: int | None, dimmed: Collection[int]) -> str:
    if index == marked:
        return ' class="take"'
    return ' class="out"' if index in dimmed else ""


def _cell(words: str, is_number: bool, tag: str) -> str:
    css = ' class="n"' if is_number else ""
    return f"<{tag}{css}>{html.escape(showable(words))}</{tag}>"


def notes(said: Sequence[str]) -> str:
    """A list of short sentences; nothing where there is none."""
    items = "".join(text(each, tag="li") for each in said)
    return f'<ul class="kani-nb-notes">{items}</ul>' if items else ""


def line_to_copy(line: str) -> str:
    """A magic line, ready to be copied."""
    return f'<pre class="kani-nb-line">{html.escape(showable(line))}</pre>' if line else ""
