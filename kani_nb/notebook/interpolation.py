r"""Prompts are literal: `{{expr}}` is the one interpolation, evaluated once, and `\{{` writes two braces.

`{`, `$`, JSON and LaTeX pass untouched, and what an expression gave is not looked at again. Nothing here knows of
IPython: the caller passes the namespace.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from kani_nb.errors import PromptError
from kani_nb.messages import MessagePart

T = TypeVar("T")

#: How far an expression may reach, and how many closing braces are tried as its end.
_LONGEST = 4000
_MOST_ENDS = 32


def interpolate(text: str, namespace: dict[str, Any]) -> str | tuple[MessagePart | str, ...]:
    r"""`text` with every `{{expr}}` replaced by its value: a string, or parts where a value was a message part.

    An opening `{{` that is never closed, and `{{}}`, are literal.

    Raises:
        PromptError: an expression is not Python, or raised; it is named, and nothing of the prompt has been sent.
    """
    pieces = [piece for piece in _pieces(text, namespace) if not isinstance(piece, str) or piece]
    if any(isinstance(piece, MessagePart) for piece in pieces):
        return tuple(pieces)
    return "".join(str(piece) for piece in pieces)


def _pieces(text: str, namespace: dict[str, Any]) -> Iterator[MessagePart | str]:
    position = 0
    while (start := text.find("{{", position)) >= 0:
        if start > position and text[start - 1] == "\\":
            yield text[position : start - 1] + "{{"
            position = start + 2
            continue
        yield text[position:start]
        found = expression_at(text, start + 2)
        if found is None:
            yield "{{"
            position = start + 2
            continue
        expression, position = found
        yield evaluate(expression, namespace, _render)
    yield text[position:]


def expression_at(text: str, start: int) -> tuple[str, int] | None:
    """The expression that begins at `start` and where its closing braces end, or None where the braces are literal.

    The first `}}` that makes it valid Python closes it, so that dicts and strings may hold braces.

    Raises:
        PromptError: it is not Python.
    """
    first_error: SyntaxError | None = None
    first = ""
    end = start - 1
    for _ in range(_MOST_ENDS):
        end = text.find("}}", end + 1, start + _LONGEST)
        if end < 0:
            break
        expression = text[start:end].strip()
        if not expression and first_error is None:
            return None
        try:
            ast.parse(expression, mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if first_error is None:
                first, first_error = expression, error if isinstance(error, SyntaxError) else SyntaxError(str(error))
        else:
            return expression, end + 2
    if first_error is None:
        return None
    raise PromptError(
        f"{{{{{_short(first)}}}}} is not a Python expression",
        why=f"{first_error.msg}; nothing was sent",
        fix=r"write \{{ where two braces are meant literally",
    )


def evaluate(expression: str, namespace: dict[str, Any], read: Callable[[Any], T]) -> T:
    """What `read` makes of the expression's value.

    Raises:
        PromptError: it raised, and is named; or `read` refused the value.
    """
    try:
        return read(eval(compile(expression, "<prompt>", "eval"), namespace))  # noqa: S307 - the person's own code
    except PromptError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the person's expression raises is reported, by name
        message = str(error)
        raise PromptError(
            f"{{{{{_short(expression)}}}}} raised {type(error).__name__}",
            why=(f"{_short(message, 300)}; " if message else "") + "nothing was sent",
            fix=r"correct it, or write \{{ where two braces are meant literally",
        ) from None


def _render(value: Any) -> MessagePart | str:
    """A value as the model may read it: text as it is, tables as Markdown where that can be had, the rest as `str`."""
    if isinstance(value, str | MessagePart):
        return value
    for name in ("_repr_markdown_", "to_markdown"):
        as_markdown = getattr(value, name, None)
        if callable(as_markdown) and not isinstance(value, type):
            try:
                rendered = as_markdown()
            except ImportError:  # pandas needs tabulate for it
                continue
            if isinstance(rendered, str):
                return rendered
    return str(value)


def _short(text: str, most: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
