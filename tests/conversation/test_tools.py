"""Tools in a round: called, checked, approved, their results told; and whatever a model or a function does wrong."""

import asyncio
import threading
import time

import pytest

from kani_nb.conversation.tools import CannotAskError, Tools, ToolStep
from kani_nb.errors import ConfigError, GenerationError
from kani_nb.functions import ai_function
from kani_nb.messages import ChatRole
from tests.conversation.calling import DELETE, TWO_AND_THREE, Answering, Calling, add, deletes, told


async def test_a_call_is_run_its_result_told_and_all_of_it_is_one_turn(open_session, store):
    engine = Calling(TWO_AND_THREE, "It is 5.")
    session = open_session(engine)
    events = [event async for event in session.stream("2 + 3?", tools=[add])]
    steps = [each for each in events if isinstance(each, ToolStep)]
    assert [(each.call.function.name, each.result.text, each.is_error) for each in steps] == [("add", "5", False)]
    reply = events[-1]
    assert reply.text == "It is 5."
    assert told(session) == [
        (ChatRole.USER, "2 + 3?"),
        (ChatRole.ASSISTANT, ""),
        (ChatRole.FUNCTION, "5"),
        (ChatRole.ASSISTANT, "It is 5."),
    ]
    assert session.turns[-1].messages[2].tool_call_id == session.turns[-1].messages[1].tool_calls[0].id
    assert reply.metrics.completion_tokens == 10
    assert reply.metrics.steps == 2
    assert reply.metrics.finish_reason == "stop"
    assert store.load(session.conversation.id).path() == session.turns
    # The next turn has it all in its prompt.
    await session.ask("and then?")
    assert [each.role for each in engine.seen[-1][0]] == [*(role for role, _ in told_of(session, 0)), ChatRole.USER]


def told_of(session, number):
    return [(each.role, each.text) for each in session.turns[number].messages]


async def test_several_calls_of_one_message_are_run_in_their_order(open_session):
    order = []

    @ai_function(read_only=True)
    def note(word: str) -> None:
        order.append(word)

    session = open_session(Calling([("note", '{"word": "a"}'), ("note", '{"word": "b"}')], "Done."))
    await session.ask("go", tools=[note])
    assert order == ["a", "b"]
    assert told(session)[2:4] == [(ChatRole.FUNCTION, "null"), (ChatRole.FUNCTION, "null")]


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (("ad", "{}"), "there is no function 'ad'; did you mean add?"),
        (("add", '{"a": "two", "b": 3}'), "the arguments of add do not fit: a: Input should be a valid integer"),
        (("add", '{"a": 2}'), "the arguments of add do not fit: b: Missing required argument"),
        (("add", '{"a": 2, "b": 3, "c": 4}'), "c: Unexpected keyword argument"),
        (("add", '{"a": 2, "b":'), "the arguments of add are not JSON"),
        (("add", "[2, 3]"), "must be a JSON object, not list"),
    ],
)
async def test_a_call_that_cannot_be_made_is_told_to_the_model_which_may_try_again(open_session, call, complaint):
    session = open_session(Calling([call], TWO_AND_THREE, "5"))
    reply = await session.ask("2 + 3?", tools=[add])
    assert reply.text == "5"
    failed = session.turns[-1].messages[2]
    assert complaint in failed.text
    assert failed.is_tool_call_error


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_function_that_raises_is_told_to_the_model(open_session, kind):
    if kind == "sync":

        @ai_function(read_only=True)
        def broken() -> None:
            raise RuntimeError("no such thing")
    else:

        @ai_function(read_only=True)
        async def broken() -> None:
            raise RuntimeError("no such thing")

    session = open_session(Calling([("broken", "{}")], "Sorry."))
    assert (await session.ask("go", tools=[broken])).text == "Sorry."
    assert told(session)[2] == (ChatRole.FUNCTION, "broken failed: RuntimeError: no such thing")


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_function_that_hangs_is_left_after_its_time(open_session, kind):
    released = threading.Event()
    if kind == "sync":

        @ai_function(read_only=True, timeout_s=0.1)
        def hang() -> None:
            released.wait(20)
    else:

        @ai_function(read_only=True, timeout_s=0.1)
        async def hang() -> None:
            await asyncio.sleep(20)

    session = open_session(Calling([("hang", "{}")], "It hung."))
    assert (await session.ask("go", tools=[hang])).text == "It hung."
    assert told(session)[2] == (ChatRole.FUNCTION, "hang failed: took longer than 0.1 s")
    released.set()


async def test_an_async_function_that_blocks_does_not_hold_up_the_loop(open_session, loop):
    longest = 0.0

    @ai_function(read_only=True)
    async def block() -> str:
        time.sleep(1.5)
        return "done"

    async def watch():
        nonlocal longest
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - began)

    watching = loop.submit(watch())
    session = open_session(Calling([("block", "{}")], "ok"))
    assert (await session.ask("go", tools=[block])).text == "ok"
    watching.cancel()
    assert longest < 1


async def test_results_that_are_not_text_are_told_as_json_or_in_words(open_session):
    class Odd:
        def __str__(self):
            return "an odd thing"

    @ai_function(read_only=True)
    def table() -> dict:
        return {"rows": {1}, "odd": Odd(), "nan": float("nan")}

    @ai_function(read_only=True)
    def odd() -> object:
        return Odd()

    @ai_function(read_only=True, auto_truncate=5)
    def long() -> str:
        return "0123456789"

    calls = [("table", "{}"), ("odd", "{}"), ("long", "{}")]
    session = open_session(Calling(calls, "ok"))
    await session.ask("go", tools=[table, odd, long])
    texts = [text for role, text in told(session) if role is ChatRole.FUNCTION]
    assert texts == [
        '{"rows":[1],"odd":"an odd thing","nan":"NaN"}',
        "an odd thing",
        "01234… (5 more characters)",
    ]


async def test_a_model_that_calls_for_ever_must_answer_in_the_end(open_session):
    engine = Calling(*[TWO_AND_THREE] * 3, "Enough: 5.")
    session = open_session(engine)
    reply = await session.ask("2 + 3?", tools=Tools((add,), max_steps=3))
    assert reply.text == "Enough: 5."
    assert [names for _, names in engine.seen] == [["add"]] * 3 + [[]]
    assert any("must answer without tools now: it has called 3 times" in each for each in reply.notices)
    # Even where it goes on to call what it was not offered.
    stubborn = open_session(Calling(TWO_AND_THREE))
    reply = await stubborn.ask("2 + 3?", tools=Tools((add,), max_steps=2))
    assert reply.message.tool_calls
    # What it called without being offered anything has an answer too: no model takes a history without.
    assert [role for role, _ in told(stubborn)][-2:] == [ChatRole.ASSISTANT, ChatRole.FUNCTION]
    assert told(stubborn)[-1][1] == "add was not run: no function could be called here"
    assert any("the model called add, and was offered no function" in each for each in reply.notices)


async def test_calls_that_keep_failing_end_too(open_session):
    engine = Calling([("nothing", "{}")])
    session = open_session(engine)
    reply = await session.ask("go", tools=[add])
    assert [names for _, names in engine.seen] == [["add"]] * 3 + [[]]
    assert any("its calls kept failing" in each for each in reply.notices)


async def test_a_function_without_retries_is_not_called_again_after_a_failure(open_session):
    @ai_function(read_only=True, auto_retry=False)
    def once() -> None:
        raise ValueError("no")

    engine = Calling([("once", "{}")], "I could not.")
    session = open_session(engine)
    assert (await session.ask("go", tools=[once])).text == "I could not."
    assert [names for _, names in engine.seen] == [["once"], []]


async def test_a_function_after_which_the_user_speaks_ends_the_round(open_session):
    @ai_function(read_only=True, after=ChatRole.USER)
    def show() -> str:
        return "shown"

    engine = Calling([("show", "{}")], "never said")
    session = open_session(engine)
    await session.ask("go", tools=[show])
    assert told(session)[-1] == (ChatRole.FUNCTION, "shown")
    assert len(engine.seen) == 1


async def test_what_is_not_marked_read_only_is_asked_for_and_only_then_run(open_session):
    session = open_session(Calling(DELETE, DELETE, "ok"))
    session.host = Answering("n", "y")
    await session.ask("go", tools=[deletes])
    results = [text for role, text in told(session) if role is ChatRole.FUNCTION]
    assert results == ["the user refused to run deletes", "deleted a.txt"]
    assert session.host.asked[0] == "Run deletes(path='a.txt')? [y]es, [n]o, [a]lways: "


async def test_always_holds_for_the_round(open_session):
    session = open_session(Calling(DELETE, DELETE, "ok"))
    session.host = Answering("a")
    await session.ask("go", tools=[deletes])
    assert len(session.host.asked) == 1


async def test_where_nobody_can_be_asked_it_is_a_denial_that_says_so(open_session):
    session = open_session(Calling(DELETE, "ok"))
    await session.ask("go", tools=[deletes])
    assert "nobody can be asked outside of a %%chat cell (--approve always allows it)" in told(session)[2][1]
    session = open_session(Calling(DELETE, "ok"))
    session.host = Answering(CannotAskError("there is no stdin"))
    await session.ask("go", tools=[deletes])
    assert "there is no stdin" in told(session)[2][1]


async def test_never_denies_and_always_does_not_ask(open_session):
    session = open_session(Calling(DELETE, "ok"))
    session.host = Answering()
    await session.ask("go", tools=Tools((deletes,), approve="never"))
    assert told(session)[2][1] == "the user does not allow deletes to run"
    session = open_session(Calling(DELETE, "ok"))
    await session.ask("go", tools=Tools((deletes,), approve="always"))
    assert told(session)[2][1] == "deleted a.txt"


async def test_a_stop_during_a_call_keeps_the_steps_and_ends_the_round_at_once(open_session):
    began, released = threading.Event(), threading.Event()

    @ai_function(read_only=True)
    def slow() -> str:
        began.set()
        released.wait(20)
        return "late"

    session = open_session(Calling([("slow", "{}"), ("add", '{"a": 1, "b": 1}')], "never said"))
    asking = asyncio.ensure_future(session.ask("go", tools=[slow, add]))
    await asyncio.to_thread(began.wait, 10)
    assert session.stop()
    reply = await asking
    released.set()
    assert reply.metrics.finish_reason == "cancelled"
    assert reply.turn.interrupted
    results = [text for role, text in told(session) if role is ChatRole.FUNCTION]
    begun = "slow was stopped by the user while it ran, and may have taken effect"
    assert results == [begun, "add was not run: the user stopped it"]
    assert not session.is_busy


async def test_leaving_during_a_call_keeps_what_has_come(open_session):
    began, released = threading.Event(), threading.Event()

    @ai_function(read_only=True)
    def slow() -> str:
        began.set()
        released.wait(20)
        return "late"

    session = open_session(Calling([("slow", "{}")], "never said"))
    asking = asyncio.ensure_future(session.ask("go", tools=[slow]))
    await asyncio.to_thread(began.wait, 10)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    released.set()
    for _ in range(200):
        if session.turns and not session.is_busy:
            break
        await asyncio.sleep(0.01)
    assert [role for role, _ in told(session)] == [ChatRole.USER, ChatRole.ASSISTANT, ChatRole.FUNCTION]


async def test_what_was_called_is_kept_where_the_engine_fails_afterwards(open_session):
    session = open_session(Calling(TWO_AND_THREE, RuntimeError("broken")))
    with pytest.raises(GenerationError, match="broken") as caught:
        await session.ask("2 + 3?", tools=[add])
    assert caught.value.reply.turn.interrupted
    assert [role for role, _ in told(session)] == [ChatRole.USER, ChatRole.ASSISTANT, ChatRole.FUNCTION]


async def test_the_conversations_own_tools_are_offered_in_every_round(open_session):
    engine = Calling("hello")
    session = open_session(engine)
    session.tools = Tools((add,))
    await session.ask("a")
    await session.ask("b")
    assert [names for _, names in engine.seen] == [["add"], ["add"]]


async def test_a_turn_is_asked_again_with_the_tools_it_had(open_session):
    engine = Calling("no", TWO_AND_THREE, "It is 5.")
    session = open_session(engine)
    await session.ask("2 + 3?", tools=[add])
    reply = await session.retry()
    assert reply.text == "It is 5."
    assert [names for _, names in engine.seen] == [["add"]] * 3
    await session.edit(1, "4 + 4?")
    assert engine.seen[-1][1] == ["add"]


def test_tools_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="two tools are called 'add'"):
        Tools((add, add))
    with pytest.raises(ConfigError, match="is not a function"):
        Tools((3,))
    with pytest.raises(ConfigError, match="approve is 'maybe'"):
        Tools((add,), approve="maybe")
    with pytest.raises(ConfigError, match="max_steps is 0"):
        Tools((add,), max_steps=0)
