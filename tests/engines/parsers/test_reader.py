"""What a model writes is read the same however it is cut into pieces, and nothing that it said is lost."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kani_nb.engines.base import ReasoningDelta, TextDelta, ToolCallDelta
from kani_nb.engines.parsers import AnswerReader, format_of

HERMES = "{% for tool in tools %}<tool_call>{% endfor %} <think> </think>"
QWEN_TAGS = "<tool_call>\n<function=example><parameter=a>"
MISTRAL = "[AVAILABLE_TOOLS] [TOOL_CALLS]"
LLAMA3 = "{{ '<|python_tag|>' }}"
NO_TOOLS = "{% for message in messages %}{{ message.content }}{% endfor %}"


def read(template, text, *, pieces=None, prompt_end="", tools=("weather", "add")):
    reader = AnswerReader(
        format_of(template, has_tools=bool(tools), reasons=prompt_end.endswith("<think>\n")), tools, prompt_end
    )
    events = []
    for piece in pieces if pieces is not None else [text]:
        events += reader.push(piece)
    events += reader.finish()
    return reader.message, events


def calls_of(message):
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


WEATHER = [("weather", {"city": "Paris"})]
TWO = [*WEATHER, ("add", {"a": 1, "b": [2, {"c": "}"}]})]


@pytest.mark.parametrize(
    ("template", "written", "calls", "text"),
    [
        (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>', WEATHER, ""),
        (
            HERMES,
            (
                'Let me see.\n\n<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>\n<tool_call>'
                '{"name": "add", "arguments": {"a": 1, "b": [2, {"c": "}"}]}}</tool_call>'
            ),
            TWO,
            "Let me see.",
        ),
        (
            QWEN_TAGS,
            "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
            WEATHER,
            "",
        ),
        (MISTRAL, '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}}]', WEATHER, ""),
        (MISTRAL, '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}', WEATHER, ""),
        (
            MISTRAL,
            (
                '[TOOL_CALLS]weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Paris"}[TOOL_CALLS]add[ARGS]'
                '{"a": 1, "b": [2, {"c": "}"}]}'
            ),
            TWO,
            "",
        ),
        (LLAMA3, '{"name": "weather", "parameters": {"city": "Paris"}}', WEATHER, ""),
        (LLAMA3, '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}', WEATHER, ""),
        (
            LLAMA3,
            (
                '{"name": "weather", "parameters": {"city": "Paris"}}; '
                '{"name": "add", "parameters": {"a": 1, "b": [2, {"c": "}"}]}}'
            ),
            TWO,
            "",
        ),
        (NO_TOOLS, '```json\n{"name": "weather", "arguments": {"city": "Paris"}}\n```', WEATHER, ""),
        (NO_TOOLS, '{"function": {"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}}', WEATHER, ""),
        (NO_TOOLS, '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>', WEATHER, ""),
        # None of these is a call, and all of it stays text.
        (NO_TOOLS, '{"name": "Ada", "age": 36}', [], '{"name": "Ada", "age": 36}'),
        (NO_TOOLS, '{"name": "add", "age": 36}', [], '{"name": "add", "age": 36}'),
        (NO_TOOLS, '{"name": "add", "text": "cut', [], '{"name": "add", "text": "cut'),
        (
            NO_TOOLS,
            '[{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "other", "arguments": {}}]',
            [*WEATHER, ("other", {})],
            "",
        ),
        (NO_TOOLS, '```python\nprint("{")\n```', [], '```python\nprint("{")\n```'),
        (HERMES, "<tool_call>nonsense</tool_call> and on", [], "<tool_call>nonsense</tool_call> and on"),
        (HERMES, 'cut <tool_call>{"na', [], 'cut <tool_call>{"na'),
        (HERMES, "1 < 2 <tool", [], "1 < 2 <tool"),
    ],
)
def test_each_format_is_read(template, written, calls, text):
    message, events = read(template, written)
    assert calls_of(message) == calls
    assert message.text == text
    for pieces in (list(written), [written[:7], written[7:]]):
        again, cut = read(template, written, pieces=pieces)
        assert (again.text, calls_of(again)) == (text, calls)
        assert joined(cut) == joined(events)


def test_reasoning_is_kept_apart_and_may_have_been_opened_by_the_prompt():
    message, events = read(HERMES, "<think>\nHm. 1 < 2.\n</think>\n\nYes.", tools=())
    assert message.reasoning == "Hm. 1 < 2."
    assert message.text == "Yes."
    assert "".join(each.text for each in events if isinstance(each, ReasoningDelta)).strip() == "Hm. 1 < 2."
    opened, _ = read(HERMES, "Hm.\n</think>\n\nYes.", prompt_end="<|im_start|>assistant\n<think>\n", tools=())
    assert (opened.reasoning, opened.text) == ("Hm.", "Yes.")
    closed, _ = read(HERMES, "Yes.", prompt_end="assistant\n<think>\n\n</think>\n\n", tools=())
    assert (closed.reasoning, closed.text) == ("", "Yes.")


def test_a_call_with_broken_json_is_a_call_that_the_model_can_be_told_about():
    message, _ = read(HERMES, '<tool_call>{"name": "weather", "arguments": {"city": Paris}}</tool_call>')
    assert message.tool_calls[0].function.name == "weather"
    with pytest.raises(json.JSONDecodeError):
        _ = message.tool_calls[0].function.kwargs


def test_a_call_that_was_cut_off_is_none_that_a_function_takes():
    """Its missing arguments would be defaults: nothing may run with them."""
    for cut in ("<function=rm><parameter=path>/data</parameter><parameter=dry_run>tr", "<function=rm>"):
        message, _ = read(QWEN_TAGS, f"<tool_call>{cut}", tools=("rm",))
        assert message.tool_calls[0].function.name == "rm"
        with pytest.raises(json.JSONDecodeError):
            _ = message.tool_calls[0].function.kwargs


def test_a_marker_of_reasoning_in_the_midst_of_an_answer_is_text():
    written = "Write `<think>` before your thoughts and </think> after them."
    for pieces in (None, list(written)):
        message, _ = read(HERMES, written, pieces=pieces, tools=())
        assert (message.text, message.reasoning) == (written, "")


def test_after_an_empty_reasoning_the_answer_begins_without_blank_lines():
    message, _ = read(HERMES, "<think>\n\n</think>\n\nHello", tools=())
    assert (message.text, message.reasoning) == ("Hello", "")


def test_without_tools_markers_of_calls_are_text():
    written = 'Say <tool_call>{"name": "weather"}</tool_call>.'
    message, _ = read(HERMES, written, tools=())
    assert message.text == written
    assert message.tool_calls is None


def test_text_is_handed_on_as_soon_as_it_can_be_told():
    reader = AnswerReader(format_of(HERMES, has_tools=True), ("weather",))
    assert reader.push("Hello") == ["Hello"]
    assert reader.push(" <tool") == []
    assert reader.push("box> ") == [" <toolbox>"]
    assert reader.push("!") == [" !"]


def joined(events):
    text = "".join(each for each in events if isinstance(each, TextDelta))
    reasoning = "".join(each.text for each in events if isinstance(each, ReasoningDelta))
    return (
        text,
        reasoning,
        [(each.index, each.name, each.arguments) for each in events if isinstance(each, ToolCallDelta)],
    )


FRAGMENTS = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "[TOOL_CALLS]",
            "[ARGS]",
            "<|python_tag|>",
            '{"name": "add", "arguments": {"a": 1}}',
            '{"name": "add"',
            "weather",
            "<",
            "[",
            " ",
            "\n\n",
            "```json\n",
            "words ",
            "é👍",
        ]
    ),
    max_size=12,
)


@settings(max_examples=300)
@given(
    fragments=FRAGMENTS,
    cuts=st.lists(st.integers(0, 200), max_size=12),
    template=st.sampled_from([HERMES, QWEN_TAGS, MISTRAL, LLAMA3, NO_TOOLS, None]),
    prompt_end=st.sampled_from(["", "assistant\n<think>\n"]),
    tools=st.sampled_from([(), ("add",)]),
)
@example(["</think>", " ", "<think>"], [9], HERMES, "", ())
def test_any_cutting_of_any_answer_reads_the_same(fragments, cuts, template, prompt_end, tools):
    written = "".join(fragments)
    places = sorted({0, len(written), *(min(each, len(written)) for each in cuts)})
    pieces = [written[a:b] for a, b in itertools.pairwise(places)]
    whole, events = read(template, written, prompt_end=prompt_end, tools=tools)
    cut, cut_events = read(template, written, pieces=pieces, prompt_end=prompt_end, tools=tools)
    assert (cut.text, cut.reasoning, calls_of_safely(cut)) == (whole.text, whole.reasoning, calls_of_safely(whole))
    assert joined(cut_events) == joined(events)
    assert joined(events)[0] == whole.text
    # What is not a marker, and not within a call, is in one of the two.
    if not whole.tool_calls:
        said = (whole.reasoning + whole.text).replace(" ", "").replace("\n", "")
        for word in ("words", "é👍"):
            assert said.count(word) == written.count(word)


def calls_of_safely(message):
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
