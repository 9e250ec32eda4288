"""Ctrl-C and the stop icon, turned from an exception at any bytecode into a request that is met where it is safe.

While an `InterruptGuard` is entered on the main thread, SIGINT only counts; the code inside asks `take()` at the points
where it can act on it. So a round is committed whole or not at all, wherever the interrupt falls. A third unanswered
interrupt raises at once: nobody is ever locked in.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

#: Interrupts that may wait to be taken; the next one raises where it falls.
_PATIENCE = 2


class Interrupted(KeyboardInterrupt):
    """An interrupt that was dealt with: shown as one line, and the cell fails, so that a queued Run All stops there."""

    def __init__(self, message: str = "interrupted") -> None:
        super().__init__(message)

    def _render_traceback_(self) -> list[str]:
        """What IPython prints instead of a traceback."""
        return [f"KeyboardInterrupt: {self}"]


# Front ends show the class's name, and know this one.
Interrupted.__name__ = Interrupted.__qualname__ = "KeyboardInterrupt"


class InterruptGuard:
    """A context in which SIGINT is counted. Off the main thread, where no signal arrives, it does nothing."""

    def __init__(self) -> None:
        self._previous: Any = None
        self._arrived = 0
        self._taken = 0

    def __enter__(self) -> Self:
        """Replace Python's handler; an interrupt before that raises with nothing begun."""
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            if callable(previous):  # an ignored SIGINT stays ignored, and one set from C cannot be put back
                self._previous = previous
                signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Put the handler back. An interrupt that nobody took is raised now, when all is settled."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None
        if kind is None and self.is_pending:
            raise Interrupted

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        if self._arrived - self._taken >= _PATIENCE:
            raise KeyboardInterrupt
        self._arrived += 1

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Let interrupts raise as usual for a while: something runs that they may end at any point."""
        if self._previous is None:
            yield
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self._on_signal)

    def note(self) -> None:
        """Count an interrupt that was met elsewhere."""
        self._arrived += 1

    @property
    def is_pending(self) -> bool:
        """Whether an interrupt waits to be taken."""
        return self._arrived > self._taken

    def take(self) -> bool:
        """Whether there was an interrupt since the last call; the caller acts on it."""
        if self._arrived == self._taken:
            return False
        self._taken = self._arrived
        return True
