"""The tokens of an answer, shaded by how sure the model was of each, for teaching: safe static HTML and plain text.

Each token says its probability and what else was likely, on hover and on focus; a shade alone says nothing.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from kani_nb.engines.base import TokenLogprob
from kani_nb.notebook.render import showable

#: A notebook keeps them: so many tokens, and so many alternatives of each.
_MOST_TOKENS, _MOST_ALTERNATIVES = 400, 5
#: Below these probabilities a token is shaded, each time more.
_STEPS = (0.9, 0.6, 0.3, 0.1)
#: Only these rules differ from the other outputs'; they travel with the tokens.
_STYLE = (
    "<style>.kani-nb .kani-nb-tokens{white-space:pre-wrap;line-height:1.9}"
    ".kani-nb-t{border-radius:3px;cursor:help}"
    + "".join(
        f".kani-nb-p{step}{{background:rgba(217,130,43,{0.14 * step:.2f});border-bottom:{step}px dotted currentColor}}"
        for step in range(1, len(_STEPS) + 1)
    )
    + ".kani-nb-t:focus{outline:2px solid currentColor}"
    ".kani-nb-t:focus::after{content:' [' attr(title) ']';font-size:12px}</style>"
)


def tokens_html(tokens: Sequence[TokenLogprob]) -> str:
    """Folded HTML of the tokens; empty where there are none."""
    if not tokens:
        return ""
    shown = tokens[:_MOST_TOKENS]
    spans = "".join(_span(token) for token in shown)
    more = "" if len(shown) == len(tokens) else f'<div class="kani-nb-note">the first {len(shown)} tokens</div>'
    return (
        f"{_STYLE}<details><summary>{html.escape(summary(tokens))}</summary>"
        f'<div class="kani-nb-tokens" dir="auto">{spans}</div>{more}</details>'
    )


def summary(tokens: Sequence[TokenLogprob]) -> str:
    """How sure the model was of all of them, in a line: the geometric mean, and of which it was least sure."""
    mean = math.exp(sum(token.logprob for token in tokens) / len(tokens))
    least = min(tokens, key=lambda token: token.logprob)
    return f"{len(tokens):,} tokens, {_percent(mean)} sure of one on average, least of {least.text.strip()[:20]!r}"


def _span(token: TokenLogprob) -> str:
    step = sum(token.probability < limit for limit in _STEPS)
    shade = f" kani-nb-p{step}" if step else ""
    others = [f"{text!r} {_percent(math.exp(logprob))}" for text, logprob in token.alternatives[:_MOST_ALTERNATIVES]]
    title = showable(_percent(token.probability) + (f"; likeliest: {', '.join(others)}" if others else ""))
    text = showable(token.text).replace("\n", "\u21b5\n")
    return f'<span class="kani-nb-t{shade}" tabindex="0" title="{html.escape(title)}">{html.escape(text)}</span>'


def _percent(probability: float) -> str:
    return f"{100 * probability:.{0 if probability >= 0.1 else 1}f} %" if probability >= 0.001 else "under 0.1 %"
