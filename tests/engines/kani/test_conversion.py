"""What engines of the real kani package are told, and what comes back of them."""

from __future__ import annotations

import asyncio
import importlib.util
import json

import pytest

from kani_nb import ChatMessage, Completion, GenerationParams
from kani_nb.engines.base import FinishReason, PrefillProgress, prompt_len
from kani_nb.engines.kani_adapter import KaniEngine
from kani_nb.errors import (
    ConfigError,
    GenerationError,
    MissingDependencyError,
    OutOfMemoryError,
    PromptError,
    PromptTooLongError,
)
from kani_nb.functions import ai_function
from kani_nb.messages import AudioPart, FunctionCall, ImagePart, ReasoningPart, TextPart, ToolCall

kani = pytest.importorskip("kani", reason="these are engines of the kani package: pip install 'kani>=1.10'")
from tests.engines.kani.kani_engines import HELLO, Repeating, Saying, answer  # noqa: E402 - it imports kani

# -- what goes in -----------------------------------------------------------------------------------------------------


async def test_messages_arrive_whole_and_come_back_whole():
    call = ToolCall("call-1", FunctionCall("age", '{"name": "Alma"}'))
    talk = [
        ChatMessage.system("Be brief."),
        ChatMessage.user(["How old", TextPart(" is she?")], name="crab"),
        ChatMessage.assistant([ReasoningPart("hm"), "Wait."], tool_calls=[call]),
        ChatMessage.function("age", "41", "call-1", is_tool_call_error=False),
    ]
    asked = kani.ToolCall(id="x", type="function", function=kani.FunctionCall(name="f", arguments="{}"))
    engine = KaniEngine(Saying(kani.ChatMessage.assistant(None, tool_calls=[asked])))
    pieces, completion = await answer(engine, talk)
    seen = engine.engine.seen[0]
    assert [each.role.value for each in seen] == ["system", "user", "assistant", "function"]
    assert (seen[1].content, seen[1].name) == (["How old", " is she?"], "crab")
    assert seen[2].content == [kani.ReasoningPart(content="hm"), "Wait."]
    assert seen[2].tool_calls[0].function.kwargs == {"name": "Alma"}
    assert (seen[3].tool_call_id, seen[3].is_tool_call_error) == ("call-1", False)
    assert pieces == []
    assert completion.message == ChatMessage.assistant(None, tool_calls=[ToolCall("x", FunctionCall("f", "{}"))])
    assert completion.finish_reason is FinishReason.TOOL_CALLS
    await engine.close()


async def test_functions_are_described_and_never_called():
    @ai_function
    def age(name: str) -> int:
        """How old somebody is."""
        return 41

    engine = KaniEngine(Saying("ok"))
    await answer(engine, functions=[age])
    (told,) = engine.engine.seen[1]
    assert isinstance(told, kani.AIFunction)
    assert (told.name, told.desc, told.json_schema) == ("age", "How old somebody is.", age.json_schema)
    await answer(engine)
    assert engine.engine.seen[1] is None
    await engine.close()


class Signed(kani.MessagePart):
    """As a provider's own: thinking that must be given back with its signature."""

    content: str
    signature: str

    def __str__(self):
        return ""


async def test_parts_that_only_the_provider_knows_are_given_back_to_it():
    said = kani.ChatMessage.assistant([Signed(content="hm", signature="s1"), "Yes."])
    engine = KaniEngine(Saying("Yes.", said))
    _, completion = await answer(engine)
    message = completion.message
    assert message.text == "Yes."
    assert ChatMessage.from_dict(json.loads(json.dumps(message.to_dict()))) == message, "it can be saved"
    await answer(engine, [*HELLO, message, *HELLO])
    assert engine.engine.seen[0][1].content == said.content
    await answer(engine, [*HELLO, message.copy_with(text="No."), *HELLO])
    assert engine.engine.seen[0][1].content == "No.", "what was edited is not what the provider said"
    await engine.close()


@pytest.mark.skipif(importlib.util.find_spec("kani.ext") is not None, reason="an extension of kani is installed")
async def test_media_without_kanis_package_for_them_are_refused():
    engine = KaniEngine(Saying("ok"))
    with pytest.raises(PromptError, match="pip install kani-multimodal-core"):
        await answer(engine, [ChatMessage.user([ImagePart(b"...", "image/png")])])
    await engine.close()


async def test_media_arrive_as_kanis():
    media = pytest.importorskip("kani.ext.multimodal_core", reason="kani's package for media is not installed")
    import io
    import wave

    from PIL import Image

    picture, sound = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (3, 2)).save(picture, "png")
    with wave.open(sound, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\0\0" * 80)
    engine = KaniEngine(Saying("ok"))
    parts = [ImagePart(picture.getvalue(), "image/png"), AudioPart(sound.getvalue(), "audio/wav")]
    await answer(engine, [ChatMessage.user(parts)])
    image, audio = engine.engine.seen[0][0].content
    assert isinstance(image, media.ImagePart)
    assert (image.size, audio.sample_rate, len(audio.raw)) == ((3, 2), 8000, 160)
    shown = kani.ChatMessage.assistant([image, audio, "Here."])
    showing = KaniEngine(Saying(shown))
    _, completion = await answer(showing)
    await showing.close()
    assert [part.mime for part in completion.message.content[:2]] == ["image/png", "audio/wav"]
    assert completion.message.content[1].data[:4] == b"RIFF"
    assert (completion.message.text, completion.message.extra) == ("Here.", {})
    with pytest.raises(PromptError, match="image/png of 3 bytes cannot be read"):
        await answer(engine, [ChatMessage.user([ImagePart(b"...", "image/png")])])
    await engine.close()


def engine_of_family(module, **attributes):
    """An engine whose class is in one of kani's modules, as far as anybody can tell."""
    kind = type("Theirs", (Saying,), {"__module__": module, **attributes})
    return KaniEngine(kind("ok"))


@pytest.mark.parametrize(
    ("module", "attributes", "expected"),
    [
        ("kani.engines.openai.engine", {}, {"max_tokens": 7, "temperature": 0.5, "seed": 3, "stop": ["x"]}),
        (
            "kani.engines.google.engine",
            {},
            {"max_output_tokens": 7, "temperature": 0.5, "seed": 3, "stop_sequences": ["x"]},
        ),
        ("kani.engines.llamacpp.base", {}, {"max_tokens": 7, "temperature": 0.5, "seed": 3, "stop": ["x"]}),
        ("mine", {}, {"max_new_tokens": 7, "temperature": 0.5, "seed": 3, "stop_strings": ["x"]}),
    ],
)
async def test_parameters_have_the_names_of_the_engines_family(module, attributes, expected):
    engine = engine_of_family(module, **attributes)
    await answer(engine, max_new_tokens=7, temperature=0.5, seed=3, stop="x")
    assert engine.engine.seen[2] == expected
    await engine.close()


@pytest.mark.parametrize(
    ("module", "attributes", "params", "expected"),
    [
        ("kani.engines.anthropic.engine", {}, {"max_tokens": 7}, {"max_tokens": 7}),
        ("kani.engines.openai", {"openai_api_type": "responses"}, {"max_tokens": 7}, {"max_output_tokens": 7}),
        ("kani.engines.openai", {}, {"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ("kani.engines.huggingface", {}, {"temperature": 0}, {"do_sample": False, "max_new_tokens": 97}),
        (
            "kani.engines.huggingface",
            {"tokenizer": 1},
            {"stop": "x", "max_new_tokens": 5},
            {"stop_strings": ["x"], "tokenizer": 1, "max_new_tokens": 5},
        ),
        ("kani.engines.openai", {}, {"do_sample": True}, {}),
        ("kani.engines.openai", {}, {"max_new_tokens": 1000}, {"max_tokens": 97}),
        # A limit of nobody's choice is given only where an answer would fill the context of this machine.
        ("kani.engines.openai", {}, {}, {}),
        ("kani.engines.llamacpp", {}, {}, {"max_tokens": 97}),
        ("kani.engines.llamacpp", {"hyperparams": {"max_tokens": 9}}, {}, {}),
        ("mine", {}, {}, {}),
    ],
)
async def test_limits_and_greedy_answers_are_said_as_the_family_says_them(module, attributes, params, expected):
    engine = engine_of_family(module, **attributes)
    await answer(engine, **params)
    told = engine.engine.seen[2]
    told.pop("stopping_criteria", None)
    assert told == expected
    await engine.close()


async def test_defaults_hold_for_every_answer():
    engine = KaniEngine(Saying("ok"), generation=GenerationParams(temperature=0.3))
    await answer(engine, max_new_tokens=4)
    assert engine.engine.seen[2] == {"max_new_tokens": 4, "temperature": 0.3}
    await engine.close()


async def test_parameters_that_the_family_has_not_are_refused():
    engine = engine_of_family("kani.engines.anthropic")
    with pytest.raises(ConfigError, match="has no min_p"):
        await answer(engine, min_p=0.1)
    with pytest.raises(ConfigError, match="did you mean temperature"):
        await answer(engine, temprature=0.1)
    assert engine.engine.seen is None
    await engine.close()


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "said", "pieces", "text"),
    [
        ("mine", [" Hi", " there \n"], [" Hi", " there \n"], " Hi there \n"),
        ("mine", [" Hi ", kani.ChatMessage.assistant("Hi")], [" Hi "], " Hi "),
        ("mine", ["Hi", kani.ChatMessage.assistant("Hi, you")], ["Hi", ", you"], "Hi, you"),
        ("mine", [kani.ChatMessage.assistant("Hi")], ["Hi"], "Hi"),
        # kani's local engines strip the message, and not the stream.
        (
            "kani.engines.llamacpp",
            [" ", "\n Hi ", " you", " \n", kani.ChatMessage.assistant("Hi  you")],
            ["Hi", "  you"],
            "Hi  you",
        ),
        ("kani.engines.llamacpp", ["a", "\n", "\n", "b"], ["a", "\n\nb"], "a\n\nb"),
    ],
)
async def test_the_pieces_are_the_messages_text(module, said, pieces, text):
    engine = engine_of_family(module)
    engine.engine.said = said
    streamed, completion = await answer(engine)
    assert streamed == pieces
    assert completion.message.text == text == "".join(streamed)
    await engine.close()


async def test_an_answer_begins_with_what_was_counted_and_ends_with_the_usage():
    engine = KaniEngine(Repeating())
    assert await prompt_len(engine, HELLO) == 4
    events = [event async for event in engine.stream(HELLO, max_new_tokens=2)]
    assert isinstance(events[0], PrefillProgress)
    assert (events[0].total_tokens, events[-1].prompt_tokens, events[-1].completion_tokens) == (4, 4, 2)
    assert events[-1].finish_reason is FinishReason.LENGTH
    assert isinstance(events[-1], Completion)
    await engine.close()


@pytest.mark.parametrize(
    ("raised", "ours", "words"),
    [
        (kani.exceptions.PromptTooLong("9 > 8"), PromptTooLongError, "9 > 8"),
        (kani.exceptions.PromptError("no system role"), PromptError, "no system role"),
        (kani.exceptions.MissingModelDependencies("pip install kani[x]"), MissingDependencyError, r"kani\[x\]"),
        (MemoryError("full"), OutOfMemoryError, "full"),
        (ZeroDivisionError("by zero\nmore"), GenerationError, "Saying failed: ZeroDivisionError: by zero$"),
        (RuntimeError("Incorrect API key provided: sk-aaaaaaaaaaaaaaaaaaaa"), GenerationError, r"provided: \[token\]$"),
        (asyncio.CancelledError(), GenerationError, "cancelled its own call"),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, BaseException) else None,
)
async def test_what_kani_raises_is_told_in_our_words_after_what_was_said(raised, ours, words):
    engine = KaniEngine(Saying("Hi", raised))
    pieces = []
    with pytest.raises(ours, match=words) as caught:
        async for event in engine.stream(HELLO):
            pieces += [event] if isinstance(event, str) else []
    assert pieces == ["Hi"]
    assert caught.value.__cause__ is not None
    await engine.close()
