"""A conversation as a static output, which a saved notebook keeps of a chat pane: its end, and where the rest is.

It is hidden while the pane lives, and drawn all the same after each answer: so it holds nothing that costs a front end
long, nor what a front end would list for people to go to.
"""

from __future__ import annotations

import re
from html import escape

from kani_nb.conversation.session import ChatSession
from kani_nb.notebook.math import PROCESS_CLASS
from kani_nb.notebook.theme import style_tag
from kani_nb.notebook.transcript import plain
from kani_nb.notebook.turn_text import text_of_turn

#: So much of the conversation's end, in bytes of HTML.
_MOST_BYTES = 200_000
#: Formulas that are typeset, at about half a millisecond each; the others stay as their source.
_MOST_FORMULAS = 50
_HEADING = re.compile(r"<(/?)h([1-6])>")


class ChatTwin:
    """Draws the same conversation again and again, and each turn of it once. One thread at a time."""

    def __init__(self) -> None:
        self._drawn: dict[str, tuple[str, str]] = {}

    def draw(self, session: ChatSession) -> dict[str, str]:
        """Its last turns as safe HTML and as text."""
        name, turns = session.conversation.name, session.turns
        kept: dict[str, tuple[str, str]] = {}
        left = _MOST_BYTES
        for turn in reversed(turns):
            drawn = self._drawn.get(turn.id)
            if drawn is None:
                words = text_of_turn(turn)
                drawn = _HEADING.sub(_unlisted, words.to_html()), words.to_text()
            left -= len(drawn[0])
            if left < 0 and kept:
                break
            kept[turn.id] = drawn
        self._drawn = kept
        more = len(turns) - len(kept)
        head = f"{name}: {len(turns)} turns" + (f"; the first {more} are not shown here" if more else "")
        head += f" (%chat open {name} goes on with it)" if turns else ""
        line = f'{style_tag(with_code=True)}<div class="kani-nb"><div class="kani-nb-stat">{escape(head)}</div></div>'
        shown = [*reversed(kept.values())]
        return {
            "text/html": line + _with_formulas("".join(markup for markup, _ in shown), _MOST_FORMULAS),
            "text/plain": plain("\n\n".join([head, *(words for _, words in shown)])),
        }


def _unlisted(tag: re.Match[str]) -> str:
    """A heading that no table of contents lists."""
    return "</div>" if tag[1] else f'<div role="heading" aria-level="{tag[2]}">'


def _with_formulas(markup: str, most: int) -> str:
    """`markup` with its last formulas to be typeset, and not more than `most`."""
    formula = f'class="{PROCESS_CLASS}"'  # with quotation marks, which no text has
    pieces = markup.rsplit(formula, most)
    return formula.join([pieces[0].replace(formula, ""), *pieces[1:]])
