"""A running round as its events tell of it: the answer, what was thought and called, and what happens now.

What the output of a cell and the chat pane have in common; how it is shown is theirs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kani_nb.conversation.structured import AnswerRejected
from kani_nb.conversation.tools import ToolStep
from kani_nb.engines.base import PrefillProgress, ReasoningDelta, TextDelta, ToolCallDelta
from kani_nb.notebook.transcript import StepText, prompt_text


class RoundSoFar:
    """What has been heard of a round. Not safe for more than one thread.

    Args:
        clock: seconds that only grow.

    Attributes:
        pieces: of the answer; those before a call, or of an answer that was rejected, are taken out again.
        reasoning: of the model, in pieces.
        notes: what the round has to say of itself.
        prefill: how far the prompt is read.
        tokens: pieces of answer and reasoning that have come.
        started_at: when the round began.
        first_at: when the first of those pieces came.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.pieces: list[str] = []
        self.reasoning: list[str] = []
        self.notes: list[str] = []
        self.prefill: PrefillProgress | None = None
        self.tokens = 0
        self.started_at = clock()
        self.first_at: float | None = None
        self._steps: list[StepText] = []
        self._calls: dict[int, list[str]] = {}

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.pieces)

    @property
    def steps(self) -> tuple[StepText, ...]:
        """The calls that have ended, and those that run."""
        return (*self._steps, *(StepText(name, arguments) for name, arguments in self._calls.values()))

    @property
    def ended(self) -> StepText:
        """The call that has ended last; there must be one."""
        return self._steps[-1]

    @property
    def stage(self) -> tuple[object, ...]:
        """Changes with everything but text, reasoning and the arguments of a call that grow."""
        return (len(self._steps), tuple(name for name, _ in self._calls.values()), tuple(self.notes))

    def take(self, event: Any) -> bool:
        """Take one event of `ChatSession.stream`; whether it was one of a round's progress, and not its end."""
        if isinstance(event, TextDelta) or type(event) is str:
            self.pieces.append(event)
            self._count()
        elif isinstance(event, ReasoningDelta):
            self.reasoning.append(event.text)
            self._count()
        elif isinstance(event, str):  # a notice of the session
            self.notes.append(str(event))
        elif isinstance(event, PrefillProgress):
            self.prefill = event
        elif isinstance(event, ToolCallDelta):
            call = self._calls.setdefault(event.index, ["", ""])
            call[0] += event.name
            call[1] += event.arguments
        elif isinstance(event, ToolStep):
            function, result = event.call.function, prompt_text(event.result.parts)
            # What was said before a call belongs to it, and the answer begins anew.
            self._steps.append(StepText(function.name, function.arguments, result, event.is_error, self.text))
            self._calls.pop(next(iter(self._calls), -1), None)
            self.pieces.clear()
        elif isinstance(event, AnswerRejected):
            self.notes.append(f"{event.complaint}; the model tries again")
            self.pieces.clear()
        else:
            return False
        return True

    def status(self, *, waited_s: int = 0) -> str:
        """What happens before the first text, in words; empty from then on.

        Args:
            waited_s: whole seconds to name while the engine has not begun; none are named for 0.
        """
        if self._calls:
            return f"running {next(iter(self._calls.values()))[0]}"
        if self.pieces:
            return ""
        if self.reasoning:
            return "thinking"
        if self.prefill is None:
            return f"waiting for the engine, {waited_s} s" if waited_s else "waiting for the engine"
        cached = f", {self.prefill.cached_tokens:,} cached" if self.prefill.cached_tokens else ""
        return f"reading the prompt {self.prefill.done_tokens:,}/{self.prefill.total_tokens:,} tokens{cached}"

    def _count(self) -> None:
        self.tokens += 1
        if self.first_at is None:
            self.first_at = self._clock()
