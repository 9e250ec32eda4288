"""A Hugging Face Hub on loopback that can be pushed to: accounts, repositories with commits, files by their sha256.

It answers what the Hub's own library asks when it makes a repository, uploads a folder and downloads it again, and
refuses as the Hub does: 401 without a known token, 403 without the right, 404, 409, 422 for bytes that are others than
were announced. Everything else is answered 501, so that a request nobody thought of fails the test.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Account:
    """A token's owner, and whether the token may write."""

    name: str
    may_write: bool = True
    organizations: tuple[str, ...] = ()


@dataclass
class Commit:
    """One commit: its id, its message, and every file at that point."""

    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class PushedRepo:
    """A repository; the first commit is the empty one that making it leaves."""

    is_private: bool
    commits: list[Commit] = field(default_factory=lambda: [Commit("0" * 40, "initial commit", {})])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files


@dataclass
class Asked:
    """One request as it came in."""

    method: str
    path: str
    authorization: str | None


class PushHub:
    """Listens on 127.0.0.1 until closed.

    Attributes:
        failures: beginning of a path -> status codes with which the next requests there are answered; 0 hangs up in
            the middle of the body.
    """

    def __init__(self, accounts: dict[str, Account]) -> None:
        self.accounts = accounts
        self.repos: dict[str, PushedRepo] = {}
        self.large_files: dict[str, bytes] = {}
        self.announced: dict[str, int] = {}
        self.asked: list[Asked] = []
        self.failures: dict[str, list[int]] = {}
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _RefusedError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


class _Handler(BaseHTTPRequestHandler):
    hub: PushHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.asked.append(Asked(self.command, path, self.headers.get("Authorization")))
        body = b""
        try:
            self.fail_as_told(path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            for method, pattern, handle in _ROUTES:
                if (match := re.fullmatch(pattern, path)) and self.command in method:
                    with self.hub.lock:
                        handle(self, body, *match.groups())
                    return
            raise _RefusedError(501, message=f"nobody thought of {self.command} {path}")
        except _RefusedError as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.reply({"error": refused.message}, refused.status, {k: v for k, v in headers.items() if v})

    def fail_as_told(self, path: str) -> None:
        for start, codes in self.hub.failures.items():
            if path.startswith(start) and codes:
                code = codes.pop(0)
                self.close_connection = True
                if code == 0:
                    self.rfile.read(1000)
                    self.connection.close()
                    raise _RefusedError(0)
                raise _RefusedError(code, message="not now")

    def reply(self, record: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if status:
            self.send(json.dumps(record).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def account(self) -> Account:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.accounts:
            raise _RefusedError(401, message="Invalid username or password.")
        return self.hub.accounts[token]

    def may_write(self, owner: str) -> None:
        account = self.account()
        if not account.may_write or owner not in (account.name, *account.organizations):
            raise _RefusedError(403, message=f"You don't have the rights to write to {owner}")

    def repo(self, name: str) -> PushedRepo:
        repo = self.hub.repos.get(name)
        if repo is None:
            raise _RefusedError(404, "RepoNotFound", "Repository not found")
        if repo.is_private:
            self.account()
        return repo

    def whoami(self, body: bytes) -> None:
        account = self.account()
        role = "write" if account.may_write else "read"
        organizations = [{"name": each} for each in account.organizations]
        self.reply(
            {"name": account.name, "type": "user", "orgs": organizations, "auth": {"accessToken": {"role": role}}}
        )

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        owner = asked.get("organization") or self.account().name
        self.may_write(owner)
        name = f"{owner}/{asked['name']}"
        record = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repos:
            self.reply(record | {"error": "You already created this model repo"}, 409)
            return
        is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.repos[name] = PushedRepo(is_private)
        self.reply(record)

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        self.may_write(name.partition("/")[0])
        self.repo(name)
        files = []
        for asked in json.loads(body)["files"]:
            is_large = asked["size"] > 10_000_000 or asked["path"].endswith(".safetensors")
            mode = "lfs" if is_large else "regular"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        self.reply({"files": files})

    def batch(self, body: bytes, name: str) -> None:
        self.may_write(name.partition("/")[0])
        objects = []
        for asked in json.loads(body)["objects"]:
            record: dict[str, Any] = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large_files:
                self.hub.announced[asked["oid"]] = asked["size"]
                record["actions"] = {"upload": {"href": f"{self.hub.url}/storage/{asked['oid']}"}}
            objects.append(record)
        self.reply({"transfer": "basic", "objects": objects})

    def store(self, body: bytes, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise _RefusedError(400, message="the store of large files has addresses that need no token")
        if self.hub.announced.get(oid) != len(body) or hashlib.sha256(body).hexdigest() != oid:
            raise _RefusedError(422, message="other bytes than were announced")
        self.hub.large_files[oid] = body
        self.reply({})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        self.may_write(name.partition("/")[0])
        repo = self.repo(name)
        files, message = dict(repo.files), ""
        for line in body.splitlines():
            record = json.loads(line)
            value = record["value"]
            match record["key"]:
                case "header":
                    message = value["summary"]
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.hub.large_files:
                        raise _RefusedError(422, message=f"{value['path']} was never uploaded")
                    files[value["path"]] = self.hub.large_files[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
                case other:
                    raise _RefusedError(422, message=f"no operation {other}")
        sha = hashlib.sha1(repr(sorted(files.items())).encode() + repo.commits[-1].sha.encode()).hexdigest()
        repo.commits.append(Commit(sha, message, files))
        page = f"{self.hub.url}/{name}/commit/{sha}"
        self.reply({"success": True, "commitOid": sha, "commitUrl": page, "pullRequestUrl": None})

    def info(self, body: bytes, name: str, revision: str | None) -> None:
        repo = self.repo(name)
        siblings = []
        for path, content in repo.files.items():
            record: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": _git_id(content)}
            if path.endswith(".safetensors"):
                record["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            siblings.append(record)
        sha = repo.commits[-1].sha
        self.reply({"id": name, "modelId": name, "sha": sha, "private": repo.is_private, "siblings": siblings})

    def tree(self, body: bytes, name: str, revision: str, folder: str | None) -> None:
        files = self.repo(name).files.items()
        self.reply([{"type": "file", "oid": _git_id(held), "size": len(held), "path": path} for path, held in files])

    def file(self, body: bytes, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        headers = {"X-Repo-Commit": repo.commits[-1].sha}
        if path not in repo.files:
            self.reply({"error": "Entry not found"}, 404, headers | {"X-Error-Code": "EntryNotFound"})
            return
        content, status = repo.files[path], 200
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        self.send(content, status, headers)


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"([^/]+/[^/]+)"
_ROUTES = (
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/storage/([0-9a-f]{64})", _Handler.store),
    (("POST",), rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (("GET",), rf"/api/models/{_NAME}/tree/([^/]+)(/.*)?", _Handler.tree),
    (("GET",), rf"/api/models/{_NAME}(?:/revision/([^/]+))?", _Handler.info),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.file),
)
