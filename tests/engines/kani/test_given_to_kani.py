"""Our engines in the real `Kani`: what kani's own tests ask of an engine, asked of ours."""

from __future__ import annotations

import asyncio
import warnings
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kani_nb import BaseEngine, ChatMessage, Completion, EchoEngine, HuggingEngine, TextDelta
from kani_nb.engines.base import ReasoningDelta
from kani_nb.engines.kani_adapter import KaniEngine, as_kani_engine
from kani_nb.errors import ConfigError, PromptError
from kani_nb.functions import tool_schemas
from kani_nb.messages import FunctionCall, ReasoningPart, ToolCall
from kani_nb.testing import EngineContract

kani = pytest.importorskip("kani", reason="ours are given to the kani package: pip install 'kani>=1.10'")
from kani.engines.base import WrapperEngine  # noqa: E402 - after the check that it is there


class Letters(BaseEngine):
    """A letter is a token; answers with one `a`, or (given more than one new token) with the last message."""

    def __init__(self, max_context_size=10):
        self.max_context_size = max_context_size
        self.closed = 0

    def prompt_len(self, messages, functions=None, **kwargs):
        return sum(len(each.text) for each in messages)

    async def predict(self, messages, functions=None, max_new_tokens=1):
        assert self.prompt_len(messages) <= self.max_context_size
        return Completion(ChatMessage.assistant("a" if max_new_tokens == 1 else messages[-1].text))

    async def close(self):
        self.closed += 1


class Streaming(Letters):
    """The same, letter by letter, with reasoning beside it."""

    async def stream(self, messages, functions=None, **params):
        completion = await Letters.predict(self, messages, functions, **params)
        yield ReasoningDelta("hm")
        for letter in completion.message.text:
            yield TextDelta(letter)
        yield completion

    predict = BaseEngine.predict


class OnlyEven(Letters):
    """Refuses prompts of an odd number of messages, as some templates do."""

    def prompt_len(self, messages, functions=None, **kwargs):
        if len(messages) % 2:
            raise PromptError("an odd number of messages")
        return super().prompt_len(messages)


class Scripted(Letters):
    """Says what it was told to, one message after the other."""

    def __init__(self, *script):
        super().__init__(1000)
        self.script = list(script)
        self.seen = []

    async def stream(self, messages, functions=None, **params):
        self.seen.append((list(messages), tool_schemas(functions)))
        message = self.script.pop(0)
        if message.text:
            yield TextDelta(message.text)
        yield Completion(message)

    predict = BaseEngine.predict


def text_of(messages):
    return "".join(each.text or "" for each in messages)


engines = pytest.mark.parametrize(
    "engine",
    [
        as_kani_engine(Letters()),
        as_kani_engine(Streaming()),
        WrapperEngine(as_kani_engine(Letters())),
        WrapperEngine(as_kani_engine(Streaming())),
    ],
    ids=["predicting", "streaming", "predicting, wrapped", "streaming, wrapped"],
)


# -- what is kept of a conversation -----------------------------------------------------------------------------------


@engines
async def test_what_no_longer_fits_is_left_out_of_the_prompt_and_kept_in_the_history(engine):
    ai = kani.Kani(engine, desired_response_tokens=3)
    reply = await ai.chat_round("12345")
    assert (reply.role, reply.content) == (kani.ChatRole.ASSISTANT, "a")
    assert text_of(await ai.get_prompt()) == "12345a"
    assert await ai.chat_round_str("67890") == "a"
    assert text_of(ai.chat_history) == "12345a67890a"
    assert text_of(await ai.get_prompt()) == "a67890a"


@engines
async def test_what_is_always_included_stays(engine):
    always = [kani.ChatMessage.user("2")]
    ai = kani.Kani(engine, desired_response_tokens=3, system_prompt="1", always_included_messages=always)
    await ai.chat_round_str("12345")
    assert text_of(ai.chat_history) == "12345a"
    assert text_of(await ai.get_prompt()) == "12a"


@settings(deadline=None, max_examples=30)
@given(context=st.integers(4, 40), more=st.integers(1, 20), system=st.text(max_size=1), always=st.text(max_size=1))
async def test_as_much_is_kept_as_fits(context, more, system, always):
    ai = kani.Kani(
        as_kani_engine(Letters(context)),
        desired_response_tokens=1,
        system_prompt=system,
        always_included_messages=[kani.ChatMessage.user(always)],
        chat_history=[kani.ChatMessage.user("a")] * (context + more),
    )
    assert await ai.prompt_token_len(await ai.get_prompt()) == context - 1


async def test_a_prompt_that_the_engine_refuses_is_made_shorter():
    ai = kani.Kani(as_kani_engine(OnlyEven()), desired_response_tokens=1)
    ai.chat_history = [kani.ChatMessage.user(each) for each in "abcde"]
    assert text_of(await ai.get_prompt()) == "bcde"


@pytest.mark.parametrize(
    ("system", "message", "error"),
    [(None, "aaa", kani.exceptions.MessageTooLong), ("aaa", "a", kani.exceptions.PromptTooLong)],
)
async def test_what_can_never_fit_is_refused_as_kani_refuses_it(system, message, error):
    ai = kani.Kani(as_kani_engine(Letters()), system_prompt=system, desired_response_tokens=9)
    with pytest.raises(error):
        await ai.chat_round_str(message)


async def test_an_engines_refusal_of_a_prompt_is_kanis_error():
    echo = as_kani_engine(EchoEngine(max_context_size=3))
    with pytest.raises(kani.exceptions.PromptTooLong, match="4 tokens"):
        await echo.predict([kani.ChatMessage.user("one two three")])
    with pytest.raises(kani.exceptions.PromptError, match="odd"):
        await as_kani_engine(OnlyEven()).prompt_len([kani.ChatMessage.user("a")])


async def test_single_messages_are_measured_as_kani_did_before():
    ai = kani.Kani(as_kani_engine(Letters()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # kani's own: the method is an old one
        assert ai.message_token_len(kani.ChatMessage.user("abc")) == 3


@engines
@settings(deadline=None, max_examples=25)
@given(
    queries=st.lists(st.text(st.characters(codec="utf-8"), max_size=5), max_size=8),
    system=st.text(st.characters(codec="utf-8"), max_size=1),
    streams=st.booleans(),
)
async def test_any_conversation_goes_on(engine, queries, system, streams):
    ai = kani.Kani(engine, desired_response_tokens=3, system_prompt=system)
    for query in queries:
        if streams:
            reply = (await ai.chat_round_stream(query, max_new_tokens=9)).content
        else:
            reply = await ai.chat_round_str(query, max_new_tokens=9)
        assert reply == query
        assert await ai.prompt_token_len(await ai.get_prompt()) <= 10 - 3


# -- streams ----------------------------------------------------------------------------------------------------------


@engines
async def test_a_stream_gives_the_answers_pieces_and_then_its_message(engine):
    ai = kani.Kani(engine, desired_response_tokens=3)
    stream = ai.chat_round_stream("abc", max_new_tokens=3)
    pieces = [piece async for piece in stream]
    assert "".join(pieces) == "abc"
    assert all(type(piece) is str for piece in pieces)
    assert (await stream.message()).content == "abc"
    assert text_of(ai.chat_history) == "abcabc"


async def test_a_stream_counts_what_it_took():
    ai = kani.Kani(as_kani_engine(EchoEngine()))
    completion = await ai.chat_round_stream("one two three").completion()
    assert (completion.message.content, completion.prompt_tokens, completion.completion_tokens) == (
        "one two three",
        4,
        3,
    )


async def test_leaving_a_stream_ends_the_generation():
    echo = EchoEngine(delay=0.001)
    stream = as_kani_engine(echo).stream([kani.ChatMessage.user("word " * 100)])
    assert await anext(stream) == "word"
    assert echo.slot.is_taken
    await stream.aclose()
    assert not echo.slot.is_taken


async def test_it_runs_on_the_loop_that_asks():
    loops = []

    class Here(Letters):
        async def predict(self, messages, functions=None, **params):
            loops.append(asyncio.get_running_loop())
            return await super().predict(messages)

    await kani.Kani(as_kani_engine(Here())).chat_round("a")
    assert loops == [asyncio.get_running_loop()]


# -- functions --------------------------------------------------------------------------------------------------------


class Harbour(kani.Kani):
    asked: ClassVar[list] = []

    @kani.ai_function()
    def ship_age(self, name: str) -> int:
        """How old a ship is."""
        self.asked.append(name)
        if name == "Berta":
            raise ValueError("no such ship")
        return 41


def asking(*names):
    calls = [ToolCall(f"c{number}", FunctionCall.with_args("ship_age", name=each)) for number, each in enumerate(names)]
    return ChatMessage.assistant([ReasoningPart("I must look it up")], tool_calls=calls)


@pytest.mark.parametrize("streams", [False, True])
async def test_a_full_round_calls_kanis_functions_and_tells_the_results(streams):
    engine = Scripted(asking("Alma"), ChatMessage.assistant("She is 41."))
    ai = Harbour(as_kani_engine(engine))
    if streams:
        said = [await stream.message() async for stream in ai.full_round_stream("How old is the Alma?")]
    else:
        said = [message async for message in ai.full_round("How old is the Alma?")]
    assert [each.role.value for each in said] == ["assistant", "function", "assistant"]
    assert said[0].parts == [kani.ReasoningPart(content="I must look it up")]
    assert (said[1].text, said[1].tool_call_id, said[2].text) == ("41", "c0", "She is 41.")
    (told,) = engine.seen[0][1]
    assert told["function"]["name"] == "ship_age"
    assert told["function"]["description"] == "How old a ship is."
    assert list(told["function"]["parameters"]["properties"]) == ["name"]
    assert [each.role.value for each in engine.seen[1][0]] == ["user", "assistant", "function"]
    assert engine.seen[1][0][1].reasoning == "I must look it up", "what the model said comes back to it whole"


async def test_errors_of_functions_are_told_and_several_calls_run_together():
    engine = Scripted(asking("Berta", "Clara"), ChatMessage.assistant("There is no Berta."))
    said = [message async for message in Harbour(as_kani_engine(engine)).full_round("And those?")]
    assert [each.is_tool_call_error for each in said] == [None, True, False, None]
    results = engine.seen[1][0][2:]
    assert [(each.tool_call_id, each.is_tool_call_error) for each in results] == [("c0", True), ("c1", False)]
    assert "no such ship" in results[0].text


# -- making one -------------------------------------------------------------------------------------------------------


async def test_it_is_an_engine_of_kani_that_closes_ours():
    engine = Letters()
    theirs = as_kani_engine(engine)
    assert isinstance(theirs, kani.engines.BaseEngine)
    assert type(theirs) is type(as_kani_engine(EchoEngine()))
    assert theirs.max_context_size == 10
    assert repr(theirs) == "KaniNbEngine(Letters(max_context_size=10))"
    await theirs.close()
    assert engine.closed == 1


def test_what_is_no_engine_or_not_ready_is_refused():
    with pytest.raises(ConfigError, match="str is no engine of kani_nb"):
        as_kani_engine("echo")
    with pytest.raises(ConfigError, match=r"as_kani_engine\(kani_nb\.HuggingEngine\('smollm2'\)\)"):
        as_kani_engine("smollm2")
    with pytest.raises(ConfigError, match=r"does not know its context yet.*\n.*load\(\)"):
        as_kani_engine(Letters(0))


class TestThereAndBack(EngineContract):
    params: ClassVar = {"max_new_tokens": 12}

    def make_engine(self):
        return KaniEngine(as_kani_engine(EchoEngine(max_context_size=400, delay=0.002)))


@pytest.mark.slow
async def test_a_real_model_talks_with_itself_through_kani(tiny_model):
    engine = HuggingEngine(str(tiny_model), threads=1, dtype="float32")
    await engine.load()
    first, second = (kani.Kani(as_kani_engine(engine), desired_response_tokens=20) for _ in range(2))
    said = "the quick brown fox"
    for _ in range(3):
        said = await first.chat_round_str(said, max_new_tokens=8, do_sample=False)
        said = (await second.chat_round_stream(said, max_new_tokens=8, do_sample=False)).text
    assert said
    assert len(first.chat_history) == len(second.chat_history) == 6
    await engine.close()
