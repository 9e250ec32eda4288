"""What the chat pane does: asks, stops, tries again, edits, goes between branches and conversations. No widget here.

Rounds run on the runtime's loop, so that a pane answers while a cell runs and a cell's answer shows in the pane. Any
thread may call.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from kani_nb._runtime import Runtime
from kani_nb.conversation.session import ChatReply, ChatSession
from kani_nb.conversation.tree import new_id
from kani_nb.errors import ConversationBusyError, KaniNbError
from kani_nb.generation_params import GenerationParams
from kani_nb.notebook.panels.answer_feed import DELTA_EVERY_S, AnswerFeed
from kani_nb.notebook.panels.chat_view import context_view, leaf_below, summary_view, turn_views
from kani_nb.notebook.panels.pane_host import PaneHost

#: Turns that are sent anew with each change; those before go out when so many more have come.
CHUNK_TURNS = 40
OpenStream = Callable[[], AsyncIterator[Any]]


class ChatControl:
    """The chat pane without its face.

    Args:
        rt: whose conversations and engine they are.
        show: takes the parts of the state that changed, JSON-safe.
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
        self._lock = threading.RLock()
        self._session = session or rt.chat
        self._params: dict[str, Any] = {}
        self._old: tuple[str, ...] = ()
        self._rounds = 0
        self._host: PaneHost | None = None
        self._is_closed = False
        self._unwatch_engines = rt.watch(self._show_around)
        self._unwatch = self._session.watch(self.refresh)
        self._show(self._changes(is_new=True))
        self._show_around()

    @property
    def session(self) -> ChatSession:
        """The conversation that is shown."""
        return self._session

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that rounds run on."""
        return self._rt.loop.loop

    @property
    def is_answering(self) -> bool:
        """Whether an answer that was asked for here is on its way."""
        return self._rounds > 0

    # -- asking ----------------------------------------------------------------------------------------------------

    def ask(self, text: str, attachments: tuple[Any, ...] = ()) -> None:
        """Send what was written, with its media."""
        prompt = (*attachments, text) if attachments else text
        session, params = self._session, dict(self._params)
        self._start(text, lambda: session.stream(prompt, append=True, **params))

    def retry(self, number: int) -> None:
        """Another answer to turn `number`."""
        session, params = self._session, dict(self._params)
        turn = session.conversation.turn_at(number)
        self._start(turn.prompt.text, lambda: session.stream_retry(number, **params), replaces=turn.id, is_new=False)

    def edit(self, number: int, text: str) -> None:
        """Ask `text` in the place of turn `number`."""
        session, params = self._session, dict(self._params)
        turn = session.conversation.turn_at(number)
        self._start(text, lambda: session.stream_edit(number, text, **params), replaces=turn.id)

    def answer(self, text: str) -> None:
        """Answer what the running round asks: `y`, `n` or `a` for always."""
        if self._host is not None:
            self.loop.call_soon_threadsafe(self._host.answer, text)

    def stop(self) -> bool:
        """End the running answer at its next token; whether there was one."""
        return self._session.stop()

    def _start(self, prompt: str, open_stream: OpenStream, *, replaces: str = "", is_new: bool = True) -> None:
        self._rt.need_engine()
        if self._session.is_busy:
            name = self._session.conversation.name
            raise ConversationBusyError(f"conversation {name!r} is answering", fix="wait for the answer, or press Stop")
        with self._lock:
            self._rounds += 1
        self._show({"problem": {}, "notices": []})
        self._rt.loop.submit(self._answer(prompt, open_stream, replaces, prompt if is_new else ""))

    async def _answer(self, prompt: str, open_stream: OpenStream, replaces: str, written: str) -> None:
        """Run a round; `written` is what would be lost if it failed."""
        feed = AnswerFeed(
            new_id(), prompt, send=self._send, show=lambda whole: self._show({"running": whole}), replaces=replaces
        )
        session = self._session
        before, session.host = session.host, PaneHost(feed.ask)
        self._host = session.host
        ticking = asyncio.ensure_future(_tick(feed))
        problem: dict[str, str] = {}
        notices: tuple[str, ...] = ()
        try:
            async with aclosing(open_stream()) as events:  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, ChatReply):
                        notices = event.notices
                        if event.turn.id not in session.conversation.turns:
                            problem = {"text": "Stopped before the first word: nothing was added.", "prompt": written}
                    else:
                        feed.feed(event)
        except KaniNbError as error:
            is_kept = getattr(error, "reply", None) is not None
            problem = {"text": str(error), "prompt": "" if is_kept else written}
        except Exception as error:  # noqa: BLE001 - shown where the person looks; there is no cell for a traceback
            problem = {"text": f"{type(error).__name__}: {error}", "prompt": written}
        finally:
            ticking.cancel()
            self._host, session.host = None, before
            with self._lock:
                self._rounds -= 1
            # Together, so that no front end shows the turn twice, or not at all.
            self._show({**self._changes(), "running": {}, "problem": problem, "notices": list(notices)})
            self._show_around()

    # -- going about -----------------------------------------------------------------------------------------------

    def switch(self, turn_id: str) -> None:
        """Go to the branch through that turn which was used last."""
        self._session.switch(leaf_below(self._session.conversation, turn_id))

    def set_system(self, text: str) -> None:
        """Another system prompt from here on; an empty one is none."""
        self._session.set_system(text.strip() or None)

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
        """Begin another conversation."""
        self._adopt(self._rt.new_chat(system=self._session.system))

    def open(self, name: str) -> None:
        """Go on with another conversation.

        Raises:
            ConversationError: there is none of that name.
        """
        self._adopt(self._rt.open_chat(name))

    def rename(self, name: str) -> None:
        """Call the conversation `name`."""
        self._session.rename(name)

    def list(self, query: str = "") -> list[dict[str, Any]]:
        """The conversations of this notebook, the latest first; with a `query` those that have it in them."""
        store = self._rt.store
        summaries = self._rt.list_chats()
        if query.strip() and store is not None:
            found = store.search(query.strip(), self._rt.notebook)
            summaries = [each for each in summaries if each.id in found or query.lower() in each.name.lower()]
        summaries.sort(key=lambda each: -each.updated_at)
        return [summary_view(each, self._session.conversation.id) for each in summaries]

    def _adopt(self, session: ChatSession) -> None:
        with self._lock:
            self._unwatch()
            self._session = session
            self._unwatch = session.watch(self.refresh)
        self._show({**self._changes(is_new=True), "problem": {}, "notices": []})
        self._show_around()

    # -- what is shown ---------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Show the conversation as it is now."""
        if not self.is_answering:
            self._show(self._changes())
            self._show_around()

    def _changes(self, *, is_new: bool = False) -> dict[str, Any]:
        """The turns that may not be there yet. Those before the last chunk go out again only when there are more."""
        with self._lock:
            conversation = self._session.conversation
            path = [turn.id for turn in conversation.path()]
            settled = tuple(path[: (max(0, len(path) - 1) // CHUNK_TURNS) * CHUNK_TURNS])
            changed: dict[str, Any] = {}
            if is_new or settled != self._old:
                views = turn_views(conversation)
                changed["history"] = views[: len(settled)]
                self._old = settled
            else:
                views = turn_views(conversation, len(settled) + 1)
            changed["recent"] = views[len(settled) :] if "history" in changed else views
            return changed

    def _show_around(self) -> None:
        session = self._session
        conversation = session.conversation
        engine, window = self._rt.engine, None
        if engine is not None:
            with suppress(KaniNbError):
                window = engine.max_context_size if engine.is_loaded else None
        self._show(
            {
                "around": {
                    "name": conversation.name,
                    "system": conversation.system or "",
                    "branches": len(conversation.branches()),
                    "engine": self._rt.engine_name,
                    "context": context_view(session.turns, window),
                    "params": {name: str(value) for name, value in self._params.items()},
                }
            }
        )

    def close(self) -> None:
        """Let go of the runtime. An answer goes on and is kept. Safe to call twice."""
        self._is_closed = True
        self._unwatch()
        self._unwatch_engines()


async def _tick(feed: AnswerFeed) -> None:
    while True:
        feed.flush()
        await asyncio.sleep(DELTA_EVERY_S / 2)
