"""Functions that a model calls in a pane: run in threads of their own, and asked for in the pane."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kani_nb.conversation.tools import APPROVAL_CHOICES, CannotAskError, WorkerHost
from kani_nb.conversation.tree import new_id


class PaneHost(WorkerHost):
    """Asks in the pane, and waits for a press of a button; a Stop that cancels the round ends the question too.

    Args:
        show: takes the question as `{"id", "text"}`, and an empty record when it is answered. On the loop's thread.
    """

    def __init__(self, show: Callable[[dict[str, str]], None]) -> None:
        self._show = show
        self._asked = ""
        self._is_closed = False
        self._answer: asyncio.Future[str] | None = None

    async def ask(self, question: str) -> str:
        """See `Host.ask`."""
        if self._is_closed:
            raise CannotAskError("the pane that would ask was closed")
        self._asked, self._answer = new_id(), asyncio.get_running_loop().create_future()
        self._show({"id": self._asked, "text": question.removesuffix(APPROVAL_CHOICES).rstrip()})
        try:
            return await self._answer
        finally:
            self._answer = None
            self._show({})

    def close(self) -> None:
        """Nobody looks any more: what is asked is refused. On the loop's thread."""
        self._is_closed = True
        self.answer(self._asked, "n")

    def answer(self, question_id: str, text: str) -> None:
        """What was pressed; nothing where another question stands there by now. On the loop's thread."""
        if question_id == self._asked and self._answer is not None and not self._answer.done():
            self._answer.set_result(text)
