"""The Runtime: the one mutable root of a process - loaded engines, open conversations, the recorder, the loop thread.

It outlives `%reload_ext`, so that reloading the extension never drops a model. Engines and sessions live on its event
loop; what is here can be called from any thread. It knows nothing of IPython.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kani_nb._engines import EngineRoster, LoadedEngine, UnloadReport
from kani_nb._watchers import Watchers
from kani_nb.conversation.session import ChatSession
from kani_nb.conversation.store import ConversationStore, ConversationSummary, default_store_path
from kani_nb.conversation.tree import Conversation
from kani_nb.errors import ConversationError, did_you_mean
from kani_nb.metrics.recorder import Recorder

__all__ = ["LoadedEngine", "Runtime", "UnloadReport", "runtime"]

#: Characters of a conversation's name, which stands in lists and headings.
_LONGEST_NAME = 200


class Closeable(Protocol):
    """What can be taken away."""

    def close(self) -> None:
        """Take it away; safe to call twice."""


class Runtime(EngineRoster):
    """Engines by name, conversations, and what answers took.

    Attributes:
        metrics: the latest generations.
        loop: the event loop that engines and sessions live on.
        notebook: key of the notebook whose conversations these are, usually its path; empty where it is not known.
        saves: whether conversations are kept on disk.
        shown: what a notebook shows of this runtime that follows it (panels, the dashboard): by where it stands, with
            the execution that put it there.
    """

    def __init__(self, store_path: Path | None = None) -> None:
        super().__init__()
        self.metrics = Recorder()
        self.notebook = ""
        self.saves = True
        self.shown: dict[str, tuple[str, list[Closeable]]] = {}
        self._store_path = store_path
        self._store: ConversationStore | None = None
        self._chats: dict[str, ChatSession] = {}
        self._chat: ChatSession | None = None
        self._resumed: str | None = None
        self._chat_watchers = Watchers()

    def watch_chats(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Have `changed` called after a conversation came, went or became the current one; the result ends that.

        It is called on whichever thread did that, and must be short.
        """
        return self._chat_watchers.add(changed)

    @property
    def store(self) -> ConversationStore | None:
        """Where conversations are kept; None when they are not.

        Raises:
            StoreError: it cannot be opened.
        """
        if not self.saves:
            return None
        with self._lock:
            wanted = self._store_path or default_store_path()
            if self._store is None or (self._store.path != wanted and not self._store.is_open):
                self._store = ConversationStore(wanted)
            return self._store

    @property
    def chat(self) -> ChatSession:
        """The current conversation; a new one when there is none."""
        with self._lock:
            if self._chat is not None:
                return self._chat
            made = self._adopt(Conversation.new(self._free_chat_name(), self.notebook))
        self._chat_watchers.tell()
        return made

    @property
    def current_chat(self) -> ChatSession | None:
        """The current conversation, or None; unlike `chat` it makes none."""
        return self._chat

    def set_chat(self, chat: ChatSession | None) -> None:
        """Make an open conversation the current one; with None the next one asked for is new."""
        self._chat = chat
        self._chat_watchers.tell()

    @property
    def chats(self) -> dict[str, ChatSession]:
        """The conversations that were opened in this process, by name; a copy."""
        return {chat.conversation.name: chat for chat in self._chats.values()}

    def new_chat(self, name: str | None = None, system: str | None = None) -> ChatSession:
        """Start a conversation and make it the current one.

        Raises:
            ConversationError: there is one of that name, or it is none.
        """
        name = self._free_chat_name() if name is None else self._new_chat_name(name, fix=f"%chat open {name}")
        chat = self._adopt(Conversation.new(name, self.notebook, system))
        self._chat_watchers.tell()
        return chat

    def rename_chat(self, chat: ChatSession, name: str) -> None:
        """Give a conversation another name.

        Raises:
            ConversationError: there is one of that name, or it is none.
            ConversationBusyError: it is answering.
        """
        if name.strip() != chat.conversation.name:
            chat.rename(self._new_chat_name(name, fix="choose another name"))

    def _chat_names(self) -> set[str]:
        return {summary.name for summary in self.list_chats()} | set(self.chats)

    def _free_chat_name(self) -> str:
        taken = self._chat_names()
        return next(f"chat-{number}" for number in range(1, len(taken) + 2) if f"chat-{number}" not in taken)

    def _new_chat_name(self, name: str, *, fix: str) -> str:
        """That name, if a conversation may have it: two of one name could not be told apart."""
        name = name.strip()
        if not name:
            raise ConversationError("a conversation needs a name", why="this one is empty")
        if len(name) > _LONGEST_NAME:
            why = f"it has {len(name):,} characters, and {_LONGEST_NAME} at most are allowed"
            raise ConversationError(f"a conversation cannot be called {name[:20]!r}…", why=why, fix="a shorter one")
        if name in self._chat_names():
            raise ConversationError(f"there is a conversation {name!r} already", fix=fix)
        return name

    def open_chat(self, name: str) -> ChatSession:
        """Make the conversation of that name the current one, with all turns that the store has of it.

        Looks among those open here, those of this notebook, and then those of all notebooks.

        Raises:
            ConversationError: there is none, or several notebooks have one.
        """
        chat = self._open(name)
        self._chat_watchers.tell()
        return chat

    def _open(self, name: str) -> ChatSession:
        mine = self.list_chats()
        summary = next((each for each in mine if each.name == name), None)
        if name in self.chats:
            self._chat = self.chats[name]
            if summary is not None and self.store is not None and not self._chat.is_busy:
                self._chat.merge(self.store.load(summary.id))
            return self._chat
        if summary is None:
            summary = self._of_any_notebook(name, mine)
        assert self.store is not None
        return self._adopt(self.store.load(summary.id))

    def _of_any_notebook(self, name: str, mine: list[ConversationSummary]) -> ConversationSummary:
        found = [each for each in self.list_chats(everywhere=True) if each.name == name]
        if len(found) == 1:
            return found[0]
        if found:
            where = ", ".join(each.notebook or "(no name)" for each in found)
            raise ConversationError(
                f"several notebooks have a conversation {name!r}", why=where, fix="%chat open it in its own notebook"
            )
        names = [each.name for each in mine] + list(self.chats)
        raise ConversationError(f"there is no conversation {name!r}", fix=did_you_mean(name, names) or "%chat list")

    def adopt_chat(self, conversation: Conversation) -> ChatSession:
        """Make a conversation from elsewhere (a file) the current one; it is saved with its next turn."""
        chat = self._adopt(conversation)
        self._chat_watchers.tell()
        return chat

    def resume(self, name: str | None = None) -> ChatSession:
        """Go on with the conversation of this notebook that was used last, or with the one of that name.

        Calling it again gives the same conversation: those begun in this process are not earlier ones.

        Raises:
            ConversationError: there is none to go on with.
        """
        if name is not None:
            return self.open_chat(name)
        if self._resumed is not None and self._resumed in self.chats:
            return self.open_chat(self._resumed)
        saved = [summary for summary in self.list_chats() if summary.turns and summary.name not in self.chats]
        if not saved:
            raise ConversationError(
                f"no earlier conversation of {self.notebook or 'this notebook'} is kept",
                fix="%chat list --all shows every one; %chat resume NAME opens it",
            )
        chat = self.open_chat(max(saved, key=lambda summary: summary.updated_at).name)
        self._resumed = chat.conversation.name
        return chat

    def list_chats(self, *, everywhere: bool = False) -> list[ConversationSummary]:
        """The kept conversations of this notebook, or of all."""
        if self.store is None:
            return []
        return self.store.conversations(None if everywhere else self.notebook)

    def delete_chat(self, name: str) -> None:
        """Delete a conversation for good.

        Raises:
            ConversationError: there is none of that name, or there are several.
            ConversationBusyError: it is answering.
        """
        chat = self.chats.get(name)
        found = {summary.id for summary in self.list_chats() if summary.name == name}
        if chat is not None:
            found = {chat.conversation.id} & found
        elif not found:
            raise ConversationError(f"there is no conversation {name!r}", fix="%chat list")
        if len(found) > 1:
            fix = f"%chat open {name}, then %chat rename NAME"
            raise ConversationError(f"{len(found)} conversations are called {name!r}", why="which one?", fix=fix)
        if chat is not None:
            chat.mark_deleted()
            del self._chats[chat.conversation.id]
            if self._chat is chat:
                self._chat = None
        try:
            for conversation_id in found:
                assert self.store is not None
                self.store.delete(conversation_id)
        finally:
            self._chat_watchers.tell()

    def _adopt(self, conversation: Conversation) -> ChatSession:
        with self._lock:
            chat = ChatSession(
                conversation,
                loop=self.loop,
                engine=self.need_engine,
                recorder=self.metrics,
                store=self.store,
                engine_name=lambda: self.engine_name,
            )
            self._chats[conversation.id] = chat
            self._chat = chat
            return chat

    def keep_shown(self, where: str, shown: Closeable, execution: str = "") -> None:
        """Remember what is shown, and close what another execution showed there before."""
        if self.shown.get(where, ("", []))[0] != execution:
            self.close_shown(where)
        self.shown.setdefault(where, (execution, []))[1].append(shown)

    def close_shown(self, where: str | None = None) -> None:
        """Close what is shown there, or all that is shown. Safe to call twice."""
        for each in list(self.shown) if where is None else [where]:
            for shown in self.shown.pop(each, ("", []))[1]:
                shown.close()

    def stop(self) -> bool:
        """End every running answer at its next token; whether there was one."""
        stopped = [chat.stop() for chat in list(self._chats.values())]
        return any(stopped)

    def close(self) -> None:
        """Free every engine, close the store and end the loop. The runtime can be used again afterwards."""
        self.close_shown()
        for name in list(self._engines):
            self.unload_sync(name)
        with self._lock:
            if self._store is not None:
                self._store.close()
                self._store = None
            self._chats.clear()
            self._chat = None
            self._load_lock = None
        self.loop.close()

    def __repr__(self) -> str:
        """What is loaded."""
        return f"<Runtime: engine {self.engine_name or 'none'}, {len(self._chats)} open conversations>"


_RUNTIME: Runtime | None = None
_RUNTIME_LOCK = threading.Lock()


def runtime() -> Runtime:
    """The Runtime of this process."""
    global _RUNTIME  # the one mutable root of the package
    with _RUNTIME_LOCK:
        if _RUNTIME is None:
            _RUNTIME = Runtime()
        return _RUNTIME
