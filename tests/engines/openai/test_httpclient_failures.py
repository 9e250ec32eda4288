"""BaseClient with bad servers: each failure is a short error, and no secret is in it, behind it, or in the log."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kani_nb.engines.httpclient.client import (
    AccessRefusedError,
    ServerDownError,
    ServerError,
    ServerTimeoutError,
)
from kani_nb.errors import ConfigError, EngineError, GatedModelError, ModelUnavailableError
from tests.engines.openai.stand_in import StandIn, refuse

pytestmark = pytest.mark.usefixtures("no_pauses")

KEY = "key-1234567890-secret"
PARAMETER = "abc+def/123"


async def test_where_nothing_listens_is_said_with_the_address(make):
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port meanwhile
        taken.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        client = make(base)
        with pytest.raises(ServerDownError, match=r"nothing answers at http://127\.0\.0\.1") as caught:
            await client.get("/x")
    assert isinstance(caught.value, ModelUnavailableError)
    await client.close()


async def test_https_where_only_http_is_spoken_is_said_with_the_right_address(make, server):
    client = make(f"https://127.0.0.1:{server.port}/v1")
    with pytest.raises(ServerDownError, match="nothing speaks https") as caught:
        await client.get("/x")
    assert caught.value.fix == f"did you mean http://127.0.0.1:{server.port}/v1?"
    await client.close()


async def test_a_silent_server_is_left(make, server):
    import threading

    wait = threading.Event()
    server.plan(lambda exchange: wait.wait(20), path="/echo")
    client = make(timeout=0.05)
    with pytest.raises(ServerTimeoutError, match="not answered"):
        await client.get("/echo")
    assert len(server.asked("/echo")) == 1  # it may still be at work
    wait.set()
    await client.close()


async def test_a_server_that_falls_silent_in_the_middle_is_left(make, server):
    import threading

    wait = threading.Event()

    def falls_silent(exchange):
        exchange.begin()
        exchange.event("one")
        wait.wait(20)

    server.plan(falls_silent, path="/echo")
    client = make(timeout=0.1)
    with pytest.raises(ServerTimeoutError, match="fell silent"):
        async for _ in client.stream_sse("/echo"):
            pass
    wait.set()
    await client.close()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<!doctype html><title>Log in</title><body>", "an HTML page"),
        (b'{"a": 1, "b": [', "not whole JSON"),
        (b"hello", "not whole JSON"),
        (b"", "nothing"),
        (b"[" * 100_000, "not whole JSON"),
        (b"1" * 10_000, "not whole JSON"),
    ],
    ids=["HTML", "half", "text", "nothing", "deep", "long number"],
)
async def test_what_is_not_json_is_said_in_a_short_sentence(client, server, body, words):
    server.plan(lambda exchange: exchange.answer(200, body, kind="text/html"), path="/echo")
    with pytest.raises(ServerError, match=words) as caught:
        await client.get("/echo")
    assert len(str(caught.value)) < 500
    assert str(caught.value).count("\n") == 1


async def test_a_body_that_is_not_encoded_as_it_says_is_an_error(client, server):
    for headers in ({"Content-Encoding": "gzip"}, {"Content-Type": "text/plain; charset=none-such"}):
        server.plan(lambda exchange, headers=headers: exchange.answer(200, b"hello", headers, kind="x/y"), path="/echo")
        with pytest.raises(ServerError):
            await client.get("/echo")


async def test_a_body_without_an_end_is_left(client, server, monkeypatch):
    monkeypatch.setattr("kani_nb.engines.httpclient.client.MAX_BODY_BYTES", 10_000)

    def endless(exchange):
        exchange.begin("application/json")
        while True:
            exchange.write(b"1" * 1000)

    server.plan(endless, path="/echo")
    with pytest.raises(ServerError, match="too much"):
        await client.get("/echo")
    await asyncio.to_thread(server.hung_up.wait, 5)
    assert server.hung_up.is_set()


async def test_what_cannot_be_sent_is_refused_first(client, server):
    with pytest.raises(ConfigError, match="cannot be sent as JSON"):
        await client.post("/echo", json={"a": float("nan")})
    with pytest.raises(ConfigError, match="X-Key") as caught:
        await client.get("/echo", headers={"X-Key": "schlüssel"})
    assert "schl" not in str(caught.value)
    assert not server.requests


async def test_closing_ends_what_waits(make, server):
    import threading

    wait = threading.Event()
    server.plan(lambda exchange: wait.wait(20), path="/echo")
    client = make()
    call = asyncio.ensure_future(client.get("/echo"))
    while not server.asked("/echo"):
        await asyncio.sleep(0.01)
    await client.close()
    with pytest.raises(ServerError, match="given up"):
        await asyncio.wait_for(call, 5)
    wait.set()


# -- secrets -----------------------------------------------------------------------------------------------------------


def everything_said(error):
    """All that an error shows or holds: its text, its causes, and everything that these can be asked for."""
    texts = [str(error), repr(error), repr(vars(error)), "".join(traceback.format_exception(error))]
    for other in (error.__cause__, error.__context__):
        if other is not None:
            texts.append(everything_said(other))
            request = getattr(other, "request", None)
            texts.append(repr(dict(request.headers)) if request is not None else "")
    return "\n".join(texts)


def echo_everything(exchange):
    asked = exchange.asked
    said = json.dumps({"error": {"message": f"bad {asked.path} {asked.headers}", "code": KEY}})
    exchange.answer(401, said.encode())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500])
async def test_a_key_that_a_server_repeats_is_not_shown(make, server, status, caplog):
    caplog.set_level(logging.DEBUG)
    said = f"no such key: Bearer {KEY}, {KEY[:8]}, {json.dumps(KEY)}"
    server.plan(*[refuse(status, {"error": {"message": said, "code": KEY}})] * 5, path="/echo")
    client = make(headers={"Authorization": f"Bearer {KEY}"})
    with pytest.raises(EngineError) as caught:
        await client.get("/echo")
    assert KEY not in everything_said(caught.value) + repr(client) + caplog.text
    assert "[secret]" in str(caught.value)
    await client.close()


async def test_credentials_and_tokens_of_an_address_are_sent_and_not_shown(make, server):
    base = f"http://someone:pass%2Fword@127.0.0.1:{server.port}?token=q-token-42&v=1"
    client = make(base)
    server.plan(echo_everything, path="/echo")
    with pytest.raises(AccessRefusedError) as caught:
        await client.get("/echo")
    asked = server.asked("/echo")[0]
    assert asked.headers["Authorization"].startswith("Basic ")
    assert "token=q-token-42" in asked.path
    coded = asked.headers["Authorization"].partition(" ")[2]
    shown = everything_said(caught.value) + repr(client) + client.address
    for secret in ("someone", "pass/word", "pass%2Fword", "q-token-42", coded):
        assert secret not in shown
    assert isinstance(caught.value, GatedModelError)
    await client.close()


async def test_the_key_of_one_request_is_not_shown_either(client, server):
    server.plan(echo_everything, path="/echo")
    with pytest.raises(AccessRefusedError) as caught:
        await client.get("/echo", headers={"X-Api-Key": KEY}, params={"api_key": PARAMETER})
    shown = everything_said(caught.value)
    assert KEY not in shown
    assert "abc+def" not in shown
    assert "abc%2Bdef" not in shown


async def test_no_exception_of_the_library_is_behind_ours(make):
    client = make("http://user:hunter22@127.0.0.1:9/v1", headers={"Authorization": f"Bearer {KEY}"})
    with pytest.raises(ServerDownError) as caught:
        await client.get("/x")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert "hunter22" not in everything_said(caught.value)
    await client.close()


async def test_hostile_words_of_a_server_become_one_short_line(client, server):
    said = "\x1b[31mred\x1b[0m\n\n" + "x " * 5000 + "\x00\x07"
    server.plan(refuse(400, {"error": {"message": said}}), path="/echo")
    with pytest.raises(ServerError) as caught:
        await client.get("/echo")
    assert "\x1b" not in str(caught.value)
    assert "\n" not in caught.value.why
    assert len(caught.value.why) < 310


async def test_a_second_server_beside_it_is_not_told_the_key(make, server):
    """A redirect is not followed."""
    with StandIn() as other:
        server.plan(refuse(307, {}, {"Location": f"{other.root}/echo?token=t-123456"}), path="/echo")
        client = make(headers={"Authorization": f"Bearer {KEY}"})
        with pytest.raises(ServerError, match="give that address") as caught:
            await client.get("/echo")
        assert f"{other.root}/echo" in str(caught.value)
        assert "t-123456" not in str(caught.value)
        assert not other.requests
        await client.close()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["error", "message", "detail", "code", "type", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(record=_JSON, status=st.integers(300, 599), location=st.text(max_size=8))
def test_whatever_a_server_refuses_with_is_a_short_error(record, status, location):
    from kani_nb.engines.httpclient.errors import Redactor, refusal

    body, headers = json.dumps(record).encode(), {"location": location, "retry-after": location}
    error = refusal(status, headers, body, where="GET http://h/v1", redact=Redactor({KEY}))
    assert isinstance(error, EngineError)
    assert len(str(error)) < 700


def test_errors_within_errors_without_an_end_are_not_followed():
    from kani_nb.engines.httpclient.errors import words_of

    record = "the end"
    for _ in range(5000):
        record = {"error": record}
    assert isinstance(words_of(record)[0], str)
