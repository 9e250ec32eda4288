"""A chat server's chunks, put together: deltas as they come, and the whole answer at the end.

Takes what OpenAI-compatible servers really send: chunks or one whole answer, usage where they like, calls with or
without an index, halves of a character in two chunks. Nothing here opens a connection.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kani_nb.engines.base import (
    Completion,
    FinishReason,
    ReasoningDelta,
    StreamEvent,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
)
from kani_nb.engines.httpclient.sse import ServerEvent
from kani_nb.engines.openai.messages import whole_text
from kani_nb.errors import GenerationError
from kani_nb.messages import ChatMessage, FunctionCall, MessagePart, ReasoningPart, ToolCall

#: A server that does not keep the limit is left when an answer of so many tokens cannot be so long: of bytes, of
#: pieces (some proxies send letter by letter), and of chunks with nothing in them.
_BYTES_PER_TOKEN = 16
_PIECES_PER_TOKEN = 8
_LEEWAY = 256

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "max_tokens": FinishReason.LENGTH,
    "tool_calls": FinishReason.TOOL_CALLS,
    "function_call": FinishReason.TOOL_CALLS,
}


@dataclass(slots=True)
class _Call:
    id: str = ""
    name: str = ""
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class AnswerBuilder:
    """One answer, from its chunks.

    Args:
        max_tokens: what the server was told to keep to.
        error_words: what an error that came as JSON says, without secrets.
        counts_pieces: whether each piece of text is a token, and counts as one where the server gives no usage.

    Attributes:
        has_begun: whether a chunk was read.
        is_whole: whether the server said that the answer is.
        is_over: whether the answer has become longer than the limit allows.
    """

    max_tokens: int
    error_words: Callable[[Any], str]
    counts_pieces: bool = False
    has_begun: bool = False
    is_whole: bool = False
    usage: Mapping[str, Any] | None = None
    _text: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _calls: list[_Call] = field(default_factory=list)
    _places: dict[Any, int] = field(default_factory=dict)
    _held: dict[str, str] = field(default_factory=dict)
    _reason: FinishReason | None = None
    _logprobs: list[TokenLogprob] = field(default_factory=list)
    _chunks: int = 0
    _pieces: int = 0
    _bytes: int = 0

    def read(self, event: ServerEvent) -> list[StreamEvent]:
        """What is new in one event of the server's stream.

        Raises:
            GenerationError: it is an error, or no JSON.
        """
        if event.data.strip() == "[DONE]":
            self.is_whole = True
            return []
        try:
            chunk = json.loads(event.data)
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            raise GenerationError(
                "the server sent a piece that is not whole JSON",
                why=self.error_words(event.data[:200]),
                fix="ask again; if it happens each time, look at the server's log",
            )
        if chunk.get("error") or chunk.get("object") == "error" or event.event == "error":
            raise GenerationError("the server failed while it answered", why=self.error_words(chunk), fix="ask again")
        self.has_begun = True
        self._chunks += 1
        if isinstance(usage := chunk.get("usage"), dict):
            self.usage = usage
        choices = chunk.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            return self._read_choice(choices[0])
        if event.event == "json":  # the whole body, and no answer in it
            raise GenerationError("the server sent no answer", why=self.error_words(chunk))
        return []

    def _read_choice(self, choice: Mapping[str, Any]) -> list[StreamEvent]:
        delta = choice.get("delta") or choice.get("message") or {}
        if not isinstance(delta, dict):
            return []
        self._read_logprobs(choice.get("logprobs"))
        events: list[StreamEvent] = []
        self.is_whole |= "message" in choice  # no piece: the whole answer at once
        self.counts_pieces &= not self.is_whole
        reasoning = self._whole("reasoning", delta.get("reasoning_content") or delta.get("reasoning"))
        if reasoning:
            self._reasoning.append(reasoning)
            events.append(ReasoningDelta(reasoning))
        text = self._whole("text", delta.get("content") or delta.get("refusal"))
        self._pieces += bool(reasoning or text)
        if text:
            self._text.append(text)
            events.append(TextDelta(text, self.completion_tokens))
        calls = delta.get("tool_calls")
        if legacy := delta.get("function_call"):
            calls = [{"index": 0, "function": legacy}]
        for number, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict):
                events.append(self._read_call(call, number))
        if (reason := choice.get("finish_reason")) is not None:
            self.is_whole = True
            self._reason = _REASONS.get(str(reason), FinishReason.STOP)
        return events

    def _read_logprobs(self, given: Any) -> None:
        """The probabilities of a chunk's tokens; what has another form than OpenAI's is left out."""
        content = given.get("content") if isinstance(given, dict) else None
        for each in content if isinstance(content, list) else ():
            others = each.get("top_logprobs") or () if isinstance(each, dict) else ()
            try:
                best = tuple((str(other["token"]), float(other["logprob"])) for other in others)
                self._logprobs.append(TokenLogprob(str(each["token"]), float(each["logprob"]), best))
            except (KeyError, TypeError, ValueError):
                continue

    def _read_call(self, call: Mapping[str, Any], number: int) -> ToolCallDelta:
        """Some servers give no index, or the same one to each call: then a new id is a new call."""
        function = call.get("function")
        function = function if isinstance(function, dict) else {}
        call_id = str(call.get("id") or "")
        key = call.get("index")
        key = key if isinstance(key, int | str) else number
        place = self._places.get(key)
        if place is None or (call_id and self._calls[place].id and self._calls[place].id != call_id):
            self._calls.append(_Call())
            place = self._places[key] = len(self._calls) - 1
        known = self._calls[place]
        known.id = known.id or call_id
        name = str(function.get("name") or "")
        if name and known.name == name:
            name = ""  # repeated with each piece
        known.name += name
        given = function.get("arguments")
        arguments = given if isinstance(given, str) else json.dumps(given) if given is not None else ""
        known.arguments.append(arguments)
        self._bytes += len(arguments)
        return ToolCallDelta(place, name, arguments)

    def _whole(self, kind: str, piece: Any) -> str:
        """The text of a piece; half a character at its end waits for the other."""
        if isinstance(piece, list):  # parts
            piece = "".join(str(each.get("text") or "") for each in piece if isinstance(each, dict))
        if not isinstance(piece, str) or not piece:
            return ""
        text = self._held.pop(kind, "") + piece
        if "\ud800" <= text[-1] <= "\udbff":
            self._held[kind], text = text[-1], text[:-1]
        self._bytes += len(text.encode("utf-8", "replace"))
        return whole_text(text)

    @property
    def is_over(self) -> bool:
        """Whether no answer within the limit is so long."""
        tokens = self.max_tokens
        return self._bytes > _BYTES_PER_TOKEN * tokens + _LEEWAY or self._chunks > _PIECES_PER_TOKEN * tokens + _LEEWAY

    @property
    def has_reason(self) -> bool:
        """Whether it is known why the answer ended."""
        return self._reason is not None or self.is_over

    def tokens(self, name: str) -> int | None:
        """A number of the server's usage, if it gave one."""
        value = (self.usage or {}).get(name)
        return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

    @property
    def completion_tokens(self) -> int | None:
        """Tokens of the answer so far: by the server's usage, else by its pieces where those are tokens."""
        if (told := self.tokens("completion_tokens")) is not None:
            return told
        # Of calls it is not known how many tokens a piece has.
        return self._pieces if self.counts_pieces and self._pieces and not self._calls else None

    def completion(self, *, seed: int | None = None) -> Completion:
        """The whole answer, or as much as there is."""
        text = "".join(self._text)
        calls = tuple(
            ToolCall.from_function_call(FunctionCall(each.name, "".join(each.arguments) or "{}"), each.id or None)
            for each in self._calls
        )
        content: str | tuple[MessagePart | str, ...] | None = text
        if self._reasoning:
            content = (ReasoningPart("".join(self._reasoning)), *((text,) if text else ()))
        elif calls and not text:
            content = None
        reason = self._reason or (FinishReason.LENGTH if self.is_over else FinishReason.STOP)
        if calls and reason is FinishReason.STOP:
            reason = FinishReason.TOOL_CALLS
        details = (self.usage or {}).get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        return Completion(
            ChatMessage.assistant(content, tool_calls=calls or None),
            self.tokens("prompt_tokens"),
            self.completion_tokens,
            cached_tokens=cached if isinstance(cached, int) else None,
            finish_reason=reason,
            seed=seed,
            logprobs=self._logprobs,
        )
