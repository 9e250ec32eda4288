"""A server with OpenAI's chat API on 127.0.0.1: it answers like an echo, and plays every kind of bad server.

It counts its tokens (words) and keeps its limits as vLLM does. What it is asked is kept in `requests`; what it shall
do instead of answering is put into `plan`. Everything goes over real sockets.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CHAT = "/v1/chat/completions"


@dataclass
class Request:
    method: str
    path: str
    headers: dict
    body: dict | None = field(default=None)


class Exchange(BaseHTTPRequestHandler):
    """One connection; a plan is called with it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # pieces go out at once, as from real servers

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except (ConnectionError, ValueError):
            self.close_connection = True

    def do_GET(self):
        stand_in = self.server.stand_in
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        self.asked = Request(self.command, self.path, dict(self.headers.items()), json.loads(body) if body else None)
        stand_in.requests.append(self.asked)
        path = self.path.partition("?")[0]
        plans = stand_in.plans.get(path)
        act = plans.popleft() if plans else stand_in.usual.get(path, not_found)
        try:
            act(self)
        except (BrokenPipeError, ConnectionResetError):
            stand_in.hung_up.set()
            self.close_connection = True

    do_POST = do_GET  # noqa: N815

    def answer(self, status, record, headers=(), kind="application/json"):
        body = record if isinstance(record, bytes) else json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def begin(self, kind="text/event-stream"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def write(self, data):
        data = data.encode() if isinstance(data, str) else data
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def event(self, record):
        self.write(f"data: {record if isinstance(record, str) else json.dumps(record)}\n\n")

    def end(self):
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def reset(self):
        """End the connection as a machine does that loses its power."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def delta(text=None, finish=None, **more):
    piece = {"content": text, **more} if text is not None else more
    return {"choices": [{"index": 0, "delta": piece, "finish_reason": finish}]}


def not_found(exchange):
    exchange.answer(404, {"detail": "Not Found"})


def refuse(status, record, headers=()):
    return lambda exchange: exchange.answer(status, record, headers)


def say(*events, done=True):
    """These events, whatever was asked."""

    def act(exchange):
        exchange.begin()
        for event in events:
            exchange.event(event)
        if done:
            exchange.event("[DONE]")
        exchange.end()

    return act


def tokens_of(messages):
    total = 0
    for message in messages:
        content = message.get("content") or ""
        text = content if isinstance(content, str) else "".join(each.get("text", "") for each in content)
        total += 1 + len(text.split())
    return total


class StandIn:
    """The server, from `with` to its end."""

    def __init__(self, *, owner="vllm", models=("tiny",), context=400, pause=0.0):
        self.requests = []
        self.plans = {}
        self.hung_up = threading.Event()
        self.models, self.owner, self.context, self.pause = models, owner, context, pause
        self.usual = {"/v1/models": self.list_models, CHAT: self.chat, "/tokenize": self.tokenize}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Exchange)
        self._server.daemon_threads = True
        self._server.stand_in = self
        self.port = self._server.server_port
        self.root = f"http://127.0.0.1:{self.port}"
        self.base = f"{self.root}/v1"

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def plan(self, *acts, path=CHAT):
        self.plans.setdefault(path, deque()).extend(acts)

    def asked(self, path=CHAT):
        return [each for each in self.requests if each.path.partition("?")[0] == path]

    def list_models(self, exchange):
        context = {"max_model_len": self.context} if self.owner == "vllm" else {}
        exchange.answer(200, {"data": [{"id": name, "owned_by": self.owner, **context} for name in self.models]})

    def tokenize(self, exchange):
        exchange.answer(200, {"count": tokens_of(exchange.asked.body["messages"]), "max_model_len": self.context})

    def chat(self, exchange):
        body = exchange.asked.body
        if body["model"] not in self.models:
            wrong = {"message": f"The model `{body['model']}` does not exist.", "code": 404}
            exchange.answer(404, {"error": wrong})
            return
        prompt_tokens = tokens_of(body["messages"])
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or 16
        if prompt_tokens + limit > self.context:
            words = f"This model's maximum context length is {self.context} tokens."
            exchange.answer(400, {"error": {"message": words, "type": "BadRequestError", "code": 400}})
            return
        content = body["messages"][-1].get("content") or ""
        text = content if isinstance(content, str) else "".join(each.get("text", "") for each in content)
        words = re.findall(r"\s*\S+", text)
        said = words[:limit]
        finish = "length" if len(words) > limit else "stop"
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(said)}
        usage["prompt_tokens_details"] = {"cached_tokens": min(3, prompt_tokens)}
        if not body.get("stream"):
            message = {"role": "assistant", "content": "".join(said)}
            exchange.answer(200, {"choices": [{"message": message, "finish_reason": finish}], "usage": usage})
            return
        exchange.begin()
        exchange.event(delta("", role="assistant"))
        for word in said:
            time.sleep(self.pause)
            exchange.event(delta(word))
        exchange.event(delta(finish=finish))
        if (body.get("stream_options") or {}).get("include_usage"):
            exchange.event({"choices": [], "usage": usage})
        exchange.event("[DONE]")
        exchange.end()
