"""A real HTTP server on loopback that serves files well and badly, for the tests of attachments."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FileServer:
    """What is served, by path: `(type, content)`; and what was asked.

    Paths that begin with these do something else: `/redirect/N` (N more of them, then `/done.png`), `/loop`,
    `/to?ADDRESS`, `/status/CODE`, `/silent` (headers only, until the test ends), `/endless` (no length, no end),
    `/reset`, `/short`.
    """

    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)
    sent_bytes: int = 0
    url: str = ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, served: FileServer) -> None:
        self.served = served
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, *_: object) -> None:
        """Clients go away, as they should."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        served = self.server.served
        served.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        path, _, query = self.path.partition("?")
        first, _, last = path[1:].partition("/")
        self.close_connection = True
        if first in ("redirect", "loop", "to"):
            self.go_to({"redirect": _next(last), "loop": "/loop", "to": query}[first])
        elif first in ("silent", "endless", "reset", "short"):
            getattr(self, first)()
        elif first == "status":
            self.whole(int(last), "text/html", b"<html>sorry</html>")
        elif path in served.files:
            self.whole(200, *served.files[path])
        else:
            self.whole(404, "text/html", b"<html>not here</html>")

    def whole(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        if kind:
            self.send_header("content-type", kind)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(content)

    def go_to(self, address: str) -> None:
        self.send_response(302)
        self.send_header("location", address)
        self.send_header("set-cookie", "session=secret; Path=/")
        self.send_header("content-length", "0")
        self.end_headers()

    def begin(self, length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("content-type", "image/png")
        if length is not None:
            self.send_header("content-length", str(length))
        self.end_headers()
        self.wfile.write(b"\x89PNG\r\n\x1a\n")
        self.wfile.flush()

    def silent(self) -> None:
        self.begin(1000)
        self.server.served.reached.set()
        self.server.served.released.wait(60)

    def endless(self) -> None:
        self.begin()
        with contextlib.suppress(OSError):
            while not self.server.served.released.is_set():
                self.server.served.sent_bytes += self.wfile.write(b"\0" * 4096)

    def reset(self) -> None:
        self.begin(1000)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def short(self) -> None:
        self.begin(1000)


def _next(left: str) -> str:
    return f"/redirect/{int(left) - 1}" if left.isdecimal() and int(left) else "/done.png"


@contextlib.contextmanager
def serving() -> Iterator[FileServer]:
    """A server that runs until the block ends."""
    served = FileServer()
    with _Server(served) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield served
        finally:
            served.released.set()
            server.shutdown()
            thread.join()


def make_png(width: int = 4, height: int = 3, color: str = "red", mode: str = "RGB") -> bytes:
    """A small picture."""
    return encoded("PNG", width, height, color, mode)


def encoded(name: str, width: int = 4, height: int = 3, color: str = "red", mode: str = "RGB") -> bytes:
    """A picture in one of Pillow's formats."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new(mode, (width, height), color).save(file, format=name)
    return file.getvalue()


def noise_png(side: int) -> bytes:
    """A picture that cannot be made small."""
    import io
    import random

    from PIL import Image

    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(3).randbytes(side * side * 3)).save(file, format="PNG")
    return file.getvalue()
