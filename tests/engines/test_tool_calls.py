"""Tools, calls and reasoning through a real tokenizer and a real model whose words are scripted."""

import json

import pytest

from kani_nb import ChatMessage
from kani_nb.engines.base import EngineNotice, FinishReason, ReasoningDelta, TextDelta, ToolCallDelta
from kani_nb.functions import ai_function
from kani_nb.messages import ImagePart, ToolCall
from tests.conftest import CHAT_TEMPLATE, make_model
from tests.engines.asking import GREEDY, engine_of
from tests.engines.speaking import speak
from tests.engines.tool_templates import (
    ALTERNATING,
    HERMES_TEMPLATE,
    MISTRAL_IDS,
    MISTRAL_TEMPLATE,
    NO_SYSTEM_TEMPLATE,
    ONE_CALL,
    THINKING_TEMPLATE,
    two_calls,
)


@ai_function(read_only=True)
def weather(city: str) -> str:
    """The weather in a city."""
    return f"rain in {city}"


async def loaded(folder, template, *answers, special=(), **attributes):
    engine = engine_of(make_model(folder, chat_template=template, max_position_embeddings=2048, vocab_size=416))
    if special:
        engine.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    for name, value in attributes.items():
        setattr(engine.tokenizer, name, value)
    await engine.load()
    speak(engine, *answers)
    return engine


async def events_of(engine, messages, functions=(weather,)):
    params = GREEDY | {"max_new_tokens": 200}
    return [event async for event in engine.stream(messages, list(functions), **params)]


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


async def test_a_call_is_read_and_its_result_is_told_by_the_template(tmp_path):
    engine = await loaded(tmp_path / "m", HERMES_TEMPLATE, f"Let me see.\n{CALL}", "It rains.")
    history = [ChatMessage.user("Weather in Köln?")]
    events = await events_of(engine, history)
    completion = events[-1]
    call = completion.message.tool_calls[0].function
    assert (call.name, call.kwargs) == ("weather", {"city": "Köln"})
    assert completion.message.text == "Let me see."
    assert "".join(each for each in events if isinstance(each, TextDelta)) == "Let me see."
    assert completion.finish_reason is FinishReason.TOOL_CALLS
    assert [each.name for each in events if isinstance(each, ToolCallDelta)] == ["weather"]
    assert not any(isinstance(each, EngineNotice) for each in events)
    result = ChatMessage.function("weather", "rain", completion.message.tool_calls[0].id)
    history += [completion.message, result]
    prompt = engine.tokenizer.decode(engine.prompt_ids(history, [weather]))
    assert "The weather in a city." in prompt
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>' in prompt.replace("\\u00f6", "ö")
    assert "<|im_start|>tool\nrain<|im_end|>" in prompt
    final = (await events_of(engine, history))[-1]
    assert final.message.text == "It rains."
    assert final.cached_tokens > 20
    await engine.close()


async def test_markers_that_are_special_tokens_are_seen_and_never_shown(tmp_path):
    said = '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}'
    engine = await loaded(tmp_path / "m", MISTRAL_TEMPLATE, said, special=["[TOOL_CALLS]", "[ARGS]"])
    assert engine.tokenizer.convert_tokens_to_ids("[TOOL_CALLS]") in engine.tokenizer.encode(said)
    completion = (await events_of(engine, [ChatMessage.user("?")]))[-1]
    assert completion.message.tool_calls[0].function.kwargs == {"city": "Paris"}
    assert completion.message.text == ""
    await engine.close()


async def test_without_tools_a_marker_is_text(tmp_path):
    engine = await loaded(tmp_path / "m", HERMES_TEMPLATE, f"I would write {CALL}")
    completion = (await events_of(engine, [ChatMessage.user("?")], functions=()))[-1]
    assert completion.message.text == f"I would write {CALL}"
    assert completion.message.tool_calls is None
    await engine.close()


async def test_reasoning_that_the_template_opens_is_kept_apart(tmp_path):
    engine = await loaded(tmp_path / "m", THINKING_TEMPLATE, "<unused>")
    start = engine.tokenizer.encode("<think>\n", add_special_tokens=False)
    assert engine.prompt_ids([ChatMessage.user("?")])[-len(start) :] == start
    await engine.close()
    engine = await loaded(tmp_path / "n", THINKING_TEMPLATE, "<think>\nHm, 2.\n</think>\n\nTwo.")
    events = await events_of(engine, [ChatMessage.user("1+1?")], functions=())
    assert "".join(each.text for each in events if isinstance(each, ReasoningDelta)).strip() == "Hm, 2."
    assert events[-1].message.reasoning == "Hm, 2."
    assert events[-1].message.text == "Two."
    await engine.close()


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_SYSTEM_TEMPLATE], ids=["ignores tools", "and system messages"])
async def test_a_template_that_ignores_tools_gets_them_in_words_and_says_so(tmp_path, template):
    said = '{"name": "weather", "arguments": {"city": "Paris"}}'
    engine = await loaded(tmp_path / "m", template, said, "It rains.")
    events = await events_of(engine, [ChatMessage.user("Weather?")])
    notices = [each.text for each in events if isinstance(each, EngineNotice)]
    assert len(notices) == 1
    assert "ignores tools: they are described in words" in notices[0]
    prompt = engine.tokenizer.decode(engine.prompt_ids([ChatMessage.user("Weather?")], [weather]))
    assert "The weather in a city." in prompt
    completion = events[-1]
    assert completion.message.tool_calls[0].function.name == "weather"
    call = completion.message.tool_calls[0]
    history = [ChatMessage.user("Weather?"), completion.message, ChatMessage.function("weather", "rain", call.id)]
    prompt = engine.tokenizer.decode(engine.prompt_ids(history, [weather]))
    assert f"assistant\n{said}<|im_end|>" in prompt
    assert "user\nResult of weather:\nrain<|im_end|>" in prompt
    assert (await events_of(engine, history))[-1].message.text == "It rains."
    # Later turns without tools still tell what was called.
    assert "Result of weather" in engine.tokenizer.decode(engine.prompt_ids(history))
    await engine.close()


async def test_a_call_whose_arguments_are_not_json_goes_back_to_the_model_as_it_wrote_it(tmp_path):
    broken = '<tool_call>{"name": "weather", "arguments": {"city": Paris}}</tool_call>'
    engine = await loaded(tmp_path / "m", HERMES_TEMPLATE, broken, "Sorry.")
    completion = (await events_of(engine, [ChatMessage.user("?")]))[-1]
    call = completion.message.tool_calls[0]
    assert call.function.name == "weather"
    with pytest.raises(json.JSONDecodeError):
        _ = call.function.kwargs
    history = [ChatMessage.user("?"), completion.message, ChatMessage.function("weather", "not JSON", call.id)]
    assert (await events_of(engine, history))[-1].message.text == "Sorry."
    await engine.close()


RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<r>", "close": "</r>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<call>",
            "close": "</call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}


async def test_a_tokenizer_that_describes_its_answers_is_followed(tmp_path):
    said = '<r>Hm.</r>Let me see.<call>{"name": "weather", "arguments": {"city": "Paris"}}</call>'
    engine = await loaded(tmp_path / "m", HERMES_TEMPLATE, said, response_template=RESPONSE_TEMPLATE)
    if not hasattr(engine.tokenizer, "get_response_parser"):
        pytest.skip("this transformers has no response templates")
    events = await events_of(engine, [ChatMessage.user("?")])
    message = events[-1].message
    assert (message.reasoning, message.text) == ("Hm.", "Let me see.")
    assert isinstance(message.tool_calls[0], ToolCall)
    assert message.tool_calls[0].function.kwargs == {"city": "Paris"}
    assert "".join(each for each in events if isinstance(each, TextDelta)) == "Let me see."
    await engine.close()


async def test_what_a_described_answer_does_not_fit_is_shown_as_it_is(tmp_path):
    said = "Well.<call>{broken</call> So."
    engine = await loaded(tmp_path / "m", HERMES_TEMPLATE, said, response_template=RESPONSE_TEMPLATE)
    if not hasattr(engine.tokenizer, "get_response_parser"):
        pytest.skip("this transformers has no response templates")
    message = (await events_of(engine, [ChatMessage.user("?")]))[-1].message
    assert message.tool_calls is None
    assert message.text.startswith("Well.")
    assert "{broken" in message.text
    assert message.text.endswith("So.")
    await engine.close()


@pytest.mark.parametrize(
    "template",
    [MISTRAL_IDS + HERMES_TEMPLATE, ONE_CALL + HERMES_TEMPLATE, ALTERNATING + NO_SYSTEM_TEMPLATE],
    ids=["ids of nine characters", "one call in a message", "turns, and no tools"],
)
def test_templates_with_rules_of_their_own_get_the_calls_as_they_want_them(tmp_path, template):
    folder = make_model(tmp_path / "m", chat_template=template, max_position_embeddings=2048)
    engine = engine_of(folder)
    prompt = engine.tokenizer.decode(engine.prompt_ids(two_calls("call_0123456789abcdef", "x"), [weather]))
    assert prompt.count("Rome") >= 3
    assert prompt.index("result 0") < prompt.index("result 1")
    engine.prompt_ids([*two_calls("a" * 9, "b" * 9), ChatMessage.user("and now?")], [weather])


def test_an_image_that_a_function_gave_is_named_to_a_model_that_cannot_see(tiny_model):
    history = two_calls("a" * 9)
    history[-1] = history[-1].copy_with(content=("a plot: ", ImagePart(b"x", "image/png")))
    prompt = engine_of(tiny_model).prompt_ids(history)
    text = engine_of(tiny_model).tokenizer.decode(prompt)
    assert "a plot: [image/png, 1 bytes, which this model cannot read]" in text


async def test_a_described_call_without_a_name_is_shown_as_it_is(tmp_path):
    said = 'Well.<call>{"nme": 1}</call> So.'
    engine = await loaded(tmp_path / "m", HERMES_TEMPLATE, said, response_template=RESPONSE_TEMPLATE)
    if not hasattr(engine.tokenizer, "get_response_parser"):
        pytest.skip("this transformers has no response templates")
    message = (await events_of(engine, [ChatMessage.user("?")]))[-1].message
    assert message.tool_calls is None
    assert message.text.startswith("Well.")
    await engine.close()
