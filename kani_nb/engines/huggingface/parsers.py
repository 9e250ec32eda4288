"""Which reader takes a model's answers apart: transformers' own, where the tokenizer describes them, else ours.

Newer tokenizers come with a `response_template`, which says where reasoning and calls stand; transformers follows it
while text streams in. All others are read by the markers that their chat template shows (`kani_nb.engines.parsers`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kani_nb.engines.base import ReasoningDelta, StreamEvent, TextDelta, ToolCallDelta
from kani_nb.engines.parsers import AnswerReader, format_of
from kani_nb.functions import tool_schemas
from kani_nb.messages import ChatMessage, FunctionCall, MessagePart, ReasoningPart, ToolCall

#: Names under which templates on the Hub keep reasoning.
_REASONING = ("reasoning_content", "reasoning", "thinking")
#: What reading something that is no call raises.
_NO_CALL = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
#: How many of the prompt's last tokens are looked at: what a template writes before the answer is short.
_PROMPT_END = 48


class Reader(Protocol):
    """Takes an answer apart while it is written."""

    def push(self, text: str, tokens: int | None = None) -> list[StreamEvent]:
        """What the next piece of text is, as far as it can be told."""

    def finish(self) -> list[StreamEvent]:
        """What was held back."""

    @property
    def message(self) -> ChatMessage:
        """The message so far."""


@dataclass(frozen=True, slots=True)
class ReadBy:
    """A reader, and the ids of the special tokens that must reach it as text."""

    reader: Reader
    kept_ids: frozenset[int]


def reader_for(tokenizer: Any, prompt_ids: Sequence[int], functions: Sequence[Any] | None) -> ReadBy | None:
    """The reader of an answer to this prompt; None where every answer is just text."""
    tools = tool_schemas(functions)
    names = [each["function"]["name"] for each in tools if "function" in each]
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    if getattr(tokenizer, "response_template", None) and hasattr(tokenizer, "get_response_parser"):
        parser = tokenizer.get_response_parser(prefix=list(prompt_ids), tools=tools or None)
        return ReadBy(ResponseTemplateReader(parser), frozenset(special.values()))
    prompt_end = tokenizer.decode(list(prompt_ids)[-_PROMPT_END:], skip_special_tokens=False)
    opens_reasoning = prompt_end.rstrip().endswith(("<think>", "[THINK]", "<thinking>"))
    answer_format = format_of(_template_of(tokenizer, tools), has_tools=bool(tools), reasons=opens_reasoning)
    if answer_format.is_plain:
        return None
    kept = frozenset(special[text] for text in answer_format.marker_texts if text in special)
    return ReadBy(AnswerReader(answer_format, names, prompt_end if opens_reasoning else ""), kept)


def _template_of(tokenizer: Any, tools: list[dict[str, Any]]) -> str | None:
    """The source of the template that is used: a tokenizer may have one for tools."""
    if getattr(tokenizer, "chat_template", None) is None:
        return None
    template: str = tokenizer.get_chat_template(tools=tools or None)
    return template


class ResponseTemplateReader:
    """A tokenizer's own description of its answers, followed by transformers; see `Reader`.

    Args:
        parser: transformers' `ResponseParser`, which has seen the prompt.
    """

    def __init__(self, parser: Any) -> None:
        self._parser = parser
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCall] = []
        self._raw = ""
        self._read = 0  # how far `_raw` has become events
        self._is_broken = False
        self._region = ""
        for event in parser.initial_events:  # what the prompt has opened
            self._note_region(event)

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._region in _REASONING

    def _note_region(self, event: dict[str, Any]) -> None:
        self._region = str(event.get("field") or "") if event["type"] != "region_close" else ""

    def push(self, text: str, tokens: int | None = None) -> list[StreamEvent]:
        """See `Reader.push`."""
        if self._is_broken:
            return self._say(text, tokens)
        self._raw += text
        try:
            return self._events(self._parser.feed(text), tokens)
        except _NO_CALL:  # a call that is none: what could not be read is shown as it is
            return self._give_up(tokens)

    def finish(self) -> list[StreamEvent]:
        """See `Reader.finish`."""
        if self._is_broken:
            return []
        try:
            _, events = self._parser.finalize()
        except _NO_CALL:
            return self._give_up(None)
        return self._events(events, None)

    @property
    def message(self) -> ChatMessage:
        """See `Reader.message`."""
        text, reasoning = "".join(self._text), "".join(self._reasoning).strip()
        content: str | tuple[MessagePart | str, ...] = (ReasoningPart(reasoning), text) if reasoning else text
        return ChatMessage.assistant(content, tool_calls=tuple(self._calls) or None)

    def _give_up(self, tokens: int | None) -> list[StreamEvent]:
        self._is_broken = True
        return self._say(self._raw[self._read :], tokens)

    def _say(self, text: str, tokens: int | None) -> list[StreamEvent]:
        if not text:
            return []
        self._text.append(text)
        return [TextDelta(text, tokens)]

    def _events(self, events: Sequence[dict[str, Any]], tokens: int | None) -> list[StreamEvent]:
        found: list[StreamEvent] = []
        for event in events:
            self._note_region(event)
            field, text = event.get("field"), event.get("text") or ""
            if event["type"] == "region_chunk" and not event.get("dirty"):
                self._read = max(self._read, self._raw.find(text, self._read) + len(text))
                if field in _REASONING and text:
                    self._reasoning.append(text)
                    found.append(ReasoningDelta(text))
                elif field == "content":
                    found += self._say(text, tokens)
            elif event["type"] == "region_close" and field == "tool_calls":
                self._read = len(self._raw)
                found += self._call(event["value"])
        return found

    def _call(self, value: Any) -> list[StreamEvent]:
        found: list[StreamEvent] = []
        for each in value if isinstance(value, list) else [value]:
            record = each.get("function", each)
            arguments = record.get("arguments", {})
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            found.append(ToolCallDelta(len(self._calls), record["name"], text))
            self._calls.append(ToolCall.from_function_call(FunctionCall(record["name"], text)))
        return found
