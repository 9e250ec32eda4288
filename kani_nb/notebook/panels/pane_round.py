"""One answer that was asked for in a pane: from Send to the turn that it became, or the reason why there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from kani_nb.conversation.session import ChatReply, ChatSession
from kani_nb.conversation.tree import new_id
from kani_nb.errors import KaniNbError
from kani_nb.notebook.panels.answer_feed import DELTA_EVERY_S, AnswerFeed
from kani_nb.notebook.panels.pane_host import PaneHost
from kani_nb.notebook.secrets import error_words
from kani_nb.notebook.transcript import plain

OpenStream = Callable[[], AsyncIterator[Any]]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a round answers.

    Attributes:
        prompt: shown while it runs.
        open_stream: begins the round.
        replaces: id of the turn in whose place the answer will stand; empty where it is a new turn.
        written: what would be lost if the round failed; None where that is nothing.
    """

    prompt: str
    open_stream: OpenStream
    replaces: str = ""
    written: str | None = None


class PaneRound:
    """A round on its way. On the loop's thread, but for what it is made of.

    Args:
        session: whose round it is.
        asked: what it answers.
        send: takes a delta, which may be lost.
        show: takes the whole of the answer so far.
    """

    def __init__(
        self,
        session: ChatSession,
        asked: Asked,
        *,
        send: Callable[[dict[str, Any]], None],
        show: Callable[[dict[str, Any]], None],
    ) -> None:
        self._session = session
        self._asked = asked
        self._send, self._show = send, show
        self._feed: AnswerFeed | None = None
        self._host: PaneHost | None = None

    async def run(self) -> dict[str, Any]:
        """Run it; `{"problem": ..., "notices": ...}` as the pane shows them. Raises nothing but a cancellation."""
        asked, session = self._asked, self._session
        feed = self._feed = AnswerFeed(
            new_id(), asked.prompt, send=self._send, show=self._show, replaces=asked.replaces
        )
        self._host = PaneHost(feed.ask)
        before, session.host = session.host, self._host
        ticking = asyncio.ensure_future(_tick(feed))
        notices: tuple[str, ...] = ()
        try:
            async with aclosing(asked.open_stream()) as events:  # type: ignore[type-var]
                async for event in events:
                    if not isinstance(event, ChatReply):
                        feed.feed(event)
                        continue
                    notices = event.notices
                    if event.turn.id not in session.conversation.turns:
                        return self._ended("Stopped before the first word: nothing was added.", asked.written)
        except KaniNbError as error:
            is_kept = getattr(error, "reply", None) is not None
            return self._ended(str(error), None if is_kept else asked.written)
        except Exception as error:  # noqa: BLE001 - shown where the person looks; there is no cell for a traceback
            return self._ended(error_words(error), asked.written)
        finally:
            ticking.cancel()
            session.host = before
        return {"problem": {}, "notices": [plain(str(each)) for each in notices]}

    def _ended(self, why: str, written: str | None) -> dict[str, Any]:
        # Files alone are a prompt too: that something comes back is said apart from the words.
        problem = {"text": plain(why), "prompt": plain(written or ""), "gives_back": written is not None}
        return {"problem": problem, "notices": []}

    def answer(self, question_id: str, text: str) -> None:
        """What was pressed where the round asks: `y`, `n` or `a` for always."""
        if self._host is not None:
            self._host.answer(question_id, text)

    def close(self) -> None:
        """Go on without a pane: nobody can be asked any more."""
        if self._host is not None:
            self._host.close()

    def show_whole(self) -> None:
        """Show all of it at once."""
        if self._feed is not None:
            self._feed.show_whole()


async def _tick(feed: AnswerFeed) -> None:
    while True:
        feed.flush()
        await asyncio.sleep(DELTA_EVERY_S / 2)
