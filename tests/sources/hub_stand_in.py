"""A Hugging Face Hub on loopback: repositories in memory, ranges, gates, and connections that break when told to."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Seen:
    """One request as it came in."""

    method: str
    path: str
    offset: int
    authorization: str | None
    sent_bytes: int = 0


@dataclass
class Repo:
    """One repository. `error` answers for it, `file_error` for its files: (status, X-Error-Code, how many times)."""

    files: dict[str, bytes]
    error: tuple[int, str, int] | None = None
    file_error: tuple[int, str, int] | None = None
    sizes: bool = True
    cut_at: dict[str, int] = field(default_factory=dict)
    cuts_left: int = 1000
    stall_at: dict[str, int] = field(default_factory=dict)
    altered: dict[str, bytes] = field(default_factory=dict)


class HubStandIn:
    """Listens on 127.0.0.1 until closed."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.seen: list[Seen] = []
        self.released = threading.Event()
        self.on_stall: Callable[[], None] = lambda: None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop listening and let every stalled connection go."""
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files_asked(self, name: str) -> list[Seen]:
        """The downloads of one file, in order."""
        return [each for each in self.seen if each.method == "GET" and each.path.endswith(f"/{name}")]


def _blob_record(path: str, body: bytes, *, sizes: bool) -> dict[str, Any]:
    if not sizes:
        return {"rfilename": path}
    git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    record: dict[str, Any] = {"rfilename": path, "size": len(body), "blobId": git}
    if path.endswith((".safetensors", ".bin")):
        record["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return record


def _handler(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:  # noqa: C901 - one class in a closure
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            offset = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            self.record = Seen(self.command, path, offset, self.headers.get("Authorization"))
            hub.seen.append(self.record)
            if path.startswith("/api/models/"):
                name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
                self.info(name, revision or "main")
            elif "/resolve/" in path:
                name, _, rest = path.strip("/").partition("/resolve/")
                self.file(name, rest.partition("/")[2])
            else:
                self.refuse(404, "")

        def refuse(self, status: int, code: str) -> None:
            body = b'{"error": "refused"}'
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if code:
                self.send_header("X-Error-Code", code)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refused(self, repo: Repo, what: str) -> bool:
            for name in ("error", what):
                error = getattr(repo, name)
                if error is not None and error[2] > 0:
                    setattr(repo, name, (error[0], error[1], error[2] - 1))
                    self.refuse(error[0], error[1])
                    return True
            return False

        def info(self, name: str, revision: str) -> None:
            repo = hub.repos.get(name)
            if repo is None:
                self.refuse(401 if self.record.authorization is None else 404, "RepoNotFound")
            elif revision not in ("main", "v1", COMMIT):
                self.refuse(404, "RevisionNotFound")
            elif not self.refused(repo, "error"):
                files = [_blob_record(path, body, sizes=repo.sizes) for path, body in repo.files.items()]
                body = json.dumps({"id": name, "sha": COMMIT, "siblings": files}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def file(self, name: str, path: str) -> None:
            repo = hub.repos[name]
            if self.refused(repo, "file_error"):
                return
            body = repo.altered.get(path, repo.files[path])
            start = self.record.offset
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "HEAD":
                return
            end = len(body)
            if path in repo.cut_at and repo.cuts_left:
                repo.cuts_left -= 1
                end = max(start, repo.cut_at[path])
            stall = repo.stall_at.get(path)
            if stall is not None and start < stall:
                self.send(body[start:stall])
                start = stall
                hub.on_stall()
                hub.released.wait(30)
            self.send(body[start:end])
            if end < len(body):
                self.close_connection = True

        def send(self, part: bytes) -> None:
            self.record.sent_bytes += len(part)  # before: the client may be done with it before we come back
            try:
                self.wfile.write(part)
                self.wfile.flush()
            except OSError:
                self.close_connection = True

    return Handler
