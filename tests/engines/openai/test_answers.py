"""What is asked and what is made of the answer: messages, parameters, tools, counts."""

from __future__ import annotations

import base64
import json
import sys

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kani_nb.engines.base import FinishReason, ReasoningDelta, TextDelta, ToolCallDelta
from kani_nb.engines.httpclient.sse import ServerEvent
from kani_nb.engines.openai import OpenAIClient, OpenAIEngine
from kani_nb.engines.openai.counting import TokenCounter
from kani_nb.engines.openai.messages import api_messages
from kani_nb.engines.openai.params import ServerKind
from kani_nb.engines.openai.stream import AnswerBuilder
from kani_nb.errors import ConfigError, GenerationError, PromptError, PromptTooLongError, UnknownModelError
from kani_nb.functions import ai_function
from kani_nb.messages import (
    AudioPart,
    ChatMessage,
    FunctionCall,
    ImagePart,
    ReasoningPart,
    TextPart,
    ToolCall,
    VideoPart,
)
from tests.engines.openai.stand_in import CHAT, StandIn, delta, refuse, say

ASK = [ChatMessage.user("hello my dear world")]


@pytest.fixture
async def engine(server):
    engine = OpenAIEngine(api_base=server.base)
    yield engine
    await engine.close()


async def answer(engine, messages=ASK, functions=None, **params):
    events = [event async for event in engine.stream(messages, functions, **params)]
    return events[:-1], events[-1]


async def test_an_answer_comes_in_pieces_with_its_counts(engine):
    pieces, whole = await answer(engine)
    assert pieces == ["hello", " my", " dear", " world"]
    assert whole.message == ChatMessage.assistant("hello my dear world")
    assert (whole.prompt_tokens, whole.cached_tokens, whole.completion_tokens) == (5, 3, 4)
    assert whole.finish_reason is FinishReason.STOP


async def test_the_limit_ends_it(engine):
    _, whole = await answer(engine, max_new_tokens=2)
    assert (whole.message.text, whole.finish_reason) == ("hello my", FinishReason.LENGTH)


async def test_reasoning_is_kept_apart(engine, server):
    server.plan(say(delta(reasoning_content="so "), delta(reasoning="then"), delta("Yes"), delta(finish="stop")))
    pieces, whole = await answer(engine)
    assert pieces == [ReasoningDelta("so "), ReasoningDelta("then"), TextDelta("Yes")]
    assert whole.message.content == (ReasoningPart("so then"), "Yes")


def called(index, id=None, name=None, arguments=None):
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    call = {"function": function} | ({} if index is None else {"index": index}) | ({"id": id} if id else {})
    return delta(tool_calls=[call])


@pytest.mark.parametrize(
    "chunks",
    [
        [called(0, "a", "f", '{"x"'), called(0, None, None, ": 1}"), called(1, "b", "g", "{}")],
        [called(0, "a", "f", '{"x": 1}'), called(0, "b", "g", "{}")],
        [called(None, "a", "f", '{"x": 1}'), called(None, "b", "g", "{}")],
        [called(0, "a", "f", {"x": 1}), called(1, "b", "g", None)],
        [called(0, "a", "f", ""), called(0, "a", "f", '{"x": 1}'), called(1, "b", "g", "")],
    ],
    ids=["pieces", "one index for all", "no index", "arguments as an object", "the name again each time"],
)
@pytest.mark.parametrize("finish", ["tool_calls", "stop"])
async def test_tool_calls_are_put_together(engine, server, chunks, finish):
    server.plan(say(*chunks, delta(finish=finish)))
    pieces, whole = await answer(engine)
    assert all(isinstance(each, ToolCallDelta) for each in pieces)
    first, second = whole.message.tool_calls
    assert (first.id, first.function.name, first.function.kwargs) == ("a", "f", {"x": 1})
    assert (second.id, second.function.name, second.function.kwargs) == ("b", "g", {})
    assert (whole.message.content, whole.finish_reason) == (None, FinishReason.TOOL_CALLS)


async def test_functions_are_described_and_results_are_sent_back(engine, server):
    @ai_function
    def add(a: int, b: int) -> int:
        "Add two numbers."
        return a + b

    call = ToolCall.from_function("add", call_id_="call_1", a=1, b=2)
    history = [*ASK, ChatMessage.assistant(None, tool_calls=(call,)), ChatMessage.function("add", "3", "call_1")]
    await answer(engine, history, [add], tool_choice="auto")
    body = server.asked()[-1].body
    assert body["tools"][0]["function"]["name"] == "add"
    assert body["tool_choice"] == "auto"
    assert body["messages"][1:] == [
        {"role": "assistant", "content": None, "tool_calls": [call.to_dict()]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    assert server.asked("/tokenize")[-1].body["tools"] == body["tools"]
    await answer(engine, tool_choice="none")
    assert "tool_choice" not in server.asked()[-1].body  # servers refuse it without tools


async def test_halves_of_a_character_in_two_pieces_are_one(engine, server):
    def split(exchange):
        exchange.begin()
        for half in ("\\ud83d", "\\ude00", "\\ud83d"):
            exchange.write('data: {"choices": [{"delta": {"content": "HALF"}}]}\n\n'.replace("HALF", half))
        exchange.event(delta(" end", finish="stop"))
        exchange.end()

    server.plan(split)
    pieces, whole = await answer(engine)
    assert "".join(pieces) == whole.message.text == "😀\ufffd end"


async def test_a_body_that_is_no_stream_is_an_answer_too(engine, server):
    message = {"role": "assistant", "content": "all at once", "reasoning_content": "hm"}
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    record = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
    server.plan(lambda exchange: exchange.answer(200, record))
    pieces, whole = await answer(engine)
    assert pieces == [ReasoningDelta("hm"), TextDelta("all at once")]
    assert whole.completion_tokens == 3


async def test_a_proxy_that_holds_everything_back_changes_nothing(engine, server):
    def buffered(exchange):
        events = [delta("hello"), delta(" you"), delta(finish="stop")]
        text = ": ping\r\n\r\n" + "".join(f"data: {json.dumps(each)}\r\n\r\n" for each in events) + "data: [DONE]"
        exchange.answer(200, text.encode(), kind="text/plain")

    server.plan(buffered)
    pieces, whole = await answer(engine)
    assert (pieces, whole.message.text) == (["hello", " you"], "hello you")


_OUTER = ["choices", "delta", "message", "content", "usage", "finish_reason", "reasoning", "error", "text"]
_INNER = ["tool_calls", "function", "index", "id", "name", "arguments", "completion_tokens", "prompt_tokens_details"]
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.text(max_size=3) | st.sampled_from(["\ud83d", "stop"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*_OUTER, *_INNER]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(st.lists(st.tuples(st.dictionaries(st.just("choices"), st.lists(_VALUES, max_size=2)) | _VALUES, st.booleans())))
def test_any_chunks_are_an_answer_or_an_error_in_words(chunks):
    builder = AnswerBuilder(10, str)
    events = []
    for chunk, is_body in chunks:
        try:
            events += builder.read(ServerEvent(json.dumps(chunk), "json" if is_body else "message"))
        except GenerationError as error:
            assert str(error)
    text = "".join(each for each in events if isinstance(each, str))
    assert builder.completion().message.text == text
    text.encode()


async def test_predict_gives_the_same(engine):
    assert (await engine.predict(ASK)).message.text == "hello my dear world"


# -- messages ----------------------------------------------------------------------------------------------------------


def test_media_are_sent_within_the_request():
    image, sound = ImagePart(b"\x89PNG", "image/png"), AudioPart(b"RIFF", "audio/x-wav")
    (record,) = api_messages([ChatMessage.user(("look: ", image, TextPart("listen"), sound), name="ann")])
    coded = base64.b64encode(b"\x89PNG").decode()
    assert record["name"] == "ann"
    assert record["content"] == [
        {"type": "text", "text": "look: "},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{coded}"}},
        {"type": "text", "text": "listen"},
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"}},
    ]


def test_parts_that_are_all_text_are_one_text_and_reasoning_stays_here():
    said = [ChatMessage.user(("a", TextPart("b"))), ChatMessage.assistant((ReasoningPart("secretly"), "c"))]
    assert [each["content"] for each in api_messages(said)] == ["ab", "c"]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "nothing to answer"),
        ([ChatMessage.user((VideoPart(b"x", "video/mp4"),))], "video cannot be sent"),
        ([ChatMessage.assistant((ImagePart(b"x", "image/png"),))], "assistant holds image"),
        ([ChatMessage.function("f", (ImagePart(b"x", "image/png"),), "1")], "function holds image"),
    ],
)
async def test_what_the_api_has_no_place_for_is_refused_before_it_is_sent(engine, server, messages, words):
    with pytest.raises(PromptError, match=words):
        await answer(engine, messages)
    assert not server.asked()


def test_a_result_finds_its_call_by_the_name():
    calls = (
        ToolCall("1", FunctionCall("f")),
        ToolCall("2", FunctionCall("f")),
        ToolCall("3", FunctionCall("g", "oops")),
    )
    said = [ChatMessage.assistant(None, tool_calls=calls), *(ChatMessage.function(name, "r") for name in "gffx")]
    records = api_messages(said)
    assert [each.get("tool_call_id") for each in records[1:]] == ["3", "1", "2", None]
    assert records[4]["role"] == "function"
    # Servers refuse a history with arguments that are no JSON.
    assert json.loads(records[0]["tool_calls"][2]["function"]["arguments"]) == {"invalid_json": "oops"}


# -- parameters --------------------------------------------------------------------------------------------------------


async def test_parameters_are_sent_by_the_servers_names(engine, server):
    await answer(
        engine,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop="END",
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        max_tokens=9,
        presence_penalty=0.2,
        extra_body={"guided_regex": "a+"},
    )
    body = server.asked()[-1].body
    expected = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["END"], "top_k": 5, "min_p": 0.1}
    expected |= {"repetition_penalty": 1.1, "max_tokens": 9, "presence_penalty": 0.2, "guided_regex": "a+"}
    assert {name: body.get(name) for name in expected} == expected
    await answer(engine, do_sample=False, temperature=0.7)
    assert server.asked()[-1].body["temperature"] == 0
    await answer(engine)
    assert not {"temperature", "top_p", "seed", "stop", "top_k"} & set(server.asked()[-1].body)


async def test_what_a_server_does_not_know_is_refused_and_not_dropped():
    with StandIn(owner="somebody") as server:
        engine = OpenAIEngine(api_base=server.base)
        with pytest.raises(ConfigError, match=r"top_k is 5.*no field for it"):
            await answer(engine, top_k=5)
        await answer(engine, top_k=0, repetition_penalty=1.0)  # which ask for nothing
        with pytest.raises(ConfigError, match="no_such"):
            await answer(engine, no_such=1)
        await engine.close()


async def test_defaults_are_the_engines_and_a_call_goes_over_them(server):
    engine = OpenAIEngine(api_base=server.base, temperature=0.3, user="me", max_completion_tokens=3)
    _, whole = await answer(engine, user="you")
    assert whole.message.text == "hello my dear"
    assert (server.asked()[-1].body["temperature"], server.asked()[-1].body["user"]) == (0.3, "you")
    await engine.close()


@pytest.mark.parametrize(
    ("said", "gone", "instead"),
    [
        ("Extra inputs are not permitted: 'stream_options'", "stream_options", None),
        (
            "Unsupported parameter: 'max_tokens', use 'max_completion_tokens' instead.",
            "max_tokens",
            "max_completion_tokens",
        ),
    ],
)
async def test_a_field_that_a_server_refuses_is_left_out_from_then_on(engine, server, said, gone, instead):
    server.plan(refuse(400, {"error": {"message": said}}))
    assert (await answer(engine))[1].message.text == "hello my dear world"
    assert (await answer(engine))[1].message.text == "hello my dear world"
    first, second, third = (each.body for each in server.asked())
    assert gone in first
    for body in (second, third):
        assert gone not in body
        assert instead is None or instead in body


# -- counts ------------------------------------------------------------------------------------------------------------


async def test_the_servers_tokenizer_counts_and_each_prompt_once(engine, server):
    assert [await engine.prompt_len(ASK) for _ in range(3)] == [5, 5, 5]
    assert len(server.asked("/tokenize")) == 1
    assert engine.details()["counted_by"] == "the server's tokenizer"


async def test_a_prompt_that_does_not_fit_is_refused_before_and_by_the_server(server):
    engine = OpenAIEngine(api_base=server.base)
    with pytest.raises(PromptTooLongError, match="the context holds 400"):
        await answer(engine, [ChatMessage.user("word " * 500)])
    assert not server.asked()
    boastful = OpenAIEngine(api_base=server.base, max_context_size=100_000)
    with pytest.raises(PromptTooLongError, match="maximum context length is 400"):
        await answer(boastful, [ChatMessage.user("word " * 500)])
    # No more is asked for than there is room, which such servers refuse.
    _, whole = await answer(engine, [ChatMessage.user("word " * 390)])
    assert whole.completion_tokens == 9
    await engine.close()
    await boastful.close()


async def test_without_a_tokenizer_it_is_an_estimate_that_learns():
    with StandIn(owner="somebody") as server:
        engine = OpenAIEngine(api_base=server.base)
        guess = await engine.prompt_len(ASK)
        _, whole = await answer(engine)
        assert await engine.prompt_len(ASK) == whole.prompt_tokens == 5 != guess
        longer = [*ASK, whole.message, ChatMessage.user("more")]
        assert 5 < await engine.prompt_len(longer) < 5 + guess + 20
        assert "estimate" in engine.details()["counted_by"]
        await engine.close()


async def test_a_context_that_only_a_refusal_tells_is_learnt():
    with StandIn(owner="somebody") as server:
        engine = OpenAIEngine(api_base=server.base)
        _, whole = await answer(engine)  # 512 new tokens do not fit into its 400
        assert whole.message.text == "hello my dear world"
        assert len(server.asked()) == 2
        assert (engine.max_context_size, engine.details()["context_from"]) == (400, "told by the server")
        await answer(engine)
        assert len(server.asked()) == 3
        await engine.close()


async def test_a_tokenizer_that_is_switched_off_is_done_without(engine, server):
    del server.usual["/tokenize"]
    assert await engine.prompt_len(ASK) > 0
    assert "estimate" in engine.details()["counted_by"]


async def test_llamacpps_template_and_tokenizer_are_asked():
    with StandIn(owner="llamacpp") as server:
        server.usual["/props"] = lambda exchange: exchange.answer(200, {"default_generation_settings": {"n_ctx": 333}})
        server.usual["/apply-template"] = lambda exchange: exchange.answer(200, {"prompt": "<s>hello world"})
        server.usual["/tokenize"] = lambda exchange: exchange.answer(200, {"tokens": [1, 2, 3]})
        engine = OpenAIEngine(api_base=server.base)
        assert await engine.prompt_len(ASK) == 3
        assert server.asked("/tokenize")[0].body == {
            "content": "<s>hello world",
            "add_special": True,
            "parse_special": True,
        }
        assert (engine.max_context_size, engine.details()["server"]) == (333, "llama.cpp")
        await answer(engine, repetition_penalty=1.2)
        assert server.asked()[-1].body["repeat_penalty"] == 1.2
        await engine.close()


async def test_the_client_alone_can_be_used(server):
    client = OpenAIClient("a-key", api_base=server.base)
    assert [each["id"] for each in await client.models()] == ["tiny"]
    record = await client.create_chat_completion("tiny", ASK, max_tokens=2)
    assert record["choices"][0]["message"]["content"] == "hello my"
    engine = OpenAIEngine(client=client)
    assert (await answer(engine))[1].message.text == "hello my dear world"
    assert server.asked(CHAT)[-1].headers["Authorization"] == "Bearer a-key"
    await engine.close()


# -- OpenAI itself -----------------------------------------------------------------------------------------------------


class ToStandIn(httpx.AsyncHTTPTransport):
    """Connects to the stand-in, whatever host is asked for."""

    def __init__(self, server):
        super().__init__()
        self._port = server.port

    async def handle_async_request(self, request):
        request.url = request.url.copy_with(scheme="http", host="127.0.0.1", port=self._port)
        return await super().handle_async_request(request)


async def test_openai_is_asked_in_its_own_words():
    with StandIn(owner="system", models=("gpt-4o-mini", "gpt-9")) as server:
        async with httpx.AsyncClient(transport=ToStandIn(server)) as http:
            engine = OpenAIEngine(client=OpenAIClient("sk-a-key-of-mine", http), max_completion_tokens=3)
            _, whole = await answer(engine)
            body = server.asked()[0].body
            assert (body["model"], body["max_completion_tokens"], "max_tokens" in body) == ("gpt-4o-mini", 3, False)
            assert whole.message.text == "hello my dear"
            assert (engine.max_context_size, engine.details()["context_from"]) == (128_000, "known of the model")
            with pytest.raises(ConfigError, match="OpenAI server has no field"):
                await answer(engine, top_k=3)
            newer = OpenAIEngine(model="gpt-9", client=engine.client)
            await newer.load()
            assert "gpt-9" in newer.details()["notes"]
            with pytest.raises(UnknownModelError, match="did you mean gpt-9"):
                await OpenAIEngine(model="gpt-99", client=engine.client).load()
            await engine.close()


@pytest.mark.parametrize("works", [True, False])
async def test_tiktoken_counts_for_openai_where_it_is_installed_and_has_its_files(tmp_path, monkeypatch, works):
    find = "return Encoding()" if works else "raise OSError('no network')"
    (tmp_path / "tiktoken.py").write_text(
        "class Encoding:\n    name = 'words'\n    def encode(self, text, **_):\n        return text.split()\n"
        f"def encoding_for_model(name):\n    raise KeyError(name)\ndef get_encoding(name):\n    {find}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tiktoken", raising=False)
    counter = TokenCounter(OpenAIClient("a-key", api_base="http://127.0.0.1:9/v1"), ServerKind.OPENAI, "gpt-9")
    short, long = [await counter.count(api_messages([ChatMessage.user("word " * n)]), []) for n in (10, 20)]
    assert ("tiktoken (words)" in counter.counted_by) is works
    assert not works or long - short == 10
    sys.modules.pop("tiktoken", None)
