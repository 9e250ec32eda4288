"""Where an output can be drawn: a front end that updates it, a capture that keeps only its end, or a terminal.

One decision in one place, so that the views above it draw and do not ask. Nothing here knows what is drawn.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

Bundle = Mapping[str, Any]

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")
_SYMBOLS_FOR_C0 = 0x2400


class SurfaceKind(StrEnum):
    """How an output can change once it is there."""

    LIVE = "live"
    FINAL = "final"
    TERMINAL = "terminal"


def surface_kind(shell: Any = None) -> SurfaceKind:
    """What the running shell can do: update outputs (a kernel), keep them (`%%capture`), or print text."""
    if shell is None:
        from IPython import get_ipython

        shell = get_ipython()
    if shell is None:
        return SurfaceKind.TERMINAL
    publisher = getattr(shell, "display_pub", None)
    # A capture appends each update as one more output, so it gets one: the last.
    if type(publisher).__name__ == "CapturingDisplayPublisher":
        return SurfaceKind.FINAL
    return SurfaceKind.LIVE if getattr(shell, "kernel", None) is not None else SurfaceKind.TERMINAL


class Surface:
    """One output, shown once and updated in place. Main thread only.

    Args:
        kind: what can be done; found out from the running shell by default.
        display: as `IPython.display.display`: called with a raw bundle, `raw=True`, `metadata=` and `display_id=True`,
            and returns a handle with `update`.
    """

    def __init__(self, kind: SurfaceKind | None = None, display: Callable[..., Any] | None = None) -> None:
        self.kind = kind or (SurfaceKind.LIVE if display is not None else surface_kind())
        self._display = display
        self._handle: Any = None

    @property
    def is_live(self) -> bool:
        """Whether frames before the last one are seen."""
        return self.kind is SurfaceKind.LIVE

    def show(self, bundle: Bundle, metadata: Mapping[str, Any] | None = None, *, is_final: bool = False) -> None:
        """Draw `bundle` where the last one was. Not for terminals, which are written to."""
        if self.kind is SurfaceKind.FINAL and not is_final:
            return
        arguments = {"raw": True, "metadata": dict(metadata or {})}
        if self._handle is not None:
            self._handle.update(dict(bundle), **arguments)
            return
        self._handle = self._displayer()(dict(bundle), display_id=True, **arguments)

    def show_below(self, bundle: Bundle) -> None:
        """Draw `bundle` as one more output, which stays as it is. Not for terminals."""
        self._displayer()(dict(bundle), raw=True)

    def _displayer(self) -> Callable[..., Any]:
        if self._display is None:
            from IPython.display import display

            self._display = display
        return self._display

    def write(self, text: str) -> None:
        """Print `text` to a terminal, without what could command it."""
        sys.stdout.write(for_terminal(text))
        sys.stdout.flush()


def for_terminal(text: str) -> str:
    """`text` with control characters as symbols: an escape sequence can set the clipboard or hide what follows."""

    def symbol(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] == "\r":
            return ""
        return chr(_SYMBOLS_FOR_C0 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"

    shown = _CONTROLS.sub(symbol, text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return shown.encode(encoding, "replace").decode(encoding)
