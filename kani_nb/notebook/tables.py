"""Plain text for people, printed: columns that line up, and nothing that could command a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from kani_nb.notebook.surface import for_terminal


def print_text(text: str) -> None:
    """Print `text` and a newline, with control characters made harmless."""
    print(for_terminal(text))  # noqa: T201 - what a magic says


def text_table(headers: Sequence[str] | None, rows: Sequence[Sequence[str]]) -> str:
    """`rows` as columns; the last one may be as long as it likes."""
    lines = [*([tuple(headers)] if headers else []), *(tuple(row) for row in rows)]
    if not lines:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join(padded)


def one_line(text: str, most: int) -> str:
    """`text` without its line breaks, cut to `most` characters."""
    words = " ".join(text[: 4 * most].split())
    return words if len(words) <= most else words[: most - 1] + "…"
