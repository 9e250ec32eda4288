r"""TeX in a model's Markdown: kept whole, and typeset only where that can do no harm.

Two things go wrong without this. Markdown eats the backslashes of `\(x_1\)` and reads `_` as emphasis; and a front
end's MathJax looks for dollars in every output, so that two prices in a sentence become one formula, and a `\def` by
the model changes the formulas of the user's other cells. So every output says `mathjax_ignore`, and only spans that
this rule has recognised, and in which no command reaches beyond its own formula, say `mathjax_process`. All others
stay as readable source.
"""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline

#: Classes (of MathJax 3 and 2) of the element in which it looks at nothing but `PROCESS_CLASS`.
IGNORE_CLASS = "mathjax_ignore tex2jax_ignore"
PROCESS_CLASS = "mathjax_process tex2jax_process"

_DELIMITERS = (("$$", "$$", True), (r"\[", r"\]", True), (r"\(", r"\)", False), ("$", "$", False))
#: Links, styles, classes, identifiers, loading of extensions, and definitions, which outlive their formula.
_FAR_REACHING = re.compile(
    r"\\(?:href|url|style|class|cssId|html\w*|data|require|unicode|bbox|mmlToken|includegraphics|input|include|label"
    r"|(?:eq)?ref|[egx]?def|let|(?:re)?new\w*|provide\w*|Declare\w*|definecolor|begingroup|endgroup|global|long"
    r"|csname|toggle|texttip|tooltip)(?![a-z])",
    re.IGNORECASE,
)
_LONGEST = 4000


def install(parser: MarkdownIt) -> None:
    """Teach `parser` the inline rule and how its tokens are drawn."""
    parser.inline.ruler.before("escape", "math", _math_rule)
    parser.add_render_rule("math", _draw)


def is_typeset(tex: str) -> bool:
    """Whether `tex` may be given to MathJax."""
    return len(tex) <= _LONGEST and not _FAR_REACHING.search(tex)


def _math_rule(state: StateInline, silent: bool) -> bool:
    source, start = state.src, state.pos
    if source[start] not in "$\\":
        return False
    for opening, closing, is_display in _DELIMITERS:
        if not source.startswith(opening, start):
            continue
        end = _closing(source, start + len(opening), closing, state.posMax)
        if end < 0:
            continue
        if not silent:
            token = state.push("math", "", 0)
            token.content = source[start + len(opening) : end]
            token.markup = opening
            token.meta = {"display": is_display}
        state.pos = end + len(closing)
        return True
    return False


def _closing(source: str, start: int, closing: str, limit: int) -> int:
    """Where `closing` stands, or -1. A single dollar follows Pandoc: no space inside it, no digit after it."""
    end = source.find(closing, start, min(limit, start + _LONGEST))
    if end <= start:
        return -1
    if closing == "$":
        follower = source[end + 1 : end + 2]
        body = source[start:end]
        if body[0].isspace() or body[-1].isspace() or body[-1] == "\\" or follower.isdigit() or "\n\n" in body:
            return -1
    return end if source[start:end].strip() else -1


def _draw(_renderer: Any, tokens: Any, index: int, _options: Any, _env: Any) -> str:
    token = tokens[index]
    tex = html.escape(token.content)
    is_display = token.meta["display"]
    if not is_typeset(token.content):
        return f"<code>{html.escape(token.markup)}{tex}{html.escape(token.markup.translate(_MIRROR))}</code>"
    opening, closing = (r"\[", r"\]") if is_display else (r"\(", r"\)")
    return f'<span class="{PROCESS_CLASS}">{opening}{tex}{closing}</span>'


_MIRROR = str.maketrans("([", ")]")
