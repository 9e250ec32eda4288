"""The main thread waits for a coroutine on the loop thread, and an interrupt ends it in good order.

Nothing here raises in the middle of something: interrupts come as requests (see `_interrupts`), are passed on until the
coroutine has ended, and only one that is not answered in time abandons it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from kani_nb._interrupts import Interrupted, InterruptGuard
from kani_nb._loop import LoopThread, wait

T = TypeVar("T")

#: How long an interrupted coroutine may take to end by itself, and then to be cancelled.
GRACE_S = 10.0
_CANCEL_S = 2.0


def do_nothing() -> None:
    """What is pumped where there is nothing to pump."""


class Call(Generic[T]):
    """One coroutine on the loop thread, as the main thread sees it.

    Args:
        loop: where it runs.
        coroutine: started at once.
        guard: where interrupts arrive; entered by the caller, before and beyond this call.
        pump: called on the waiting thread every 30 ms.
        ask_to_end: called on the waiting thread, again and again once an interrupt came, until the coroutine has ended:
            the first may come before there is anything to end. None cancels the task.
        grace_s: how long that may take.
    """

    def __init__(
        self,
        loop: LoopThread,
        coroutine: Coroutine[Any, Any, T],
        guard: InterruptGuard,
        *,
        pump: Callable[[], None] = do_nothing,
        ask_to_end: Callable[[], object] | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self._loop = loop
        self._guard = guard
        self._pump = pump
        self._ask_to_end = ask_to_end or self.cancel
        self._grace_s = grace_s
        self._asked_at: float | None = None
        self._is_cancelled = False
        self._task: asyncio.Task[Any] | None = None
        self._future = loop.submit(self._run(coroutine))

    @property
    def was_interrupted(self) -> bool:
        """Whether an interrupt came while it was waited for."""
        return self._asked_at is not None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it runs any more."""
        return self._future.done()

    def result(self) -> T:
        """What the coroutine returned, once it has; interrupted or not.

        Raises:
            Interrupted: it did not end in time after an interrupt, or a second one came; it has been cancelled.
            concurrent.futures.CancelledError: it was cancelled.
        """
        try:
            return wait(self._future, self._tick)
        except BaseException:
            if not self._future.done():  # the pump failed, or patience did
                self._ask_to_end()
                self.cancel()
                concurrent.futures.wait([self._future], timeout=_CANCEL_S)
            raise

    def cancel(self) -> None:
        """Cancel the task, once; the call has ended only when the task has. Safe from any thread."""
        if self._is_cancelled:
            return
        self._is_cancelled = True
        self._loop.loop.call_soon_threadsafe(self._cancel_task)

    async def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        self._task = asyncio.current_task()
        if self._is_cancelled:
            coroutine.close()
            raise asyncio.CancelledError
        return await coroutine

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _tick(self) -> None:
        if self._guard.take():
            if self._asked_at is not None:
                raise Interrupted("interrupted twice: what was running has been abandoned")
            self._asked_at = time.monotonic()
        if self._asked_at is not None:
            if time.monotonic() - self._asked_at > self._grace_s:
                raise Interrupted(f"interrupted; what was running did not end within {self._grace_s:g} s")
            self._ask_to_end()
        self._pump()
