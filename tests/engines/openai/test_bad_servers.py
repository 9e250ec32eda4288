"""Servers that are down, slow, broken, hostile or without an end: each is a short error, or an answer all the same."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import aclosing

import pytest

from kani_nb.config import parse_config
from kani_nb.engines.base import FinishReason
from kani_nb.engines.httpclient.client import (
    AccessRefusedError,
    RateLimitError,
    ServerDownError,
    ServerError,
    ServerTimeoutError,
)
from kani_nb.engines.openai import OpenAIEngine
from kani_nb.errors import EngineError, GenerationError, KaniNbError, PromptTooLongError, UnknownModelError
from kani_nb.messages import ChatMessage
from tests.engines.openai.stand_in import CHAT, StandIn, delta, refuse, say

pytestmark = pytest.mark.usefixtures("no_pauses")

ASK = [ChatMessage.user("hello my dear world")]
KEY = "sk-proj-abcdefghijklmnop"


@pytest.fixture
async def engine(server):
    engine = OpenAIEngine(KEY, api_base=server.base)
    yield engine
    await engine.close()


async def fails(engine, kind, words, messages=ASK):
    """The error of one answer, which is short and shows no key; and the engine goes on."""
    with pytest.raises(kind, match=words) as caught:
        await engine.predict(messages)
    assert isinstance(caught.value, KaniNbError)
    assert len(str(caught.value)) < 700
    assert KEY not in str(caught.value) + repr(caught.value.__cause__) + repr(caught.value.__context__)
    return caught.value


async def test_one_that_is_down_is_said_with_its_address_and_how_to_start_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        engine = OpenAIEngine(api_base=f"http://127.0.0.1:{port}/v1")
        error = await fails(engine, ServerDownError, rf"nothing answers at http://127\.0\.0\.1:{port}/v1")
    assert f"vllm serve MODEL --port {port}" in str(error)
    await engine.close()


async def test_nothing_is_freed_for_one_that_is_down(server):
    """What `%load_engine` asks first, before it frees the engine that there is."""
    engine = OpenAIEngine(model="another", api_base=server.base)
    with pytest.raises(UnknownModelError):
        await engine.prepare()
    await engine.close()


async def test_one_that_is_slow_is_waited_for_and_one_that_is_silent_is_left(server):
    wait = threading.Event()
    engine = OpenAIEngine(api_base=server.base, timeout=0.2)

    def slow(exchange):
        exchange.begin()
        for number in range(6):
            wait.wait(0.05)
            exchange.event(delta(f"{number} "))
        exchange.event(delta(finish="stop"))
        exchange.end()

    server.plan(slow)  # in all longer than the limit, which is of the silence
    assert (await engine.predict(ASK)).message.text == "0 1 2 3 4 5 "
    server.plan(lambda exchange: wait.wait(20))
    await fails(engine, ServerTimeoutError, "not answered")
    wait.set()
    await engine.close()


def breaks(*pieces, how):
    def act(exchange):
        exchange.begin()
        for piece in pieces:
            exchange.write(piece)
        if how == "reset":
            exchange.reset()
        elif how == "end":
            exchange.end()
        else:  # the connection is closed without the last chunk
            exchange.close_connection = True

    return act


@pytest.mark.parametrize("how", ["reset", "closed", "end"])
async def test_an_answer_that_breaks_off_is_an_error_and_what_came_has_come(engine, server, how):
    server.plan(breaks('data: {"choices": [{"delta": {"content": "hel"}}]}\n\n', how=how))
    seen = []
    with pytest.raises(EngineError, match="in the middle of its answer"):
        async for event in engine.stream(ASK):
            seen.append(event)
    assert seen == ["hel"]
    assert len(server.asked()) == 1
    assert await engine.client.has_gone() is False
    assert (await engine.predict(ASK)).message.text == "hello my dear world"


@pytest.mark.parametrize("how", ["reset", "closed", "end"])
async def test_one_that_was_killed_in_the_middle_is_said_to_have_gone(how):
    with StandIn() as server:

        def dies(exchange):
            breaks('data: {"choices": [{"delta": {"content": "hel"}}]}\n\n', how="")(exchange)
            exchange.server.shutdown()
            exchange.server.server_close()
            if how != "closed":
                getattr(exchange, how)()

        server.plan(dies)
        engine = OpenAIEngine(api_base=server.base)
        error = await fails(engine, EngineError, "in the middle of its answer")
        assert "the server has gone" in error.why
        assert "ask again" not in error.fix
        assert f"--port {server.port}" in error.fix
        await engine.close()


@pytest.mark.parametrize("how", ["reset", "closed", "end"])
async def test_one_that_cannot_stream_is_asked_for_the_whole(engine, server, how):
    server.plan(breaks(how=how))
    assert (await engine.predict(ASK)).message.text == "hello my dear world"
    assert [each.body["stream"] for each in server.asked()] == [True, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('data: {"choices": [{"delta"', "not whole JSON"),
        ('data: {"choices": [{"delta"\n\n', "not whole JSON"),
        ("data: hello\n\n", "not whole JSON"),
        ("data: [1]\n\n", "not whole JSON"),
        ("data: " + "[" * 50_000 + "\n\n", "not whole JSON"),
        ('data: {"error": {"message": "CUDA out of memory"}}\n\n', "CUDA out of memory"),
        ('data: {"error": "it broke"}\n\n', "it broke"),
        ('data: {"object": "error", "message": "bad request", "code": 400}\n\n', "bad request"),
        ('event: error\ndata: {"message": "overloaded"}\n\n', "overloaded"),
        (f'data: {{"error": {{"message": "bad key {KEY}"}}}}\n\n', "bad key"),
    ],
    ids=["half at the end", "half", "text", "a list", "deep", "error", "error text", "vLLM", "error event", "key"],
)
async def test_nonsense_and_errors_within_a_stream_are_said(engine, server, text, words):
    server.plan(breaks('data: {"choices": [{"delta": {"content": "hel"}}]}\n\n', text, how="end"))
    await fails(engine, GenerationError, words)
    assert (await engine.predict(ASK)).message.text == "hello my dear world"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html><title>Log in</title></html>", r"an HTML page: .*Log in"),
        (b'{"choices": [{"message": {"con', "not whole JSON"),
        (b'{"choices": []}', "no answer"),
        (b'{"id": 1}', "no answer"),
        (b"", "no answer"),
    ],
    ids=["HTML", "half JSON", "no choices", "something else", "nothing"],
)
async def test_a_body_that_is_no_answer_is_said(engine, server, body, words):
    server.plan(*[lambda exchange: exchange.answer(200, body)] * 2)
    await fails(engine, EngineError, words)


@pytest.mark.parametrize("path", ["/v1/models", CHAT])
async def test_a_page_instead_of_the_api_is_said_when_it_is_loaded_or_used(server, path):
    server.usual[path] = lambda exchange: exchange.answer(200, b"<html><title>nginx</title>", kind="text/html")
    engine = OpenAIEngine(api_base=server.base)
    await fails(engine, ServerError, "an HTML page")
    await engine.close()


async def test_a_wrong_key_is_said_without_it(engine, server):
    said = {"error": {"message": f"Incorrect API key provided: {KEY}.", "code": "invalid_api_key"}}
    server.plan(refuse(401, said), path="/v1/models")
    error = await fails(engine, AccessRefusedError, "refused .401.")
    assert "the api_key argument" in str(error)
    await engine.load()
    server.plan(refuse(403, said))
    await fails(engine, AccessRefusedError, "refused .403.")


async def test_a_key_that_is_wanted_is_said_with_the_variable(server):
    server.plan(refuse(401, {"error": "Unauthorized"}), path="/v1/models")
    engine = OpenAIEngine(api_base=server.base)
    assert "KANI_NB_API_KEY" in str(await fails(engine, AccessRefusedError, "401"))
    await engine.close()


async def test_a_model_that_has_gone_is_said_with_those_that_are_there(server):
    engine = OpenAIEngine(api_base=server.base)
    await engine.load()
    server.models = ("tiny-2",)
    error = await fails(engine, UnknownModelError, "has no model 'tiny'")
    assert "tiny-2" in str(error)
    await engine.close()


async def test_too_many_requests_are_waited_out_or_said(engine, server):
    server.plan(*[refuse(429, {"error": {"message": "slow down"}}, {"Retry-After": "0"})] * 2)
    assert (await engine.predict(ASK)).message.text == "hello my dear world"
    server.plan(refuse(429, {"error": {"message": "slow down"}}, {"Retry-After": "999"}))
    await fails(engine, RateLimitError, "slow down")
    asked = len(server.asked())
    server.plan(refuse(429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}))
    await fails(engine, RateLimitError, "quota")
    assert len(server.asked()) == asked + 1


async def test_one_that_fails_is_tried_again_and_then_said(engine, server):
    server.plan(refuse(500, {"error": {"message": "oops"}}))
    assert (await engine.predict(ASK)).message.text == "hello my dear world"
    server.plan(*[refuse(500, b"<h1>Internal Server Error</h1>")] * 2)
    await fails(engine, ServerError, "500")


@pytest.mark.parametrize(
    ("status", "record"),
    [
        (400, {"error": {"message": "too much", "code": "context_length_exceeded"}}),
        (
            400,
            {
                "error": {
                    "message": "the request exceeds the available context size",
                    "type": "exceed_context_size_error",
                }
            },
        ),
        (400, {"object": "error", "message": "This model's maximum context length is 4 tokens."}),
        (500, {"error": {"message": "Requested tokens (9) exceed context window of 4"}}),
    ],
    ids=["OpenAI", "llama.cpp", "vLLM", "llama-cpp-python"],
)
async def test_a_prompt_that_a_server_finds_too_long_is_said_so(engine, server, status, record):
    server.plan(*[refuse(status, record)] * 2)
    await fails(engine, PromptTooLongError, "does not fit")


@pytest.mark.parametrize(
    "words",
    ["This model does not support images", "Unsupported value: 'temperature' does not support 0 with this model"],
)
async def test_what_a_model_cannot_do_is_said_in_the_servers_words(engine, server, words):
    server.plan(refuse(400, {"error": {"message": words}}))
    error = await fails(engine, ServerError, "400")
    assert words in str(error)


# -- without an end ----------------------------------------------------------------------------------------------------


def endless(*pieces):
    def act(exchange):
        exchange.begin()
        while True:
            for piece in pieces:
                exchange.event(piece)

    return act


@pytest.mark.parametrize(
    "piece",
    [delta("word "), delta("x" * 10_000), delta(""), delta(reasoning="hm "), {"choices": []}],
    ids=["words", "much at once", "nothing", "thoughts", "no choices"],
)
async def test_an_answer_without_an_end_is_left_at_its_limit(engine, server, piece):
    server.plan(endless(piece))
    completion = await engine.predict(ASK, max_new_tokens=10)
    assert completion.finish_reason is FinishReason.LENGTH
    assert len(completion.message.text) <= 10_000
    assert await asyncio.to_thread(server.hung_up.wait, 5)
    assert (await engine.predict(ASK)).message.text == "hello my dear world"


async def test_leaving_a_stream_hangs_up(engine, server):
    server.plan(endless(delta("word ")))
    async with aclosing(engine.stream(ASK, max_new_tokens=100_000, extra_body={"max_tokens": 1})) as events:
        async for _ in events:
            break
    assert await asyncio.to_thread(server.hung_up.wait, 5)


async def test_cancelling_hangs_up_while_the_server_still_thinks(engine, server):
    gone = threading.Event()

    def thinks(exchange):
        exchange.connection.settimeout(20)
        if exchange.connection.recv(1) == b"":
            gone.set()

    server.plan(thinks)
    call = asyncio.ensure_future(engine.predict(ASK))
    while not server.asked():
        await asyncio.sleep(0.01)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(gone.wait, 5)


async def test_closing_ends_an_answer_without_an_end(server):
    engine = OpenAIEngine(api_base=server.base)
    await engine.load()
    begun = threading.Event()

    def silent(exchange):
        exchange.begin()
        exchange.event(delta("word "))
        begun.set()
        threading.Event().wait(3)

    server.plan(silent)
    call = asyncio.ensure_future(engine.predict(ASK))
    await asyncio.to_thread(begun.wait, 5)
    await engine.close()
    with pytest.raises(GenerationError, match="was closed while it answered"):
        await asyncio.wait_for(call, 2)


async def test_an_answer_that_a_server_gave_up_for_another_is_not_taken_for_whole():
    with StandIn(owner="me") as server:
        server.usual["/extras/tokenize/count"] = lambda exchange: exchange.answer(200, {"count": 3})
        engine = OpenAIEngine(api_base=server.base)
        assert (await engine.predict(ASK)).message.text == "hello my dear world"
        server.plan(say(delta("hel")))  # and [DONE], as llama-cpp-python's server ends it
        await fails(engine, GenerationError, "gave this answer up")
        await engine.close()


async def test_such_a_servers_answers_come_one_after_the_other():
    with StandIn(owner="me", pause=0.02) as server:
        server.usual["/extras/tokenize/count"] = lambda exchange: exchange.answer(200, {"count": 3})
        running, most = 0, 0

        def counted(exchange):
            nonlocal running, most
            running += 1
            most = max(most, running)
            server.chat(exchange)
            running -= 1

        server.usual[CHAT] = counted
        engine = OpenAIEngine(api_base=server.base)
        answers = await asyncio.gather(*(engine.predict([ChatMessage.user(text)]) for text in ("a b", "c d", "e f")))
        assert [each.message.text for each in answers] == ["a b", "c d", "e f"]
        assert most == 1
        await engine.close()


def test_a_conversation_goes_on_after_a_broken_answer_and_its_numbers_are_the_servers(clean_runtime):
    with StandIn() as server:
        chat = clean_runtime.chat
        engine = clean_runtime.use(OpenAIEngine.from_config(parse_config(f"vllm:{server.base}")))
        server.plan(breaks('data: {"choices": [{"delta": {"content": "hel"}}]}\n\n', how="reset"))
        with pytest.raises(EngineError, match="broke off"):
            chat.ask_sync("hello there")
        reply = chat.ask_sync("hello again")
        assert reply.text == "hello again"
        metrics = reply.metrics
        assert (metrics.prompt_tokens, metrics.cached_tokens, metrics.completion_tokens) == (3, 3, 2)
        clean_runtime.loop.run_sync(engine.close())
