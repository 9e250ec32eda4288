"""Server-sent events from bytes, however they are cut: the form in which servers stream answers.

Follows the WHATWG's HTML standard, section 9.2.6, but for one thing: an event that the stream ends in is given too,
because some servers leave out the empty line after their last one. Nothing here opens a connection or reads JSON.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from typing import NamedTuple

from kani_nb.errors import GenerationError

#: Most bytes of one line, and of one event: a stream without line ends must not fill the memory.
MAX_EVENT_BYTES = 32 * 2**20

#: The type of a body that is no stream; no server's, which end at a line's end.
NO_EVENTS = "\n"
_BOM = "\ufeff".encode()


class ServerEvent(NamedTuple):
    """One event: its data's lines, and its type."""

    data: str
    event: str = "message"


class EventReader:
    """Takes bytes in pieces and gives the events that are whole. The events do not depend on how the bytes were cut."""

    def __init__(self) -> None:
        self._line = bytearray()
        self._lines: list[str] = []
        self._size = 0
        self._type = ""
        self._after_cr = False
        self._at_start = True

    def feed(self, piece: bytes) -> list[ServerEvent]:
        """The events that end in `piece`.

        Raises:
            GenerationError: a line or an event is longer than any server's.
        """
        events: list[ServerEvent] = []
        if self._after_cr and piece:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        ends_in_cr = piece.endswith(b"\r")
        *whole, rest = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in whole:
            self._line += line
            self._read_line(events)
        self._line += rest
        self._check(len(self._line))
        self._after_cr = ends_in_cr
        return events

    def end(self) -> list[ServerEvent]:
        """The event that the stream ended in, if any."""
        events: list[ServerEvent] = []
        if self._line:
            self._read_line(events)
        self._dispatch(events)
        return events

    def _read_line(self, events: list[ServerEvent]) -> None:
        raw = bytes(self._line)
        self._line.clear()
        if self._at_start:
            raw, self._at_start = raw.removeprefix(_BOM), False
        if not raw:
            self._dispatch(events)
            return
        # Only now, when the line is whole, are its characters.
        name, _, value = raw.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._size += len(raw)
            self._check(self._size)
            self._lines.append(value)
        elif name == "event":
            self._type = value

    def _dispatch(self, events: list[ServerEvent]) -> None:
        if self._lines:
            events.append(ServerEvent("\n".join(self._lines), self._type or "message"))
        self._lines, self._size, self._type = [], 0, ""

    def _check(self, size: int) -> None:
        if size > MAX_EVENT_BYTES:
            raise GenerationError(
                "the server's stream makes no sense", why=f"one event has more than {MAX_EVENT_BYTES / 2**20:.0f} MiB"
            )


def looks_like_events(start: bytes) -> bool | None:
    """Whether a body that begins so is a stream of events; None while nothing can be seen.

    Proxies and servers do not always say it in a header.
    """
    seen = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    return seen[:1] not in b"{[<" if seen else None


async def events_in(pieces: AsyncIterable[bytes], most_bytes: int) -> AsyncGenerator[ServerEvent]:
    """The events of a body; or, where it is no stream of any, all of it (up to about `most_bytes`) as one.

    That one has the type `NO_EVENTS`.

    Raises:
        GenerationError: as `EventReader.feed`.
    """
    reader, start, is_stream = EventReader(), bytearray(), None
    async for piece in pieces:
        if is_stream is None:  # nothing but space so far
            is_stream = looks_like_events(piece)
        if not is_stream:
            start += piece
            if len(start) > most_bytes:
                break
            continue
        for event in reader.feed(piece):
            yield event
    if start.strip():
        yield ServerEvent(start.decode("utf-8", "replace"), NO_EVENTS)
    for event in reader.end():
        yield event
