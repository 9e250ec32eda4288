"""Ending an answer: stop, interrupt, leaving and cancelling keep what was seen, and nothing else."""

import asyncio
import threading
import time
from contextlib import aclosing

import pytest

from kani_nb.conversation.session import ChatReply
from kani_nb.engines.base import (
    TextDelta,
)
from kani_nb.engines.echo import EchoEngine
from tests.conversation.scripted import Scripted, forever, journal_size

# Stopping.


def stopped_after(loop, session, words, how, prompt="one two three four five six seven eight"):
    """The reply of a round that was ended by `how` after `words` deltas."""

    async def read():
        count = 0
        async with aclosing(session.stream(prompt)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    count += 1
                if count == words and not isinstance(event, ChatReply):
                    count = -1000
                    assert how()
        return event

    return loop.run_sync(read())


@pytest.mark.parametrize(("verb", "reason"), [("stop", "cancelled"), ("interrupt", "interrupted")])
def test_a_stop_commits_what_was_seen(loop, open_session, store, recorder, verb, reason):
    session = open_session()
    reply = stopped_after(loop, session, 3, getattr(session, verb))
    assert (reply.text, reply.number) == ("one two three", 1)
    assert reply.turn.interrupted
    assert reply.metrics.finish_reason == reason
    assert reply.metrics.completion_tokens == 3
    assert reply.metrics.prompt_tokens == 9
    assert store.load(session.conversation.id) == session.conversation
    assert (len(recorder), journal_size(store)) == (1, 0)
    assert session.ask_sync("next").number == 2


def test_a_stop_before_any_text_commits_nothing(open_session, store, recorder):
    engine = EchoEngine(prefill=60)
    session = open_session(engine)
    threading.Timer(0.1, session.stop).start()
    began = time.perf_counter()
    reply = session.ask_sync("hi")
    assert time.perf_counter() - began < 20
    assert (reply.text, reply.number, reply.metrics.finish_reason) == ("", 0, "cancelled")
    assert reply.turn.id not in session.conversation.turns
    assert len(recorder) == 0
    assert not engine.slot.is_taken


def test_a_silent_engine_is_stopped_at_once(open_session):
    engine = Scripted(TextDelta("so"), forever)
    session = open_session(engine)
    threading.Timer(0.2, session.interrupt).start()
    began = time.perf_counter()
    reply = session.ask_sync("hi")
    assert time.perf_counter() - began < 20
    assert (reply.text, reply.metrics.finish_reason, reply.notices) == ("so", "interrupted", ())
    assert engine.closed == 1


def test_an_engine_that_does_not_end_is_left_alone_and_the_reply_says_so(open_session):
    release = threading.Event()

    async def stubborn():
        while not release.is_set():
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                continue

    session = open_session(Scripted(TextDelta("so"), stubborn))
    threading.Timer(0.1, session.stop).start()
    began = time.perf_counter()
    reply = session.ask_sync("hi")
    assert time.perf_counter() - began < 20
    assert reply.text == "so"
    assert "left to end by itself" in reply.notices[0]
    release.set()


def test_loading_and_counting_can_be_stopped_too(open_session):
    class Slow(EchoEngine):
        is_loaded = False

        async def load(self, progress=None):
            await forever()

    session = open_session(Slow())
    threading.Timer(0.1, session.stop).start()
    assert session.ask_sync("hi").text == ""


def test_stop_without_a_round_says_so(open_session):
    session = open_session()
    assert session.stop() is False
    assert session.interrupt() is False
    assert session.ask_sync("hi").text == "hi"
    assert session.stop() is False


async def test_leaving_a_stream_early_keeps_what_was_seen(open_session, loop):
    session = open_session()

    async def leave():
        async with aclosing(session.stream("one two three four")) as events:
            async for event in events:
                if event == " two":
                    break
        return session.turns

    (turn,) = await loop.run(leave())
    assert (turn.answer.text, turn.interrupted, turn.metrics["finish_reason"]) == ("one two", True, "cancelled")


async def test_leaving_a_stream_of_another_loop_keeps_what_was_seen(open_session):
    session = open_session(Scripted(TextDelta("so"), TextDelta(" far"), forever))
    async with aclosing(session.stream("hi")) as events:
        async for event in events:
            if event == " far":
                break
    while session.is_busy:
        await asyncio.sleep(0.01)
    (turn,) = session.turns
    assert (turn.answer.text, turn.interrupted) == ("so far", True)


async def test_cancelling_an_ask_keeps_what_has_come_and_stays_cancelled(open_session, loop, store):
    session = open_session(Scripted(TextDelta("so far"), forever))
    store.create(session.conversation)

    async def cancelled():
        task = asyncio.create_task(session.ask("hi"))
        while not journal_size(store):  # written from the first text on
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not session.is_busy

    await loop.run(cancelled())
    assert session.turns[0].answer.text == "so far"
    assert store.load(session.conversation.id) == session.conversation


async def test_cancelling_before_any_text_commits_nothing(open_session, loop, store):
    engine = Scripted(forever)
    session = open_session(engine)

    async def cancelled():
        task = asyncio.create_task(session.ask("hi"))
        while not engine.seen:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()

    await loop.run(cancelled())
    assert session.turns == ()
