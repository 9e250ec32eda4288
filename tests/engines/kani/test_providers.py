"""kani's engines for Anthropic and OpenAI, with the providers' packages, against a server here that answers as theirs.

Run where those packages are installed; they are none of ours.
"""

from __future__ import annotations

import json
import threading
from contextlib import aclosing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kani_nb import ChatMessage
from kani_nb.engines.base import FinishReason
from kani_nb.engines.kani_adapter import KaniEngine
from kani_nb.errors import GenerationError
from kani_nb.functions import ai_function
from kani_nb.messages import FunctionCall

pytest.importorskip("kani", reason="these are engines of the kani package: pip install 'kani>=1.10'")

KEY = "sk-test-0123456789abcdefghij"


@pytest.fixture
def server():
    """A server on loopback: `replies` are its next bodies (a status, or events), `asked` what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.server.asked.append((self.path, body))
            if self.path.endswith("/count_tokens"):
                return self.send_json(200, {"input_tokens": 21})
            reply = self.server.replies.pop(0)
            if isinstance(reply, int):
                return self.send_json(reply, {"error": {"type": "x", "message": f"not with {KEY}"}})
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            for event in reply:
                if isinstance(event, threading.Event):
                    event.wait(20)
                    continue
                name = f"event: {event['type']}\n" if "type" in event else ""
                self.wfile.write(f"{name}data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
            self.close_connection = True
            return None

        def send_json(self, status, record):
            data = json.dumps(record).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.asked, made.replies, made.daemon_threads = [], [], True
        made.address = f"http://127.0.0.1:{made.server_address[1]}"
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def anthropic_events(*blocks, stop="end_turn"):
    empty = {"id": "m", "type": "message", "role": "assistant", "model": "x", "content": [], "stop_sequence": None}
    yield {
        "type": "message_start",
        "message": {**empty, "stop_reason": None, "usage": {"input_tokens": 21, "output_tokens": 1}},
    }
    for index, (block, *deltas) in enumerate(blocks):
        yield {"type": "content_block_start", "index": index, "content_block": block}
        for delta in deltas:
            yield (
                delta
                if isinstance(delta, threading.Event)
                else {
                    "type": "content_block_delta",
                    "index": index,
                    "delta": delta,
                }
            )
        yield {"type": "content_block_stop", "index": index}
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": stop, "stop_sequence": None},
        "usage": {"output_tokens": 9},
    }
    yield {"type": "message_stop"}


def said(*pieces):
    deltas = [each if isinstance(each, threading.Event) else {"type": "text_delta", "text": each} for each in pieces]
    return ({"type": "text", "text": ""}, *deltas)


THOUGHT = (
    {"type": "thinking", "thinking": "", "signature": ""},
    {"type": "thinking_delta", "thinking": "hm"},
    {"type": "signature_delta", "signature": "signed"},
)
CALLED = (
    {"type": "tool_use", "id": "toolu_1", "name": "ship_age", "input": {}},
    {"type": "input_json_delta", "partial_json": '{"name": "Alma"}'},
)


@ai_function
def ship_age(name: str) -> int:
    """How old a ship is."""
    return 41


@pytest.fixture
def claude(server):
    engines = pytest.importorskip("kani.engines.anthropic", exc_type=Exception, reason="needs anthropic")
    return KaniEngine(
        lambda: engines.AnthropicEngine(KEY, "x", 2048, 9000, api_base=server.address, retry=0), name="claude"
    )


async def test_claude_thinks_calls_a_function_and_is_given_its_thinking_back(server, claude):
    server.replies = [
        list(anthropic_events(THOUGHT, said("I look ", "it up."), CALLED, stop="tool_use")),
        list(anthropic_events(said("She is 41."))),
    ]
    talk = [ChatMessage.system("Be brief."), ChatMessage.user("How old is the Alma?")]
    events = [event async for event in claude.stream(talk, [ship_age], max_new_tokens=300, stop="\n\n")]
    assert [str(each) for each in events if isinstance(each, str)] == ["I look ", "it up."]
    completion = events[-1]
    message = completion.message
    assert (message.text, message.reasoning) == ("I look it up.", "hm")
    assert (completion.prompt_tokens, completion.completion_tokens) == (21, 9)
    assert completion.finish_reason is FinishReason.TOOL_CALLS
    assert message.tool_calls[0].function == FunctionCall("ship_age", '{"name": "Alma"}')
    path, body = server.asked[-1]
    assert (path, body["max_tokens"], body["stop_sequences"]) == ("/v1/messages", 300, ["\n\n"])
    assert body["tools"][0]["name"] == "ship_age"

    saved = ChatMessage.from_dict(json.loads(json.dumps(message.to_dict())))
    answer = await claude.predict([*talk, saved, ChatMessage.function("ship_age", "41", "toolu_1")], [ship_age])
    assert answer.message.text == "She is 41."
    given_back = server.asked[-1][1]["messages"][1]["content"]
    assert given_back[0] == {"type": "thinking", "thinking": "hm", "signature": "signed"}
    assert server.asked[-1][1]["max_tokens"] == 2048, "the engine's own limit, where nobody set another"
    await claude.close()


async def test_a_stalled_provider_is_left_at_once_and_asked_again(server, claude):
    never = threading.Event()
    server.replies = [list(anthropic_events(said("Hi", never, "there"))), list(anthropic_events(said("Again.")))]
    async with aclosing(claude.stream([ChatMessage.user("Hi")])) as events:
        async for event in events:
            if event == "Hi":
                break
    assert (await claude.predict([ChatMessage.user("Hi")])).message.text == "Again."
    never.set()
    await claude.close()
    server.replies = [list(anthropic_events(said("A new client.")))]
    assert (await claude.predict([ChatMessage.user("Hi")])).message.text == "A new client."
    await claude.close()


@pytest.mark.parametrize("status", [401, 404, 429, 500])
async def test_a_refusal_of_the_provider_is_told_without_the_key(server, claude, status):
    server.replies = [status]
    with pytest.raises(GenerationError, match="claude failed") as caught:
        await claude.predict([ChatMessage.user("Hi")])
    assert KEY not in str(caught.value)
    assert str(status) in str(caught.value)
    await claude.close()


class Words:
    """A tokenizer that needs no download."""

    def encode(self, text):
        return text.split()


async def test_openai_streams_and_is_told_the_limit_under_its_name(server):
    engines = pytest.importorskip("kani.engines.openai", exc_type=Exception, reason="needs openai")
    choice = {"index": 0, "finish_reason": None}
    common = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "x"}
    server.replies = [
        [
            {**common, "choices": [{**choice, "delta": {"role": "assistant", "content": "Hello"}}]},
            {**common, "choices": [{**choice, "delta": {"content": " there"}}]},
            {**common, "choices": [], "usage": {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10}},
        ]
    ]
    engine = KaniEngine(
        lambda: engines.OpenAIEngine(
            KEY,
            "x",
            100,
            api_type="chat_completions",
            api_base=f"{server.address}/v1",
            retry=0,
            tokenizer=Words(),
        )
    )
    answer = await engine.predict([ChatMessage.user("Hi")], max_new_tokens=7, seed=3)
    assert answer.message.text == "Hello there"
    assert (answer.prompt_tokens, answer.completion_tokens) == (8, 2)
    path, body = server.asked[-1]
    assert path == "/v1/chat/completions"
    assert (body["max_tokens"], body["seed"], body["stream"]) == (7, 3, True)
    await engine.close()
