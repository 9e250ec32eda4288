"""Reads an answer as it is written: text, reasoning and tool calls, each as its own kind of event.

Markers are matched across the pieces in which text arrives: what could be the beginning of one is held back, and no
longer than that. Calls are handed on whole. What is between a call's markers and is none stays text, so that nothing
the model said is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

from kani_nb.engines.base import ReasoningDelta, StreamEvent, TextDelta, ToolCallDelta
from kani_nb.engines.parsers.formats import AnswerFormat, CallFormat, Markers, read_json_calls
from kani_nb.messages import ChatMessage, FunctionCall, MessagePart, ReasoningPart, ToolCall

_BARE_STARTS = ("{", "[{", "```json", "```tool_call", "```\n{")


class PlainReader:
    """An answer that is nothing but text; as `AnswerReader`."""

    def __init__(self) -> None:
        self._text: list[str] = []

    def push(self, text: str, tokens: int | None = None) -> list[StreamEvent]:
        """The text."""
        self._text.append(text)
        return [TextDelta(text, tokens)]

    def finish(self) -> list[StreamEvent]:
        """Nothing: nothing is ever held back."""
        return []

    @property
    def message(self) -> ChatMessage:
        """The message so far."""
        return ChatMessage.assistant("".join(self._text))


class AnswerReader:
    """One answer of a model. `push` each piece of text, `finish` at the end, and take `message`.

    Args:
        answer_format: what may stand in it.
        tools: names of the tools that were offered; JSON without markers is a call only of one of these.
        prompt_end: the last characters of the prompt: an opening marker of reasoning may already stand there.
    """

    def __init__(self, answer_format: AnswerFormat, tools: Sequence[str] = (), prompt_end: str = "") -> None:
        self._format = answer_format
        self._tools = frozenset(tools)
        self._held = ""
        self._spaces = ""  # at the end of the text so far: dropped where a call follows, or nothing
        self._reasoning_open: Markers | None = self._open_in(prompt_end)
        self._call_open: CallFormat | None = None
        self._is_bare = False
        self._has_reasoned = False
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[FunctionCall] = []
        self._ids: list[str] = []
        self._tokens: int | None = None

    def push(self, text: str, tokens: int | None = None) -> list[StreamEvent]:
        """What `text` (and what was held back) is, as far as it can be told.

        Args:
            text: the next piece.
            tokens: that the answer has so far, for the events.
        """
        self._tokens = tokens if tokens is not None else self._tokens
        self._held += text
        events: list[StreamEvent] = []
        while self._step(events, is_end=False):
            pass
        return events

    def finish(self) -> list[StreamEvent]:
        """What was held back: the answer is at its end."""
        events: list[StreamEvent] = []
        while self._step(events, is_end=True):
            pass
        return events

    @property
    def is_reasoning(self) -> bool:
        """Whether what comes next is reasoning."""
        return self._reasoning_open is not None

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls so far."""
        return tuple(ToolCall(each, call) for each, call in zip(self._ids, self._calls, strict=True))

    @property
    def message(self) -> ChatMessage:
        """The message so far: reasoning as a part before the text, calls beside it."""
        text, reasoning = "".join(self._text), "".join(self._reasoning).strip()
        content: str | tuple[MessagePart | str, ...] = (ReasoningPart(reasoning), text) if reasoning else text
        return ChatMessage.assistant(content, tool_calls=self.tool_calls or None)

    # -- one decision at a time ------------------------------------------------------------------------------------

    def _step(self, events: list[StreamEvent], *, is_end: bool) -> bool:
        """Decide about the beginning of what is held; whether there may be more to decide."""
        if not self._held:
            return False
        if self._call_open is not None:
            return self._in_call(self._call_open, events, is_end=is_end)
        if self._reasoning_open is not None:
            return self._in_reasoning(self._reasoning_open, events, is_end=is_end)
        if self._may_be_bare():
            return self._in_bare(events, is_end=is_end)
        return self._in_text(events, is_end=is_end)

    def _in_text(self, events: list[StreamEvent], *, is_end: bool) -> bool:
        openers: list[tuple[str, Markers | CallFormat]] = [(each.markers.start, each) for each in self._format.calls]
        # Reasoning comes before the answer: in its midst a marker is something that the answer speaks of.
        begins = len(self._held) - len(self._held.lstrip())
        thoughts = [] if self._text else [each for each in self._format.reasoning if self._could_begin(each, begins)]
        openers += [(each.start, each) for each in thoughts]
        found = [(at, start, what) for start, what in openers if (at := self._held.find(start)) >= 0]
        if not found:
            keep = 0 if is_end else max((_overlap(self._held, start) for start, _ in openers), default=0)
            self._say(events, self._take(len(self._held) - keep))
            return False
        at, start, what = min(found, key=lambda each: each[0])
        self._say(events, self._take(at))
        self._take(len(start))
        if isinstance(what, CallFormat):
            self._call_open = what
        else:
            self._reasoning_open = what
        return True

    def _could_begin(self, markers: Markers, at: int) -> bool:
        """Whether what is held has this opening at its very beginning, or might have."""
        begun = self._held[at:]
        return begun.startswith(markers.start) or markers.start.startswith(begun)

    def _in_reasoning(self, markers: Markers, events: list[StreamEvent], *, is_end: bool) -> bool:
        at = self._held.find(markers.end)
        keep = 0 if is_end else _overlap(self._held, markers.end)
        thought = self._take(at if at >= 0 else len(self._held) - keep)
        if not self._reasoning:
            thought = thought.lstrip()
        if thought:
            self._reasoning.append(thought)
            events.append(ReasoningDelta(thought))
        if at < 0:
            return False
        self._take(len(markers.end))
        self._reasoning_open = None
        self._has_reasoned = True
        return True

    def _in_call(self, call: CallFormat, events: list[StreamEvent], *, is_end: bool) -> bool:
        end = call.markers.end
        at = self._held.find(end) if end else -1
        if at < 0 and not is_end:
            return False
        inside = self._take(at if at >= 0 else len(self._held))
        self._call_open = None
        calls = call.parse(inside)
        if calls:
            self._call(events, calls)
        else:
            self._say(events, f"{call.markers.start}{inside}{end if at >= 0 else ''}")
        if at >= 0:
            self._take(len(end))
        return True

    def _may_be_bare(self) -> bool:
        """Whether the answer so far could be nothing but the JSON of a call."""
        if not self._format.bare_calls or self._text or self._calls:
            return False
        begun = self._held.lstrip()
        self._is_bare = not begun or any(begun.startswith(each) or each.startswith(begun) for each in _BARE_STARTS)
        return self._is_bare

    def _in_bare(self, events: list[StreamEvent], *, is_end: bool) -> bool:
        if not is_end:
            return False
        held = self._take(len(self._held))
        calls = read_json_calls(held, is_bare=True)
        if any(call.name in self._tools for call in calls):
            self._call(events, calls)
        else:
            self._say(events, held)
        return False

    # -- what is found ---------------------------------------------------------------------------------------------

    def _take(self, length: int) -> str:
        taken, self._held = self._held[:length], self._held[length:]
        return taken

    def _say(self, events: list[StreamEvent], text: str) -> None:
        text = self._spaces + text
        if not self._text and (self._has_reasoned or self._calls):
            text = text.lstrip()
        body = text.rstrip()
        self._spaces = text[len(body) :]
        if body:
            self._text.append(body)
            events.append(TextDelta(body, self._tokens))

    def _call(self, events: list[StreamEvent], calls: Sequence[FunctionCall]) -> None:
        self._spaces = ""
        for call in calls:
            events.append(ToolCallDelta(len(self._calls), call.name, call.arguments))
            self._calls.append(call)
            self._ids.append(ToolCall.from_function_call(call).id)

    def _open_in(self, prompt_end: str) -> Markers | None:
        """The reasoning that the prompt itself has opened."""
        opened = [(prompt_end.rfind(each.start), each) for each in self._format.reasoning]
        at, markers = max(opened, key=lambda each: each[0], default=(-1, None))
        return markers if markers is not None and at >= 0 and markers.end not in prompt_end[at:] else None


def _overlap(held: str, marker: str) -> int:
    """Characters at the end of `held` that could be the beginning of `marker`."""
    longest = min(len(marker) - 1, len(held))
    return next((size for size in range(longest, 0, -1) if held.endswith(marker[:size])), 0)
