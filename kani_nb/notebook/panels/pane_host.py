"""Functions that a model calls in a pane: run in threads of their own, and asked for in the pane."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kani_nb.conversation.tools import WorkerHost


class PaneHost(WorkerHost):
    """Asks in the pane, and waits for a press of a button; a Stop that cancels the round ends the question too.

    Args:
        show: takes the question, and an empty text when it is answered. On the loop's thread.
    """

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._answer: asyncio.Future[str] | None = None

    async def ask(self, question: str) -> str:
        """See `Host.ask`."""
        self._answer = asyncio.get_running_loop().create_future()
        self._show(question)
        try:
            return await self._answer
        finally:
            self._answer = None
            self._show("")

    def answer(self, text: str) -> None:
        """What was pressed. On the loop's thread; without a question it is nothing."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(text)
