"""BaseClient: a subclass that sets an address has requests, retries, time limits, and errors in words."""

from __future__ import annotations

import asyncio
import email.utils
import time

import httpx
import pytest

from kani_nb.engines.httpclient.client import BaseClient, RateLimitError, ServerError
from kani_nb.engines.httpclient.errors import retry_after
from kani_nb.errors import ConfigError, EngineError
from tests.engines.openai.stand_in import refuse

pytestmark = pytest.mark.usefixtures("no_pauses")


async def test_a_subclass_that_only_sets_the_address_works(client, server):
    assert await client.get("/echo") == {"method": "GET", "path": "/echo", "body": None}
    assert (await client.post("/echo", json={"a": "é"}))["body"] == {"a": "é"}
    assert (await client.get("echo", params={"q": "ab"}))["path"] == "/echo?q=ab"
    assert "echo" in await client.request("GET", "/echo", response_as_text=True)


async def test_a_client_that_was_written_for_kani_works(server, make):
    """It takes a session, and puts its key into the headers of each request."""
    make()

    class OldClient(BaseClient):
        SERVICE_BASE = server.root

        def __init__(self, api_key, http=None):
            super().__init__(http)
            self.api_key = api_key

        async def request(self, method, route, headers=None, retry=5, **kwargs):
            headers = dict(headers or {}, Authorization=f"Bearer {self.api_key}")
            return await super().request(method, route, headers=headers, retry=retry, **kwargs)

    client = OldClient("an-old-key")
    server.plan(refuse(503, {"error": "an-old-key"}), path="/echo")
    assert (await client.post("/echo", json={"a": 1}))["body"] == {"a": 1}
    assert server.asked("/echo")[1].headers["Authorization"] == "Bearer an-old-key"
    server.plan(refuse(400, {"error": "what is an-old-key?"}), path="/echo")
    with pytest.raises(ServerError, match=r"what is \[secret\]\?"):
        await client.get("/echo")
    await client.close()


async def test_an_answer_without_a_body_is_none(client, server):
    def nothing(exchange):
        exchange.send_response(204)
        exchange.end_headers()

    server.usual["/nothing"] = nothing
    assert await client.post("/nothing", json={}) is None


async def test_a_client_of_httpx_can_be_passed_in_and_stays_open(server, make):
    async with httpx.AsyncClient(headers={"X-From": "outside"}) as http:
        client = make(http=http)
        await client.get("/echo")
        await client.close()
        await client.get("/echo")
        assert not http.is_closed
        await client.close()
    with pytest.raises(ConfigError, match="is closed"):
        await client.get("/echo")
    assert server.asked("/echo")[0].headers["X-From"] == "outside"


async def test_it_connects_again_after_it_was_closed(client):
    await client.get("/echo")
    await client.close()
    await client.close()
    assert await client.get("/echo")
    await client.close()


def test_it_can_be_used_in_one_event_loop_after_the_other(make):
    client = make()

    async def use():
        await client.get("/echo")
        await client.close()

    asyncio.run(use())
    asyncio.run(use())


async def test_an_address_that_is_none_is_refused(make):
    for base in ("", "ftp://host/x", "http://", "host:80", "http://host:notaport/"):
        with pytest.raises(ConfigError, match="no address"):
            await make(base).get("/x")


async def test_routes_are_appended_to_a_path_and_a_query(make, server):
    server.usual["/api/echo"] = server.usual["/echo"]
    client = make(f"{server.root}/api/?version=2")
    assert (await client.get("/echo?a=1", params={"b": 2}))["path"] == "/api/echo?version=2&a=1&b=2"
    await client.close()


# -- retries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
async def test_what_passes_is_tried_again(client, server, status):
    server.plan(refuse(status, {"error": "busy"}), path="/echo")
    assert await client.get("/echo")
    assert len(server.asked("/echo")) == 2


@pytest.mark.parametrize(("status", "tries"), [(429, 4), (503, 4), (500, 2), (400, 1), (404, 1), (401, 1), (307, 1)])
async def test_what_does_not_pass_is_given_up(client, server, status, tries):
    server.plan(*[refuse(status, {"error": {"message": "no"}})] * 9, path="/echo")
    with pytest.raises(EngineError, match=str(status)) as caught:
        await client.get("/echo")
    assert len(server.asked("/echo")) == tries
    assert "no" in str(caught.value)
    assert caught.value.status == status


async def test_a_connection_that_breaks_before_an_answer_is_tried_again(client, server):
    server.plan(lambda exchange: exchange.reset(), path="/echo")
    assert await client.get("/echo")
    assert len(server.asked("/echo")) == 2


async def test_the_wait_that_a_server_asks_for_is_kept(client, server, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("kani_nb.engines.httpclient.client.asyncio.sleep", sleep)
    server.plan(refuse(429, {}, {"Retry-After": "7"}), path="/echo")
    await client.get("/echo")
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    server.plan(refuse(503, {}, {"Retry-After": date}), refuse(429, {}, {"Retry-After": "3"}), path="/echo")
    await client.get("/echo")
    assert (waits[0], waits[2]) == (7, 3)
    assert 15 < waits[1] <= 20


async def test_a_wait_that_is_too_long_is_said_and_not_kept(client, server):
    server.plan(refuse(429, {"error": {"message": "slow down"}}, {"Retry-After": "3600"}), path="/echo")
    with pytest.raises(RateLimitError, match="wait 3600 s") as caught:
        await client.get("/echo")
    assert caught.value.retry_after_s == 3600
    assert len(server.asked("/echo")) == 1


def test_the_pauses_grow_differ_and_are_bounded(monkeypatch):
    from kani_nb.engines.httpclient.errors import pause_before_retry

    failure = ServerError("busy")
    pauses = [[pause_before_retry(failure, n, first_s=0.5, longest_s=60) for n in range(8)] for _ in range(20)]
    for tried in range(8):
        longest = min(0.5 * 2**tried, 8)
        assert all(longest / 2 <= each[tried] <= longest for each in pauses)
    assert len({each[0] for each in pauses}) > 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
    ],
)
def test_the_header_is_read_in_each_of_its_forms(headers, seconds):
    assert retry_after(headers) == seconds


async def test_nothing_is_tried_again_once_an_answer_has_begun(client, server):
    def breaks(exchange):
        exchange.begin()
        exchange.event("one")
        exchange.reset()

    server.plan(breaks, path="/echo")
    seen = []
    with pytest.raises(ServerError, match="broke off in the middle"):
        async for event in client.stream_sse("/echo"):
            seen.append(event.data)
    assert seen == ["one"]
    assert len(server.asked("/echo")) == 1
