"""From blocking generation in a thread to an async iterator, with a stop flag and one fair slot per device.

Generation blocks for its whole length, so it runs in a thread of its own and hands what it makes to the reader's event
loop. The reader may leave at any time: the stop flag is then set, and the slot is free again when the thread has seen
it. This module knows nothing of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
Emit = Callable[[T], None]
Work = Callable[[Emit[T], threading.Event], None]


class Slot:
    """A lock that is handed on first come, first served, to waiters on any event loop.

    Taken in a coroutine, and given back from any thread: by the one that really used the device, when it has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_taken = False
        self._waiters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    @property
    def is_taken(self) -> bool:
        """Whether somebody uses the device now."""
        return self._is_taken

    @property
    def queue_length(self) -> int:
        """How many wait."""
        return len(self._waiters)

    async def acquire(self) -> None:
        """Wait for the slot. Cancelling while waiting gives up the place in the queue."""
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            loop = asyncio.get_running_loop()
            ticket: asyncio.Future[None] = loop.create_future()
            self._waiters.append((loop, ticket))
        try:
            await ticket
        except BaseException:  # cancelled, or closed with its loop
            with self._lock:
                still_waits = (loop, ticket) in self._waiters
                if still_waits:
                    self._waiters.remove((loop, ticket))
            if not still_waits:  # it was handed over in the moment of the cancellation
                self.release()
            raise

    def release(self) -> None:
        """Hand the slot to the next waiter. Called from any thread."""
        while True:
            with self._lock:
                if not self._waiters:
                    self._is_taken = False
                    return
                loop, ticket = self._waiters.popleft()
            try:
                loop.call_soon_threadsafe(_resolve, ticket)
            except RuntimeError:  # that loop is closed, and nobody waits there any more
                continue
            return


def _resolve(ticket: asyncio.Future[None]) -> None:
    if not ticket.done():
        ticket.set_result(None)


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


_END = object()


class Worker(Generic[T]):
    """One piece of blocking work in a daemon thread, whose emissions are read on the loop that made it."""

    def __init__(self, work: Work[T], *, name: str, done: Callable[[], None] | None = None) -> None:
        self._work = work
        self._done = done
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self.stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def _emit(self, item: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:  # the reader's loop is closed: nobody reads any more
            self.stop.set()

    def _run(self) -> None:
        last: Any = _END
        try:
            self._work(self._emit, self.stop)
        except BaseException as error:  # noqa: BLE001 - handed to the reader, who raises it
            last = _Failed(error)
        finally:
            self._work = cast("Work[T]", None)  # what the work holds (tensors) must not outlive it
            if self._done is not None:
                self._done()
            self._emit(last)

    async def read(self) -> AsyncIterator[T]:
        """Yield what the work emits; its exception, if any, is raised here."""
        while True:
            item = await self._queue.get()
            if item is _END:
                return
            if isinstance(item, _Failed):
                raise item.error
            yield item


async def iterate_in_thread(work: Work[T], slot: Slot, *, name: str = "kani-nb-generate") -> AsyncIterator[T]:
    """Yield what `work(emit, stop)` emits, while it holds `slot`.

    Leaving early (or being cancelled) sets `stop`; `work` returns at its next check, and only then is the slot handed
    on. A request that is cancelled while it waits for the slot never touches the device.
    """
    await slot.acquire()
    worker: Worker[T] = Worker(work, name=name, done=slot.release)
    try:
        worker.start()
    except RuntimeError:  # no thread could be started
        slot.release()
        raise
    try:
        reading = worker.read()
        async with contextlib.aclosing(reading):  # type: ignore[type-var]
            async for item in reading:
                yield item
    finally:
        worker.stop.set()


async def run_in_thread(
    call: Callable[[threading.Event], T],
    *,
    name: str,
    slot: Slot | None = None,
    discard: Callable[[T], None] | None = None,
) -> T:
    """The result of `call(cancelled)`, run in a thread of its own.

    Cancelling sets `cancelled` and returns at once: a call that cannot be stopped is abandoned, and what it returns in
    the end is given to `discard`.
    """

    def work(emit: Emit[T], stop: threading.Event) -> None:
        result = call(stop)
        if stop.is_set() and discard is not None:
            discard(result)
        else:
            emit(result)

    if slot is not None:
        await slot.acquire()
    worker: Worker[T] = Worker(work, name=name, done=slot.release if slot is not None else None)
    try:
        worker.start()
    except RuntimeError:  # no thread could be started
        if slot is not None:
            slot.release()
        raise
    try:
        results = [item async for item in worker.read()]
    finally:
        worker.stop.set()
    return results[0]
