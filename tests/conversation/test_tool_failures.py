"""Whatever a function, its arguments, its result or its process do wrong ends no more than the call."""

import asyncio
import threading

import pytest

from kani_nb.conversation.tools import Tools
from kani_nb.conversation.tree import Conversation, Turn
from kani_nb.functions import ai_function
from kani_nb.messages import ChatMessage, FunctionCall, ToolCall
from tests.conversation.calling import DELETE, Answering, Calling, add, deletes, told


@pytest.mark.parametrize(
    "ending", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), StopIteration(), asyncio.CancelledError()]
)
@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_nothing_that_a_function_raises_ends_more_than_the_function(open_session, ending, kind):
    if kind == "sync":

        @ai_function(read_only=True)
        def leave() -> None:
            raise ending
    else:

        @ai_function(read_only=True)
        async def leave() -> None:
            raise ending

    session = open_session(Calling([("leave", "{}")], "ok"))
    assert (await asyncio.wait_for(session.ask("go", tools=[leave]), 10)).text == "ok"
    assert told(session)[2][1].startswith("leave failed: ")
    assert (await asyncio.wait_for(session.ask("again"), 10)).text == "ok"


async def test_an_empty_list_of_tools_is_none_and_a_single_function_is_a_list_of_one(open_session):
    engine = Calling("hello")
    session = open_session(engine)
    session.tools = Tools((add,))
    await session.ask("a", tools=[])
    await session.ask("b", tools=add)
    assert [names for _, names in engine.seen] == [[], ["add"]]


async def test_a_result_holds_nothing_that_no_tokenizer_takes(open_session):
    @ai_function(read_only=True)
    def odd() -> str:
        return "a\0b \udcff"

    session = open_session(Calling([("odd", "{}")], "ok"))
    await session.ask("go", tools=[odd])
    assert told(session)[2][1] == "a\N{REPLACEMENT CHARACTER}b \N{REPLACEMENT CHARACTER}"


async def test_a_sync_function_may_give_something_to_await(open_session):
    async def later():
        return 7

    @ai_function(read_only=True)
    def now() -> int:
        return later()

    session = open_session(Calling([("now", "{}")], "ok"))
    await session.ask("go", tools=[now])
    assert told(session)[2][1] == "7"


async def test_a_result_is_put_into_words_within_the_functions_time(open_session):
    class Slow:
        def __str__(self):
            released.wait(20)
            return "slow"

    released = threading.Event()

    @ai_function(read_only=True, timeout_s=0.2)
    def slow() -> object:
        return Slow()

    session = open_session(Calling([("slow", "{}")], "ok"))
    await session.ask("go", tools=[slow])
    released.set()
    assert told(session)[2][1] == "slow failed: took longer than 0.2 s"


async def test_a_question_that_fails_is_a_denial(open_session):
    session = open_session(Calling(DELETE, "ok"))
    session.host = Answering(UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"))
    await session.ask("go", tools=[deletes])
    assert "the question for approval failed (UnicodeDecodeError" in told(session)[2][1]


async def test_an_answer_that_is_neither_yes_nor_no_is_asked_for_again(open_session):
    session = open_session(Calling(DELETE, "ok"))
    session.host = Answering("maybe", "y")
    await session.ask("go", tools=[deletes])
    assert told(session)[2][1] == "deleted a.txt"


@pytest.mark.parametrize("arguments", ["[" * 5000, "1" * 5000, '{"a": ' + "9" * 5000 + "}"])
async def test_arguments_that_break_the_parser_are_told_to_the_model(open_session, arguments):
    session = open_session(Calling([("add", arguments)], "ok"))
    assert (await session.ask("go", tools=[add])).text == "ok"
    assert "the arguments of add" in told(session)[2][1]


async def test_a_killed_process_leaves_the_calls_that_ended(open_session, store, monkeypatch):
    """As the journal has it when the second call runs: the model said nothing but its calls."""
    calls = (ToolCall("1", FunctionCall("pay")), ToolCall("2", FunctionCall("pay")))
    conversation = Conversation.new("killed")
    store.create(conversation)
    said = (
        ChatMessage.user("pay"),
        ChatMessage.assistant("", tool_calls=calls),
        ChatMessage.function("pay", "paid", "1"),
    )
    store.journal(conversation.id, Turn("t", None, said, interrupted=True))
    monkeypatch.setattr("kani_nb.conversation.store._is_abandoned", lambda *_: True)
    (turn,) = store.load(conversation.id).path()
    assert [each.text for each in turn.messages] == ["pay", "", "paid", "pay was not run: the user stopped it"]
