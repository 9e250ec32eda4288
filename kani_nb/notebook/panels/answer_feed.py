"""A running answer on its way to a pane: deltas that are numbered, bundled and few, and the whole text now and then.

A Jupyter server drops messages above a thousand a second and a megabyte a second, so what is sent may be lost. A front
end that misses a number waits for the next whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kani_nb.conversation.structured import AnswerRejected
from kani_nb.conversation.tools import ToolStep
from kani_nb.engines.base import PrefillProgress, ReasoningDelta, TextDelta, ToolCallDelta
from kani_nb.notebook.panels.chat_view import step_view
from kani_nb.notebook.stat_line import seconds
from kani_nb.notebook.transcript import StepText, plain, prompt_text

#: Least time between two deltas (20 a second) and between two wholes, which cost as much as the answer is long.
DELTA_EVERY_S, WHOLE_EVERY_S = 0.05, 1.5


class AnswerFeed:
    """One running answer. On the loop's thread only.

    Args:
        run: an id that no other answer has.
        prompt: what was asked, for display.
        send: takes a delta.
        show: takes the whole.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        run: str,
        prompt: str,
        *,
        send: Callable[[dict[str, Any]], None],
        show: Callable[[dict[str, Any]], None],
        replaces: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._prompt, self._replaces = run, plain(prompt), replaces
        self._send, self._show, self._clock = send, show, clock
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._unsent: dict[str, list[str]] = {"text": [], "reasoning": []}
        self._steps: list[StepText] = []
        self._calls: dict[int, list[str]] = {}
        self._notes: list[str] = []
        self._prefill: PrefillProgress | None = None
        self._tokens = self._seq = 0
        self._started_at = clock()
        self._first_at: float | None = None
        self._next_delta = self._next_whole = 0.0
        self._shown: Any = None
        self._question = ""
        self.flush()

    def ask(self, question: str) -> None:
        """Show a question of the round; an empty one is none."""
        self._question = plain(question)
        self._next_delta = 0.0
        self.flush()

    def feed(self, event: Any) -> None:
        """Take one event of `ChatSession.stream`."""
        if isinstance(event, TextDelta) or type(event) is str:
            self._text.append(event)
            self._unsent["text"].append(event)
            self._count()
        elif isinstance(event, ReasoningDelta):
            self._reasoning.append(event.text)
            self._unsent["reasoning"].append(event.text)
            self._count()
        elif isinstance(event, str):
            self._notes.append(str(event))
        elif isinstance(event, PrefillProgress):
            self._prefill = event
        elif isinstance(event, ToolCallDelta):
            call = self._calls.setdefault(event.index, ["", ""])
            call[0] += event.name
            call[1] += event.arguments
        elif isinstance(event, ToolStep):
            function = event.call.function
            result = prompt_text(event.result.parts)
            self._steps.append(StepText(function.name, function.arguments, result, event.is_error, "".join(self._text)))
            self._calls.pop(next(iter(self._calls), -1), None)
            self._begin_again()
        elif isinstance(event, AnswerRejected):
            self._notes.append(f"{event.complaint}; the model tries again")
            self._begin_again()

    def flush(self) -> None:
        """Send what has come since the last time, if it is time to."""
        now = self._clock()
        state = (len(self._steps), tuple(self._notes), self._status(), self._question)
        if now >= self._next_whole or (state != self._shown and now >= self._next_delta):
            self._next_whole, self._next_delta = now + WHOLE_EVERY_S, now + DELTA_EVERY_S
            self._shown = state
            for pieces in self._unsent.values():
                pieces.clear()
            self._seq += 1
            self._show(self._whole())
        elif now >= self._next_delta and any(self._unsent.values()):
            self._next_delta = now + DELTA_EVERY_S
            self._seq += 1
            delta = {name: plain("".join(pieces)) for name, pieces in self._unsent.items() if pieces}
            for pieces in self._unsent.values():
                pieces.clear()
            self._send({"kind": "delta", "run": self._run, "seq": self._seq, "numbers": self._numbers(), **delta})

    def _count(self) -> None:
        self._tokens += 1
        if self._first_at is None:
            self._first_at = self._clock()

    def _begin_again(self) -> None:
        self._text.clear()
        self._unsent["text"].clear()
        self._next_whole = 0.0

    def _whole(self) -> dict[str, Any]:
        return {
            "run": self._run,
            "seq": self._seq,
            "prompt": self._prompt,
            "replaces": self._replaces,
            "text": plain("".join(self._text)),
            "reasoning": plain("".join(self._reasoning)),
            "steps": [step_view(step) for step in self._all_steps()],
            "notes": list(self._notes),
            "status": self._status(),
            "numbers": self._numbers(),
            "question": self._question,
        }

    def _all_steps(self) -> list[StepText]:
        return [*self._steps, *(StepText(name, arguments) for name, arguments in self._calls.values())]

    def _status(self) -> str:
        if self._calls:
            return f"running {next(iter(self._calls.values()))[0]}"
        if self._text:
            return "answering"
        if self._reasoning:
            return "thinking"
        if self._prefill is None:
            return "waiting for the engine"
        done, total = self._prefill.done_tokens, self._prefill.total_tokens
        cached = f", {self._prefill.cached_tokens:,} cached" if self._prefill.cached_tokens else ""
        return f"reading the prompt {done:,}/{total:,} tokens{cached}"

    def _numbers(self) -> str:
        now = self._clock()
        parts = [seconds(now - self._started_at)]
        if self._tokens:
            parts.append(f"{self._tokens:,} tokens")
        if self._first_at is not None and self._tokens > 1 and now > self._first_at:
            parts.append(f"{(self._tokens - 1) / (now - self._first_at):.1f} tok/s")
        return " · ".join(parts)
