"""A cell that is nothing but a `%%chat` line gets an empty body, so that the magic itself can answer it.

IPython refuses a cell magic without a body before the magic is asked, and advises the line magic, which means something
else here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_CHAT_LINE = re.compile(r"%%chat(\s.*)?")


def install(shell: Any) -> Callable[[], None]:
    """Do so in `shell`; the result undoes it."""

    def add_body(lines: list[str]) -> list[str]:
        spoken = [line for line in lines if line.strip()]
        if len(spoken) == 1 and _CHAT_LINE.fullmatch(spoken[0].rstrip()):
            return [spoken[0].rstrip() + "\n", "\n"]
        return lines

    # A terminal asks whether a cell is complete, and would take the added body for the typed one.
    add_body.has_side_effects = True  # type: ignore[attr-defined]
    transformers = shell.input_transformers_cleanup
    transformers.append(add_body)
    return lambda: transformers.remove(add_body) if add_body in transformers else None
