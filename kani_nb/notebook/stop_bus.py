"""A click that is seen while a cell blocks the kernel: comm messages are looked at where they arrive.

A synchronous cell keeps the kernel from handling messages, so a Stop button's would come when there is nothing left
to stop. ipykernel 7 reads the shell socket in a thread of its own: there each message is looked at and passed on
unchanged. ipykernel 6 reads it on the main thread: there the waiting cell asks for what has arrived, which puts it
into the kernel's own queue, in order, where it is looked at too. No message is consumed, delayed or put before
another; each still takes its usual way later, so a handler may run twice. Where no cell of ours waits, nobody asks on
ipykernel 6: there a front end that can sends the click over the control channel too, which has a thread of its own
since ipykernel 6. All of this is private to ipykernel: every step is probed, and where one is missing, `is_available`
is False and the interrupt is what remains.
"""

from __future__ import annotations

import hmac
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

_LOG = logging.getLogger(__name__)
Handler = Callable[[Mapping[str, Any]], None]


class StopBus:
    """Calls a handler for the messages of registered comms even while a cell runs.

    A handler gets the message's `data`, on the kernel's shell-channel thread (ipykernel 7), on the main thread inside
    `pump` (ipykernel 6), or on the control thread. It may set an event, and little more; it may be called more than
    once for one message.

    Args:
        shell: the running InteractiveShell; without a kernel the bus is never available.
    """

    def __init__(self, shell: Any) -> None:
        self._kernel = getattr(shell, "kernel", None)
        self._handlers: dict[str, Handler] = {}
        self._tap: _ThreadTap | _QueueTap | None = None
        self._door: _ControlDoor | None = None

    @property
    def is_available(self) -> bool:
        """Whether clicks can be seen while a cell blocks; True only while installed."""
        return self._tap is not None

    def install(self) -> bool:
        """Start looking; safe to call twice. False where this kernel offers no way, and nothing was changed."""
        if self._door is None and self._kernel is not None:
            self._door = _ControlDoor.fitting(self._kernel, self._hear)
        if self._tap is None and self._kernel is not None:
            self._tap = _ThreadTap.fitting(self._kernel, self._look) or _QueueTap.fitting(self._kernel, self._look)
        return self.is_available

    def uninstall(self) -> None:
        """Put back what `install` replaced and forget all handlers. Safe to call twice."""
        self._handlers.clear()
        tap, self._tap = self._tap, None
        door, self._door = self._door, None
        for each in (tap, door):
            if each is not None:
                each.close()

    def register(self, comm_id: str, handler: Handler) -> bool:
        """Have `handler` called for `comm_id`; installs the bus if needed, and says whether it is available."""
        self._handlers[comm_id] = handler
        return self.install()

    def unregister(self, comm_id: str) -> None:
        """Stop calling the handler of `comm_id`, if there is one."""
        self._handlers.pop(comm_id, None)

    def pump(self) -> None:
        """Look at what has arrived, on kernels that cannot by themselves. Main thread; returns at once elsewhere."""
        if self._handlers and self._tap is not None:
            self._tap.pump()

    def _hear(self, content: Mapping[str, Any]) -> None:
        """What a comm message has, `{"comm_id", "data"}`, seen on its way or on the control channel."""
        handler, data = self._handlers.get(str(content.get("comm_id"))), content.get("data")
        if handler is None:
            return
        try:
            handler(data if isinstance(data, Mapping) else {})
        except Exception:  # noqa: BLE001 - the message has yet to take its usual way through the kernel
            _LOG.exception("a Stop could not be handled")

    def _look(self, frames: Any) -> None:
        if not self._handlers:
            return
        kernel: Any = self._kernel
        message = _peek(kernel.session, frames)
        if message is not None:
            self._hear(message)


def _peek(session: Any, frames: Any) -> Mapping[str, Any] | None:
    """The content of a signed comm message, or None for any other.

    Not by `session.deserialize`: that records the signature, and the kernel would then refuse the message as a replay.
    """
    try:
        _, parts = session.feed_identities(frames, copy=False)
        signature, header, *rest = [bytes(getattr(part, "buffer", part)) for part in parts[:5]]
        if b"comm_msg" not in header or session.unpack(header).get("msg_type") != "comm_msg":
            return None
        if session.auth is not None and not hmac.compare_digest(signature, session.sign([header, *rest])):
            return None
        content = session.unpack(rest[2])
    except (ValueError, TypeError, IndexError, AttributeError):  # not a message of Jupyter; the kernel will say so
        return None
    return content if isinstance(content, Mapping) else None


class _ThreadTap:
    """ipykernel 7: the callback of the shell stream, in the thread that reads it, with a look before it."""

    def __init__(self, kernel: Any, look: Callable[[Any], None]) -> None:
        self._kernel = kernel
        self._look = look
        self._is_open = True
        self._loop = kernel.shell_channel_thread.io_loop
        self._loop.add_callback(kernel.shell_stream.on_recv, self._receive, copy=False)

    @classmethod
    def fitting(cls, kernel: Any, look: Callable[[Any], None]) -> _ThreadTap | None:
        """The tap, if this kernel has such a thread."""
        thread = getattr(kernel, "shell_channel_thread", None)
        has_parts = (
            hasattr(getattr(thread, "io_loop", None), "add_callback")
            and hasattr(getattr(kernel, "shell_stream", None), "on_recv")
            and callable(getattr(kernel, "shell_channel_thread_main", None))
        )
        return cls(kernel, look) if has_parts else None

    async def _receive(self, frames: Any) -> None:
        if self._is_open:
            self._look(frames)
        await self._kernel.shell_channel_thread_main(frames)

    def pump(self) -> None:
        """Nothing: the thread looks by itself."""

    def close(self) -> None:
        """Give the stream its own callback back. Until the thread has done so, ours only passes messages on."""
        self._is_open = False
        stream = self._kernel.shell_stream

        def restore() -> None:
            if getattr(stream, "_recv_callback", self._receive) == self._receive:
                stream.on_recv(self._kernel.shell_channel_thread_main, copy=False)

        self._loop.add_callback(restore)


class _QueueTap:
    """ipykernel 6: the kernel's queue of messages, filled by asking the shell stream from the waiting main thread."""

    def __init__(self, kernel: Any, look: Callable[[Any], None]) -> None:
        self._kernel = kernel
        self._look = look
        self._newest = -1

    @classmethod
    def fitting(cls, kernel: Any, look: Callable[[Any], None]) -> _QueueTap | None:
        """The tap, if this kernel has such a queue."""
        queue = getattr(getattr(kernel, "msg_queue", None), "_queue", None)
        has_parts = hasattr(queue, "__iter__") and callable(
            getattr(getattr(kernel, "shell_stream", None), "flush", None)
        )
        return cls(kernel, look) if has_parts else None

    def pump(self) -> None:
        """Take what has arrived into the queue, in order, and look at what is new there."""
        if threading.current_thread() is not threading.main_thread():
            return
        with _interrupt_deferred():
            self._kernel.shell_stream.flush(_POLLIN)
        for entry in list(self._kernel.msg_queue._queue):
            if not (isinstance(entry, tuple) and len(entry) == 3 and isinstance(entry[0], int)):
                continue
            number, _, arguments = entry
            if number > self._newest:
                self._newest = number
                if arguments and isinstance(arguments[0], list):
                    self._look(arguments[0])

    def close(self) -> None:
        """Nothing was replaced."""


class _ControlDoor:
    """ipykernel 6 and 7: one more type of message on the control channel, which is read in a thread of its own."""

    message_type = "kani_nb_comm_msg"

    def __init__(self, kernel: Any, hear: Callable[[Mapping[str, Any]], None]) -> None:
        self._handlers: dict[str, Any] = kernel.control_handlers
        self._hear = hear
        self._handlers[self.message_type] = self._receive

    @classmethod
    def fitting(cls, kernel: Any, hear: Callable[[Mapping[str, Any]], None]) -> _ControlDoor | None:
        """The door, if this kernel has a table of what it understands there, and a thread that reads it."""
        has_parts = isinstance(getattr(kernel, "control_handlers", None), dict) and (
            getattr(kernel, "control_thread", None) is not None
        )
        return cls(kernel, hear) if has_parts else None

    async def _receive(self, _stream: Any, _idents: Any, message: Mapping[str, Any]) -> None:
        content = message.get("content")
        if isinstance(content, Mapping):
            self._hear(content)

    def close(self) -> None:
        """Take the message's type out again."""
        if self._handlers.get(self.message_type) == self._receive:
            del self._handlers[self.message_type]


#: zmq.POLLIN, without importing zmq.
_POLLIN = 1


@contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Let no KeyboardInterrupt fall between a message's receipt and its queueing: it would be lost."""
    arrived: list[FrameType | None] = []
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):
        yield
        return
    signal.signal(signal.SIGINT, lambda _signal, frame: arrived.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if arrived:
        previous(signal.SIGINT, arrived[0])
