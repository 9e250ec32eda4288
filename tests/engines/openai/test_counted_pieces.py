"""Who counts an answer's tokens: the server's usage, else the pieces of those streams whose pieces are tokens."""

from __future__ import annotations

import pytest

from kani_nb.engines.openai import OpenAIEngine
from kani_nb.messages import ChatMessage
from tests.engines.openai.stand_in import CHAT, StandIn, delta, say

ASK = [ChatMessage.user("hello my dear world")]
PIECES = (delta("", role="assistant"), delta("hello"), delta(" my"), delta(" dear"), delta(finish="stop"))
USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7}}


def serving(owner, *events):
    server = StandIn(owner=owner)
    server.usual[CHAT] = say(*events)
    server.usual["/extras/tokenize/count"] = lambda exchange: exchange.answer(200, {"count": 3})
    return server


async def answered(server):
    """The tokens said with each piece, the whole answer, and who counted."""
    engine = OpenAIEngine(api_base=server.base)
    await engine.load()
    before = engine.details()["tokens_from"]
    events = [event async for event in engine.stream(ASK)]
    after = engine.details()["tokens_from"]
    await engine.close()
    return [each.tokens for each in events if isinstance(each, str)], events[-1], (before, after)


@pytest.mark.parametrize("owner", ["me", "llamacpp"])
async def test_pieces_are_counted_where_they_are_tokens_and_the_server_does_not_count(owner):
    with serving(owner, *PIECES) as server:
        counts, whole, (before, after) = await answered(server)
    assert counts == [1, 2, 3]
    assert whole.completion_tokens == 3
    assert whole.prompt_tokens is None  # which no piece tells
    assert "usage, or the pieces" in before
    assert after.startswith("the pieces of the stream")


async def test_what_the_server_counts_goes_over_the_pieces():
    with serving("me", *PIECES, USAGE) as server:
        counts, whole, (_, after) = await answered(server)
    assert counts == [1, 2, 3]
    assert (whole.prompt_tokens, whole.completion_tokens) == (5, 7)
    assert after == "the server's usage"


@pytest.mark.parametrize("owner", ["somebody", "library"])
async def test_pieces_of_other_servers_are_no_tokens(owner):
    with serving(owner, *PIECES) as server:
        counts, whole, (_, after) = await answered(server)
    assert counts == [None, None, None]
    assert whole.completion_tokens is None
    assert after.startswith("nobody")


async def test_of_calls_and_of_whole_answers_pieces_tell_nothing():
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}
    with serving("me", delta("x"), delta(tool_calls=[call]), delta(finish="tool_calls")) as server:
        _, whole, _ = await answered(server)
        assert whole.completion_tokens is None
        record = {"choices": [{"message": {"role": "assistant", "content": "a b c"}, "finish_reason": "stop"}]}
        server.usual[CHAT] = lambda exchange: exchange.answer(200, record)
        counts, whole, _ = await answered(server)
    assert (counts, whole.completion_tokens) == ([None], None)
