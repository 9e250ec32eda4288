"""What the chat pane does: asks, stops, tries again, edits, goes between branches and conversations. No widget here.

Rounds run on the runtime's loop, so that a pane answers while a cell runs and a cell's answer shows in the pane. Each
belongs to its conversation: one that is left goes on, and is there when the pane comes back to it. Any thread may call.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from kani_nb._runtime import Runtime
from kani_nb.conversation.session import ChatSession
from kani_nb.conversation.tree import Turn
from kani_nb.errors import ConversationBusyError, ConversationError, KaniNbError
from kani_nb.generation_params import GenerationParams
from kani_nb.notebook.panels.chat_view import TurnViews, around_view, leaf_below, summary_view
from kani_nb.notebook.panels.pane_round import Asked, OpenStream, PaneRound

#: Turns that are sent anew with each change; those before go out when so many more have come.
CHUNK_TURNS = 40


@dataclass(slots=True, eq=False)
class _Page:
    """A conversation that this pane has shown.

    Attributes:
        round: the one that was asked for here and runs; None where none does.
        shown: what the pane says of the round and its end.
        settled: ids of the turns that went out for good.
    """

    session: ChatSession
    round: PaneRound | None = None
    shown: dict[str, Any] = field(default_factory=lambda: {"running": {}, "problem": {}, "notices": []})
    views: TurnViews = field(default_factory=TurnViews)
    settled: tuple[str, ...] | None = None


class ChatControl:
    """The chat pane without its face.

    Args:
        rt: whose conversations and engine they are.
        show: takes the parts of the state that changed, JSON-safe, in order.
        send: takes a message that may be lost.
        session: the conversation at first; the runtime's current one by default.
    """

    def __init__(
        self,
        rt: Runtime,
        show: Callable[[dict[str, Any]], None],
        send: Callable[[dict[str, Any]], None],
        session: ChatSession | None = None,
    ) -> None:
        self._rt = rt
        self._show = show
        self._send = send
        # What is shown is made and shown under it, so that nothing of one conversation comes after another was opened.
        self._lock = threading.RLock()
        self._params: dict[str, Any] = {}
        self._pages: dict[str, _Page] = {}
        self._page = self._page_of(session or rt.chat)
        self._unwatch = self._page.session.watch(self.refresh)
        self._unwatch_engines, self._unwatch_chats = rt.watch(self._show_around), rt.watch_chats(self._look_around)
        self._show_all()

    @property
    def session(self) -> ChatSession:
        """The conversation that is shown."""
        return self._page.session

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that rounds run on."""
        return self._rt.loop.loop

    @property
    def is_answering(self) -> bool:
        """Whether an answer that was asked for here is on its way in this conversation."""
        return self._page.round is not None

    # -- asking ----------------------------------------------------------------------------------------------------

    def ask(self, text: str, attachments: tuple[Any, ...] = ()) -> None:
        """Send what was written, with its media."""
        prompt = (*attachments, text) if attachments else text
        self._start(text, lambda session, params: session.stream(prompt, append=True, **params), written=text)

    def retry(self, turn_id: str) -> None:
        """Another answer to a turn of this branch.

        Raises:
            ConversationError: it is none.
        """
        number, turn = self._turn(turn_id)
        self._start(turn.prompt.text, lambda session, params: session.stream_retry(number, **params), replaces=turn.id)

    def edit(self, turn_id: str, text: str) -> None:
        """Ask `text` in the place of a turn of this branch.

        Raises:
            ConversationError: it is none.
        """
        number, turn = self._turn(turn_id)
        self._start(
            text,
            lambda session, params: session.stream_edit(number, text, **params),
            replaces=turn.id,
            written=text,
        )

    def answer(self, question_id: str, text: str) -> None:
        """Answer what the running round asks: `y`, `n` or `a` for always. Another question's answer is passed over."""
        running = self._page.round
        if running is not None:
            self.loop.call_soon_threadsafe(running.answer, question_id, text)

    def stop(self) -> bool:
        """End the running answer at its next token; whether there was one."""
        return self.session.stop()

    def _turn(self, turn_id: str) -> tuple[int, Turn]:
        """Its number and itself: what was pressed on a page may be gone from it by now."""
        for number, turn in enumerate(self.session.turns, 1):
            if turn.id == turn_id:
                return number, turn
        raise ConversationError("there is no such turn on this branch", why="it was left for another, or changed")

    def _start(
        self,
        prompt: str,
        begin: Callable[[ChatSession, dict[str, Any]], Any],
        *,
        replaces: str = "",
        written: str | None = None,
    ) -> None:
        self._rt.need_engine()
        with self._lock:
            page, params = self._page, dict(self._params)
            session = page.session
            if page.round is not None or session.is_busy:
                name = session.conversation.name
                raise ConversationBusyError(
                    f"conversation {name!r} is answering", fix="wait for the answer, or press Stop"
                )
            open_stream: OpenStream = lambda: begin(session, params)  # noqa: E731
            page.round = PaneRound(
                session,
                Asked(prompt, open_stream, replaces, written),
                send=lambda delta: self._send_of(page, delta),
                show=lambda whole: self._show_of(page, {"running": whole}),
            )
            self._show_of(page, {"problem": {}, "notices": []})
        self._rt.loop.submit(self._answer(page, page.round))

    async def _answer(self, page: _Page, running: PaneRound) -> None:
        end: dict[str, Any] = {"problem": {}, "notices": []}
        try:
            end = await running.run()
        finally:
            with self._lock:
                page.round = None
                # Together, so that no front end shows the turn twice, or not at all.
                turns = self._turns() if page is self._page else {}
                self._show_of(page, {**turns, "running": {}, **end})
                self._show_around()

    # -- going about -----------------------------------------------------------------------------------------------

    def switch(self, turn_id: str) -> None:
        """Go to the branch through that turn which was used last."""
        self.session.switch(leaf_below(self.session.conversation, turn_id))

    def set_system(self, text: str) -> None:
        """Another system prompt from here on; an empty one is none."""
        self.session.set_system(text.strip() or None)

    def set_params(self, params: Mapping[str, Any]) -> None:
        """How answers are generated from here on.

        Raises:
            ConfigError: a value that cannot be used.
        """
        given = {name: value for name, value in params.items() if value not in (None, "")}
        GenerationParams.from_kwargs(given)
        self._params = given
        self._show_around()

    def new(self) -> None:
        """Begin another conversation. An answer that runs goes on."""
        self._go_to(self._rt.new_chat(system=self.session.system))

    def open(self, name: str) -> None:
        """Go on with another conversation. An answer that runs goes on.

        Raises:
            ConversationError: there is none of that name.
        """
        self._go_to(self._rt.open_chat(name))

    def rename(self, name: str) -> None:
        """Call the conversation `name`.

        Raises:
            ConversationError: another is called so, or it is no name.
        """
        self._rt.rename_chat(self.session, name)

    def list(self, query: str = "") -> list[dict[str, Any]]:
        """The conversations of this notebook, the latest first; with a `query` those that have it in them."""
        store, query = self._rt.store, query.strip()
        summaries = self._rt.list_chats()
        if query and store is not None:
            found = store.search(query, self._rt.notebook)
            summaries = [each for each in summaries if each.id in found or query.lower() in each.name.lower()]
        summaries.sort(key=lambda each: -each.updated_at)
        return [summary_view(each, self.session.conversation.id) for each in summaries]

    def _page_of(self, session: ChatSession) -> _Page:
        known = self._pages.get(session.conversation.id)
        if known is None or known.session is not session:
            known = self._pages[session.conversation.id] = _Page(session)
        return known

    def _go_to(self, session: ChatSession) -> None:
        with self._lock:
            left = self._page
            self._unwatch()
            self._page = self._page_of(session)
            if left is not self._page and left.round is None:
                self._pages.pop(left.session.conversation.id, None)
            self._page.settled = None
            self._unwatch = session.watch(self.refresh)
            self._show_all()
        running = self._page.round
        if running is not None:
            self.loop.call_soon_threadsafe(running.show_whole)

    # -- what is shown ---------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Show the conversation as it is now."""
        with self._lock:
            if self._page.round is None and not self.session.is_deleted:
                self._show_of(self._page, self._turns())
                self._show_around()

    def close(self) -> None:
        """Let go of the runtime. An answer goes on and is kept. Safe to call twice."""
        self._unwatch()
        self._unwatch_engines()
        self._unwatch_chats()
        for page in list(self._pages.values()):
            if page.round is not None:
                self.loop.call_soon_threadsafe(page.round.close)

    def _look_around(self) -> None:
        """A conversation came or went."""
        if self.session.is_deleted:
            self._go_to(self._rt.chat)

    def _show_all(self) -> None:
        self._show_of(self._page, {**self._turns(), **self._page.shown})
        self._show_around()

    def _show_of(self, page: _Page, changes: dict[str, Any]) -> None:
        with self._lock:
            page.shown.update({name: value for name, value in changes.items() if name in page.shown})
            if page is self._page:
                self._show(changes)

    def _send_of(self, page: _Page, delta: dict[str, Any]) -> None:
        if page is self._page:
            self._send(delta)

    def _turns(self) -> dict[str, Any]:
        """The turns that may not be there yet. Those before the last chunk go out again only when there are more."""
        page, conversation = self._page, self.session.conversation
        path = [turn.id for turn in conversation.path()]
        settled = tuple(path[: (max(0, len(path) - 1) // CHUNK_TURNS) * CHUNK_TURNS])
        if settled == page.settled:
            return {"recent": page.views.draw(conversation, len(settled) + 1)}
        page.settled = settled
        views = page.views.draw(conversation)
        return {"history": views[: len(settled)], "recent": views[len(settled) :]}

    def _show_around(self) -> None:
        engine, window = self._rt.engine, None
        if engine is not None:
            with suppress(KaniNbError):
                window = engine.max_context_size if engine.is_loaded else None
        with self._lock:
            around = around_view(
                self.session.conversation, engine=self._rt.engine_name, window_tokens=window, params=self._params
            )
            self._show({"around": around})
