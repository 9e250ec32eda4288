"""Runs functions on the kernel's main thread while it waits there for an answer, and asks the person for approval.

Plots, database connections and whatever else belongs to the main thread then work in a tool as they do in a cell. The
loop thread hands a job over and waits; the waiting cell runs it in its pump, with interrupts as usual. A job that is
cancelled (its time is over, or Stop was pressed) is interrupted as Ctrl-C would.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from kani_nb._interrupts import InterruptGuard
from kani_nb.conversation.tools import CannotAskError

_CANNOT_ASK = "this front end cannot ask for input"


class MainThreadHost:
    """A `kani_nb.conversation.tools.Host` for the time of one round.

    Args:
        guard: lets interrupts through while a job runs.
        can_ask: the front end shows what `input()` asks.
    """

    def __init__(self, guard: InterruptGuard, *, can_ask: bool) -> None:
        self._guard = guard
        self._can_ask = can_ask
        self._jobs: deque[_Job] = deque()
        self._is_interrupted = False

    async def run(self, call: Callable[[], Any]) -> Any:
        """See `Host.run`. Cancelling interrupts the function if it runs, and returns at once."""
        job = _Job(call)
        self._jobs.append(job)
        try:
            value, error = await job.outcome
        except asyncio.CancelledError:
            job.cancel()
            raise
        if error is not None:
            raise error
        return value

    async def ask(self, question: str) -> str:
        """See `Host.ask`."""
        if not self._can_ask:
            raise CannotAskError(_CANNOT_ASK)
        answer: str = await self.run(lambda: _ask(question))
        return answer

    def pump(self) -> None:
        """Run what has been handed over, unless the person has interrupted. On the thread that waits."""
        while self._jobs and not self._is_interrupted:
            self._jobs.popleft().run(self._guard)
            self._is_interrupted = self._is_interrupted or self._guard.is_pending

    def begin_no_more(self) -> None:
        """An interrupt has come: what has not begun never will."""
        self._is_interrupted = True


class _Job:
    """One call: made and awaited on the loop, run on another thread."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self.outcome: asyncio.Future[tuple[Any, BaseException | None]] = self._loop.create_future()
        self._lock = threading.Lock()
        self._is_cancelled = False
        self._runs_on: int | None = None

    def cancel(self) -> None:
        """Interrupt it, or keep it from beginning. From any other thread."""
        with self._lock:
            self._is_cancelled = True
            if self._runs_on == threading.main_thread().ident:
                _interrupt_main_thread()

    def run(self, guard: InterruptGuard) -> None:
        """Run it here, and hand its outcome over."""
        with self._lock:
            if self._is_cancelled:
                return
            self._runs_on = threading.get_ident()
        value: Any = None
        error: BaseException | None = None
        try:
            with guard.lifted():
                try:
                    value = self._call()
                finally:
                    self._has_ended()
        except KeyboardInterrupt:
            self._has_ended()
            error = RuntimeError("it was interrupted")
            if not self._is_cancelled:
                guard.note()  # the person's own: it ends the round too
        except Exception as raised:  # noqa: BLE001 - the function's own; told to the model
            traceback.clear_frames(raised.__traceback__)
            error = raised
        try:
            self._loop.call_soon_threadsafe(self._tell, value, error)
        except RuntimeError:  # the loop is closed, and nobody waits there any more
            return

    def _has_ended(self) -> None:
        """From here on a cancellation must not interrupt what this thread does next."""
        with self._lock:
            self._runs_on = None

    def _tell(self, value: Any, error: BaseException | None) -> None:
        if not self.outcome.done():
            self.outcome.set_result((value, error))


def _interrupt_main_thread() -> None:
    """As Ctrl-C would, also out of a sleep."""
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGINT)
    else:
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, signal.SIGINT)


def _ask(question: str) -> str:
    try:
        return input(question)
    except EOFError:
        raise CannotAskError("there is no stdin") from None
    except Exception as error:
        if type(error).__name__ == "StdinNotImplementedError":
            raise CannotAskError(_CANNOT_ASK) from None
        raise
