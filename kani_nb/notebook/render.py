"""Markdown by a model -> HTML that is safe in a *trusted* notebook output.

JupyterLab and Notebook 7 run scripts and handlers in the output of a cell that was just run, so nothing the model
wrote may reach it as markup. Two walls: markdown-it with raw HTML off, images as text and links checked; then nh3
with an allow-list of what the first one writes. Nothing here knows of displays, and nothing changes the text that is
stored: NUL and lone surrogates are replaced in what is shown only.
"""

from __future__ import annotations

import functools
import html
import itertools
import re
from typing import TYPE_CHECKING, Any

from kani_nb.notebook import math

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markdown_it import MarkdownIt
    from markdown_it.token import Token

_SAFE_LINK = re.compile(r"(?:https?:|mailto:|#)", re.IGNORECASE)
_LINK_REL = "noopener noreferrer nofollow"
_UNSHOWABLE = re.compile("[\x00\ud800-\udfff]")
#: Characters of a code block beyond which it stays plain: colouring 20 KB takes tens of milliseconds.
_LONGEST_COLOURED = 20_000
_LONGEST_COLOURED_OPEN = 2_000

_TAGS = {
    *("p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "hr", "br"),
    *("code", "em", "strong", "s", "a", "span", "table", "thead", "tbody", "tr", "th", "td"),
}
_ATTRIBUTES = {
    "a": {"href", "rel", "target"},
    "ol": {"start"},
    "span": {"class"},
    "code": {"class"},
    "th": {"class"},
    "td": {"class"},
}
_OWN_CLASS = re.compile(r"(?:[csmkbfdi]|kani-nb-(?:image|center|right)|mathjax_process|tex2jax_process)")
_LANGUAGE_CLASS = re.compile(r"language-[\w+#.-]{1,30}")


def showable(text: str) -> str:
    """`text` with what cannot be sent or shown (NUL, lone surrogates) as U+FFFD, and line ends as newlines."""
    return _UNSHOWABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n"))


def markdown_to_html(text: str) -> str:
    """The whole of `text` as safe HTML, without the surrounding element or style."""
    parser = _parser()
    return _second_wall(parser.render(showable(text)))


class GrowingMarkdown:
    """Renders a text that grows at its end; only its last two blocks, which may still change, are parsed again.

    Each frame equals `markdown_to_html` of the text so far, but that a long code block still open is not coloured
    yet. An open code fence is closed for the frame. Not thread-safe.
    """

    def __init__(self) -> None:
        self._settled_source = ""
        self._settled_html: list[str] = []
        self._last_but_one = ("", "")

    def render(self, text: str) -> str:
        """Safe HTML of `text`; the earlier work is used where `text` continues what was rendered before."""
        source = showable(text)
        if not source.startswith(self._settled_source):
            self.__init__()  # type: ignore[misc]
        parser = _parser()
        source = source[len(self._settled_source) :]
        tokens = parser.parse(source)
        blocks = [index for index, token in enumerate(tokens) if token.map and token.level == 0 and token.nesting >= 0]
        if not blocks:
            return "".join(self._settled_html)
        # The last line may not be complete and can still join the block before its own ("#" becomes "#tag"), but none
        # above.
        first_line = 0
        if len(blocks) > 2:
            first_line = _line(tokens[blocks[-2]])
            end = len(source) - len(_from_line(source, first_line))
            self._settled_html.append(_draw(tokens[: blocks[-2]]))
            self._settled_source += source[:end]
            source, tokens, blocks = source[end:], tokens[blocks[-2] :], [0, blocks[-1] - blocks[-2]]
        shown = ""
        if len(blocks) == 2:
            last = _from_line(source, _line(tokens[blocks[1]]) - first_line)
            before = source[: len(source) - len(last)]
            if before != self._last_but_one[0]:
                self._last_but_one = (before, _draw(tokens[: blocks[1]]))
            shown = self._last_but_one[1]
        return "".join(self._settled_html) + shown + _draw(tokens[blocks[-1] :], is_open=True)


def _line(token: Token) -> int:
    return token.map[0] if token.map else 0


def _from_line(source: str, line: int) -> str:
    """`source` from its line number `line`, from 0, on."""
    return source.split("\n", line)[line]


def _draw(tokens: list[Token], *, is_open: bool = False) -> str:
    parser = _parser()
    return _second_wall(parser.renderer.render(tokens, parser.options, {"is_open": is_open}))


@functools.cache
def _parser() -> MarkdownIt:
    """markdown-it with the first wall. No reference definitions: a line far below would change what stands above."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False, "linkify": False})
    parser.enable(["table", "strikethrough"])
    parser.disable(["reference", "html_block", "html_inline"])
    parser.validateLink = lambda url: bool(_SAFE_LINK.match(url.strip()))  # type: ignore[method-assign]
    parser.add_render_rule("link_open", _draw_link)
    parser.add_render_rule("image", _draw_image)
    parser.add_render_rule("fence", _draw_fence)
    for cell in ("th_open", "td_open"):
        parser.add_render_rule(cell, _draw_cell)
    math.install(parser)
    return parser


def _draw_link(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    token.attrs = {"href": token.attrs.get("href", ""), "rel": _LINK_REL, "target": "_blank"}
    return str(renderer.renderToken(tokens, index, options, env))


def _draw_image(_renderer: Any, tokens: Sequence[Token], index: int, _options: Any, _env: Any) -> str:
    """An image's words and address: fetching it would tell its server what was asked."""
    token = tokens[index]
    words = html.escape(f"[image: {token.content} {token.attrs.get('src', '')}]")
    return f'<span class="kani-nb-image">{words}</span>'


def _draw_cell(_renderer: Any, tokens: Sequence[Token], index: int, _options: Any, _env: Any) -> str:
    token = tokens[index]
    style = str(token.attrs.get("style", ""))
    side = next((each for each in ("center", "right") if each in style), "")
    return f'<{token.tag} class="kani-nb-{side}">' if side else f"<{token.tag}>"


def _draw_fence(_renderer: Any, tokens: Sequence[Token], index: int, _options: Any, env: Any) -> str:
    """A code block, coloured where its language is known and it is not still growing beyond a screenful."""
    token = tokens[index]
    words = token.info.split()
    language = re.split(r"[{:,;]", words[0])[0] if words else ""
    limit = _LONGEST_COLOURED_OPEN if env.get("is_open") else _LONGEST_COLOURED
    code = _coloured(token.content, language) if len(token.content) <= limit else html.escape(token.content)
    named = f' class="language-{html.escape(language)}"' if language else ""
    return f"<pre><code{named}>{code}</code></pre>\n"


def _coloured(code: str, language: str) -> str:
    """HTML of `code` with a span around each run that has a colour of its own; the others need none."""
    lexer = _lexer(language[:40]) if language else None
    if lexer is None:
        return html.escape(code)
    runs: list[str] = []
    for kind, pieces in itertools.groupby(lexer.get_tokens(code), key=lambda token: _colour_class(token[0])):
        text = html.escape("".join(piece for _, piece in pieces))
        runs.append(f'<span class="{kind}">{text}</span>' if kind else text)
    return "".join(runs)


@functools.lru_cache(maxsize=256)
def _colour_class(token_type: Any) -> str:
    """The style sheet's letter for a pygments token type, or nothing."""
    from pygments.token import Token as Kind

    letters = (
        (Kind.Comment, "c"),
        (Kind.Literal.String.Doc, "c"),
        (Kind.Literal.String, "s"),
        (Kind.Literal.Number, "m"),
        (Kind.Keyword, "k"),
        (Kind.Operator.Word, "k"),
        (Kind.Name.Tag, "k"),
        (Kind.Name.Builtin, "b"),
        (Kind.Name.Function, "f"),
        (Kind.Name.Class, "f"),
        (Kind.Name.Decorator, "f"),
        (Kind.Name.Attribute, "f"),
        (Kind.Generic.Deleted, "d"),
        (Kind.Generic.Inserted, "i"),
    )
    return next((letter for kind, letter in letters if token_type in kind), "")


@functools.lru_cache(maxsize=64)
def _lexer(language: str) -> Any:
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None


def _second_wall(markup: str) -> str:
    import nh3

    return str(
        nh3.clean(
            markup,
            tags=_TAGS,
            clean_content_tags={"script", "style"},
            attributes=_ATTRIBUTES,
            attribute_filter=_filter_attribute,
            url_schemes={"http", "https", "mailto"},
            link_rel=None,
        )
    )


def _filter_attribute(tag: str, attribute: str, value: str) -> str | None:
    if attribute == "class":
        pattern = _LANGUAGE_CLASS if tag == "code" else _OWN_CLASS
        return " ".join(word for word in value.split() if pattern.fullmatch(word)) or None
    if attribute == "href":
        return value if _SAFE_LINK.match(value) else None
    if attribute in ("rel", "target"):
        return _LINK_REL if attribute == "rel" else "_blank"
    return value
