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
from kani_nb.engines.base import ReasoningDelta, TextDelta
from kani_nb.notebook.panels.chat_view import step_view
from kani_nb.notebook.round_so_far import RoundSoFar
from kani_nb.notebook.stat_line import seconds
from kani_nb.notebook.transcript import plain, shortened

#: Least time between two deltas (20 a second) and between two wholes, which cost as much as the answer is long.
DELTA_EVERY_S, WHOLE_EVERY_S = 0.05, 1.5
#: Characters of a prompt that every whole repeats; the turn that it becomes has all of it.
_LONGEST_PROMPT = 20_000


class AnswerFeed:
    """One running answer. On the loop's thread only.

    Args:
        run: an id that no other answer has.
        prompt: what was asked, for display.
        send: takes a delta.
        show: takes the whole.
        replaces: id of the turn in whose place the answer will stand.
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
        self._run, self._prompt, self._replaces = run, plain(shortened(prompt, _LONGEST_PROMPT)), replaces
        self._send, self._show, self._clock = send, show, clock
        self._so_far = RoundSoFar(clock)
        self._unsent: dict[str, list[str]] = {"text": [], "reasoning": []}
        self._question: dict[str, str] = {}
        self._seq = 0
        self._next_delta = self._next_whole = 0.0
        self._shown: Any = None
        self._shown_status = ""
        self.flush()

    def ask(self, question: dict[str, str]) -> None:
        """Show a question of the round, `{"id", "text"}`; an empty record is none."""
        self._question = {name: plain(each) for name, each in question.items()}
        self._next_delta = 0.0
        self.flush()

    def show_whole(self) -> None:
        """Show all of it at once, to a page that has seen nothing yet."""
        self._next_whole = 0.0
        self.flush()

    def feed(self, event: Any) -> None:
        """Take one event of `ChatSession.stream`."""
        self._so_far.take(event)
        if isinstance(event, TextDelta) or type(event) is str:
            self._unsent["text"].append(event)
        elif isinstance(event, ReasoningDelta):
            self._unsent["reasoning"].append(event.text)
        elif isinstance(event, (ToolStep, AnswerRejected)):
            self._unsent["text"].clear()
            self._next_whole = 0.0

    def flush(self) -> None:
        """Send what has come since the last time, if it is time to."""
        now = self._clock()
        state = (self._so_far.stage, self._question)
        if now >= self._next_whole or (state != self._shown and now >= self._next_delta):
            self._next_whole, self._shown = now + WHOLE_EVERY_S, state
            self._take_unsent()
            self._show({**self._head(now), **self._whole()})
        elif now >= self._next_delta and (any(self._unsent.values()) or self._status() != self._shown_status):
            delta = {name: plain("".join(pieces)) for name, pieces in self._take_unsent().items() if pieces}
            self._send({"kind": "delta", **self._head(now), **delta})

    def _take_unsent(self) -> dict[str, list[str]]:
        taken, self._unsent = self._unsent, {name: [] for name in self._unsent}
        return taken

    def _head(self, now: float) -> dict[str, Any]:
        """What every message has: which one it is, and what changes without there being more of the answer."""
        self._next_delta = now + DELTA_EVERY_S
        self._seq += 1
        self._shown_status = self._status()
        return {"run": self._run, "seq": self._seq, "status": self._shown_status, "numbers": self._numbers()}

    def _whole(self) -> dict[str, Any]:
        so_far = self._so_far
        return {
            "prompt": self._prompt,
            "replaces": self._replaces,
            "text": plain(so_far.text),
            "reasoning": plain("".join(so_far.reasoning)),
            "steps": [step_view(step) for step in so_far.steps],
            "notes": [plain(note) for note in so_far.notes],
            "question": self._question,
        }

    def _status(self) -> str:
        return plain(self._so_far.status() or "answering")

    def _numbers(self) -> str:
        now, so_far = self._clock(), self._so_far
        parts = [seconds(now - so_far.started_at)]
        if so_far.tokens:
            parts.append(f"{so_far.tokens:,} tokens")
        if so_far.first_at is not None and so_far.tokens > 1 and now > so_far.first_at:
            parts.append(f"{(so_far.tokens - 1) / (now - so_far.first_at):.1f} tok/s")
        return " · ".join(parts)
