"""The one background event loop, and how other threads and other loops reach it.

Jupyter never awaits a magic, and a kernel's own loop is busy while a cell runs; so engines and sessions live on a loop
of their own, in a daemon thread. Nothing here knows what runs on it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """An asyncio event loop in a daemon thread, started when first used."""

    def __init__(self, name: str = "kani-nb-loop") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The running loop; starts the thread when there is none."""
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name=self._name, daemon=True)
                self._thread.start()
            return self._loop

    @property
    def is_current(self) -> bool:
        """Whether the caller already runs on this loop."""
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start `coroutine` on the loop, from any thread. Cancelling the future cancels the task."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await `coroutine` on this loop from whichever loop the caller is on; cancelling cancels it there.

        The waiting loop wakes ten times a second: an interrupt of `await` in a cell cancels the cell's task from a
        signal handler, which an idle loop would notice only when something else wakes it.
        """
        if self.is_current:
            return await coroutine
        future = asyncio.wrap_future(self.submit(coroutine))
        try:
            while not future.done():
                await asyncio.wait({future}, timeout=0.1)
        except asyncio.CancelledError:
            future.cancel()
            raise
        return future.result()

    def run_sync(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run `coroutine` on the loop and block the calling thread until it ends.

        A `KeyboardInterrupt` cancels the task, waits for it to end, and is raised again.

        Raises:
            RuntimeError: called on the loop's own thread, where it would wait for itself.
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise RuntimeError("run_sync was called on the loop's own thread: await the coroutine there")
        future = self.submit(coroutine)
        try:
            return wait(future)
        except KeyboardInterrupt:
            future.cancel()
            concurrent.futures.wait([future], timeout=10)
            raise

    async def iterate(self, open_stream: Callable[[], AsyncIterator[T]]) -> AsyncIterator[T]:
        """Yield on the caller's loop what the async generator made by `open_stream` yields on this one.

        Leaving early closes the generator on its own loop before this one returns.
        """
        if self.is_current:
            async with aclosing(open_stream()) as stream:  # type: ignore[type-var]
                async for item in stream:
                    yield item
            return
        here = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()

        def hand_over(has_item: bool, item: Any) -> None:
            if not here.is_closed():
                here.call_soon_threadsafe(queue.put_nowait, (has_item, item))

        future = self.submit(_pump(open_stream, hand_over))
        has_item = True
        try:
            while True:
                has_item, item = await queue.get()
                if not has_item:
                    break
                yield item
            if item is not None:
                raise item
        finally:
            if has_item:
                future.cancel()
                while (await queue.get())[0]:
                    pass  # until the generator is closed there, which its last entry tells

    def close(self) -> None:
        """Cancel what runs, stop the loop and end its thread. Safe to call twice."""
        with self._lock:
            loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return

        async def cancel_all() -> None:
            others = [task for task in asyncio.all_tasks(loop) if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        concurrent.futures.wait([asyncio.run_coroutine_threadsafe(cancel_all(), loop)], timeout=5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)
        if not thread.is_alive():
            loop.close()


async def _pump(open_stream: Callable[[], AsyncIterator[T]], hand_over: Callable[[bool, Any], None]) -> None:
    """Hand over every item, and last None or the exception."""
    try:
        async with aclosing(open_stream()) as stream:  # type: ignore[type-var]
            async for item in stream:
                hand_over(True, item)
    except BaseException as error:
        hand_over(False, error)
        raise
    hand_over(False, None)


def wait(future: concurrent.futures.Future[T], pump: Callable[[], None] | None = None, interval_s: float = 0.03) -> T:
    """Block the calling thread until `future` is done, calling `pump` every `interval_s`, and return its result.

    Waits on a `threading.Event` in short steps: `Thread.join` is corrupted by a KeyboardInterrupt on CPython 3.9-3.12,
    and on Windows only a wait with a timeout can be interrupted.
    """
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    while not done.wait(interval_s):
        if pump is not None:
            pump()
    return future.result()
