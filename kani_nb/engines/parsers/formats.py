"""How models mark reasoning and tool calls, and which of it a chat template speaks of.

A template that teaches a model to call tools shows its markers, so the template chooses, never the model's name. The
formats: Hermes and Qwen (`<tool_call>` with JSON, or Qwen's later tags), Llama 3 (`<|python_tag|>` or bare JSON),
Mistral (`[TOOL_CALLS]`, with or without ids), and plain JSON where a template knows no tools. Reading a stream of text
by them is `reader`; models whose tokenizer describes its own answers are read by transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kani_nb.messages import FunctionCall

CallParser = Callable[[str], list[FunctionCall]]

_DECODER = json.JSONDecoder()
_NAME = re.compile(r'"name"\s*:\s*"([^"\\]+)"')
_TAGGED = re.compile(r"<function=([^>\s]+)>(.*?)(</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_MISTRAL = re.compile(r"\s*([\w.-]+)(?:\[CALL_ID\][\w-]*)?\[ARGS\]\s*")


@dataclass(frozen=True, slots=True)
class Markers:
    """What stands before and after one kind of text; without an end it goes on to the end of the answer."""

    start: str
    end: str = ""


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One way to write tool calls: between markers, and how what stands there is read."""

    markers: Markers
    parse: CallParser


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What may stand in an answer.

    Attributes:
        reasoning: markers of the model's reasoning.
        calls: the ways in which it writes tool calls.
        bare_calls: whether an answer that is nothing but JSON of a call is one.
    """

    reasoning: tuple[Markers, ...] = ()
    calls: tuple[CallFormat, ...] = ()
    bare_calls: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether every answer is just text."""
        return not (self.reasoning or self.calls or self.bare_calls)

    @property
    def marker_texts(self) -> tuple[str, ...]:
        """Every marker, and what stands within calls; a tokenizer must not drop those that are tokens of its own."""
        pairs = (*self.reasoning, *(each.markers for each in self.calls))
        inner = ("[ARGS]", "[CALL_ID]") if any(each.markers.start == "[TOOL_CALLS]" for each in self.calls) else ()
        return (*dict.fromkeys(text for pair in pairs for text in (pair.start, pair.end) if text), *inner)


def read_json_calls(text: str, *, is_bare: bool = False) -> list[FunctionCall]:
    """Calls as JSON: an object with `name` and `arguments` (or `parameters`), a list of such, or several in a row.

    An object whose JSON is broken is a call with that text as its arguments, if its name can be made out, so that the
    model can be told; no call is found in text that has none. Where nothing but the JSON says that it is a call
    (`is_bare`), it must have arguments: else a person's name in an answer would be one.
    """
    calls = []
    for value, raw in _json_values(_unfenced(text)):
        found = value if isinstance(value, list) else [value]
        for each in found:
            call = None if is_bare and not _has_arguments(each) else _call(each)
            if call is None and value is None and (named := _NAME.search(raw)) is not None:
                says_so = not is_bare or '"arguments"' in raw or '"parameters"' in raw
                call = FunctionCall(named[1], raw.strip()) if says_so else None
            if call is None:
                return []
            calls.append(call)
    return calls


def read_tagged_calls(text: str) -> list[FunctionCall]:
    """Calls as `<function=NAME><parameter=KEY>VALUE</parameter></function>`; a value that is JSON is read as such.

    What looks like JSON instead is read by `read_json_calls`.
    """
    tagged = list(_TAGGED.finditer(text))
    return [_tagged_call(*match.groups()) for match in tagged] if tagged else read_json_calls(text)


def read_mistral_calls(text: str) -> list[FunctionCall]:
    """Calls as a JSON list, or since Mistral's tokenizer v11 as `NAME[ARGS]{...}`, one after the other."""
    calls: list[FunctionCall] = []
    at = 0
    pieces = text.replace("[TOOL_CALLS]", "")
    while (match := _MISTRAL.match(pieces, at)) is not None:
        try:
            value, at = _DECODER.raw_decode(pieces, match.end())
        except (ValueError, RecursionError):
            return [*calls, FunctionCall(match[1], pieces[match.end() :].strip())]
        calls.append(FunctionCall(match[1], json.dumps(value, ensure_ascii=False)))
    return calls or read_json_calls(pieces)


_THINKING = (Markers("<think>", "</think>"), Markers("[THINK]", "[/THINK]"), Markers("<thinking>", "</thinking>"))
_CALLS = (
    CallFormat(Markers("<tool_call>", "</tool_call>"), read_tagged_calls),
    CallFormat(Markers("[TOOL_CALLS]"), read_mistral_calls),
    CallFormat(Markers("<|python_tag|>"), read_json_calls),
)


def format_of(template: str | None, *, has_tools: bool, reasons: bool = False) -> AnswerFormat:
    """What the answers of a model with this chat template may hold.

    Args:
        template: the source of the chat template; None where there is none.
        has_tools: tools are offered now. Where the template shows no markers for them, every known one is looked for,
            and JSON without any.
        reasons: the prompt ends inside of the model's reasoning.
    """
    text = template or ""
    reasoning = tuple(each for each in _THINKING if each.start in text or each.end in text)
    if reasons and not reasoning:
        reasoning = _THINKING
    if not has_tools:
        return AnswerFormat(reasoning)
    shown = tuple(each for each in _CALLS if each.markers.start in text)
    # Llama 3 is taught to answer with bare JSON, and writes the marker only before built-in tools.
    is_bare = not shown or any(each.markers.start == "<|python_tag|>" for each in shown)
    return AnswerFormat(reasoning, shown or _CALLS, is_bare)


def _tagged_call(name: str, body: str, end: str) -> FunctionCall:
    """One call; of one that was cut off the arguments stay as they are, which no function takes for its own."""
    if not end:
        return FunctionCall(name, body.strip() or "<cut off>")
    return FunctionCall(
        name, json.dumps({key: _value(raw) for key, raw in _PARAMETER.findall(body)}, ensure_ascii=False)
    )


def _has_arguments(value: Any) -> bool:
    record = value.get("function", value) if isinstance(value, dict) else value
    return isinstance(record, dict) and ("arguments" in record or "parameters" in record)


def _call(value: Any) -> FunctionCall | None:
    if not isinstance(value, dict):
        return None
    record = value.get("function") if isinstance(value.get("function"), dict) else value
    assert isinstance(record, dict)
    name = record.get("name")
    arguments = record.get("arguments", record.get("parameters", {}))
    if not isinstance(name, str) or not name:
        return None
    if isinstance(arguments, str):  # OpenAI's own form: JSON within JSON
        return FunctionCall(name, arguments)
    return FunctionCall(name, json.dumps(arguments, ensure_ascii=False))


def _json_values(text: str) -> Iterator[tuple[Any, str]]:
    """Each JSON value of `text` with its source, up to the first that is broken, which is `(None, the rest)`."""
    at = 0
    while at < len(text):
        while at < len(text) and text[at] in " \t\r\n;,":
            at += 1
        if at >= len(text):
            return
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            yield None, text[at:]
            return
        yield value, text[at:end]
        at = end


def _unfenced(text: str) -> str:
    """The inside of a Markdown code block, if `text` is one."""
    match = re.fullmatch(r"\s*```(?:json|tool_call)?\s*\n(.*?)\n?\s*(?:```\s*)?", text, re.DOTALL)
    return match[1] if match is not None else text


def _value(raw: str) -> Any:
    """A parameter's value: JSON if it is JSON, else the text. Whether it fits is seen when it is validated."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw
