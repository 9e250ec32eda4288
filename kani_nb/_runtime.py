"""The Runtime: the one mutable root of a process - loaded engines, open conversations, the recorder, the loop thread.

It outlives `%reload_ext`, so that reloading the extension never drops a model. Engines and sessions live on its event
loop; what is here can be called from any thread. It knows nothing of IPython.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kani_nb._loop import LoopThread
from kani_nb.config import EngineConfig
from kani_nb.conversation.session import ChatSession
from kani_nb.conversation.store import ConversationStore, ConversationSummary, default_store_path
from kani_nb.conversation.tree import Conversation
from kani_nb.engines.base import BaseEngine, ProgressCallback
from kani_nb.engines.registry import create_engine
from kani_nb.engines.worker import Slot
from kani_nb.errors import (
    ConfigError,
    ConversationBusyError,
    ConversationError,
    KaniNbError,
    NoEngineError,
    did_you_mean,
)
from kani_nb.metrics.recorder import Recorder


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """What `Runtime.load` did.

    Attributes:
        reused: an equal engine was loaded already, and nothing was done.
        replaced: name of the engine that was freed for this one.
    """

    name: str
    engine: BaseEngine
    reused: bool = False
    replaced: str | None = None


@dataclass(frozen=True, slots=True)
class UnloadReport:
    """What `Runtime.unload` freed; bytes of the process (CPU) or of the device's allocator (CUDA)."""

    name: str
    before_bytes: int
    after_bytes: int
    weight_bytes: int | None


class Runtime:
    """Engines by name, conversations, and what answers took.

    Attributes:
        metrics: the latest generations.
        loop: the event loop that engines and sessions live on.
        notebook: key of the notebook whose conversations these are, usually its path; empty where it is not known.
        saves: whether conversations are kept on disk.
    """

    def __init__(self, store_path: Path | None = None) -> None:
        self.metrics = Recorder()
        self.loop = LoopThread()
        self.notebook = ""
        self.saves = True
        self._store_path = store_path
        self._store: ConversationStore | None = None
        self._lock = threading.RLock()
        self._engines: dict[str, BaseEngine] = {}
        self._configs: dict[str, EngineConfig] = {}
        self._current: str | None = None
        self._replaceable: str | None = None
        self._slots: dict[str, Slot] = {}
        self._load_lock: asyncio.Lock | None = None
        self._chats: dict[str, ChatSession] = {}
        self._chat: ChatSession | None = None
        self._resumed: str | None = None

    # -- engines ---------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> BaseEngine | None:
        """The engine that answers, or None."""
        return self._engines.get(self._current) if self._current is not None else None

    @property
    def engine_name(self) -> str:
        """Name of the current engine, or an empty string."""
        return self._current or ""

    @property
    def engines(self) -> dict[str, BaseEngine]:
        """All engines by name; a copy."""
        return dict(self._engines)

    def config_of(self, name: str) -> EngineConfig | None:
        """The configuration that an engine was loaded with; None for one of the user's own."""
        return self._configs.get(name)

    def need_engine(self, name: str | None = None) -> BaseEngine:
        """The engine of that name, or the current one.

        Raises:
            NoEngineError: there is none.
        """
        if name is not None:
            return self._engines[self._known(name)]
        if self.engine is None:
            raise NoEngineError("no engine is loaded", fix="%load_engine smollm2")
        return self.engine

    def use(self, engine: BaseEngine | str, name: str | None = None) -> BaseEngine:
        """Make any engine the current one: one of your own, or a loaded one by its name.

        Raises:
            ConfigError: it is not a `BaseEngine`.
            NoEngineError: no engine has that name.
        """
        if isinstance(engine, str):
            self._current = self._known(engine)
            return self._engines[engine]
        if not isinstance(engine, BaseEngine):
            raise ConfigError(
                f"{engine!r} is not an engine", fix="rt.use(an instance of a subclass of kani_nb.BaseEngine)"
            )
        chosen = name or type(engine).__name__.removesuffix("Engine").lower() or "engine"
        with self._lock:
            self._engines[chosen] = engine
            self._configs.pop(chosen, None)
            self._current = chosen
        return engine

    async def load(
        self, config: EngineConfig, *, name: str | None = None, progress: ProgressCallback | None = None
    ) -> LoadedEngine:
        """Load the engine that `config` describes and make it the current one.

        An equal configuration that is loaded already is only made current. Without a `name` the engine that was loaded
        without one is freed first, once the new one's files are known to be there.

        Raises:
            KaniNbError: it cannot be found, downloaded or loaded; as the engine's `load`.
        """
        return await self.loop.run(self._load(config, name, progress))

    def load_sync(self, config: EngineConfig, **options: Any) -> LoadedEngine:
        """`load`, blocking the calling thread."""
        return self.loop.run_sync(self._load(config, options.get("name"), options.get("progress")))

    async def _load(self, config: EngineConfig, name: str | None, progress: ProgressCallback | None) -> LoadedEngine:
        if self._load_lock is None:
            self._load_lock = asyncio.Lock()
        async with self._load_lock:
            for known, loaded in self._configs.items():
                if loaded == config and name in (None, known) and self._engines[known].is_loaded:
                    self._current = known
                    return LoadedEngine(known, self._engines[known], reused=True)
            engine = create_engine(config)
            await engine.prepare(progress)
            chosen = name or self._free_name(_short_name(config.model))
            freed = [each for each in (chosen, self._replaceable if name is None else None) if each in self._engines]
            lines = [self._configs[each].to_line() for each in freed if each in self._configs]
            for each in dict.fromkeys(freed):
                await self._unload(each)
            try:
                await engine.load(progress)
            except KaniNbError as error:
                if lines:
                    note = f"{', '.join(dict.fromkeys(freed))} was freed for it: {lines[0]} brings it back"
                    error.fix = f"{error.fix}\n  {note}" if error.fix else note
                raise
            self._share_slot(engine)
            with self._lock:
                self._engines[chosen] = engine
                self._configs[chosen] = config
                self._current = chosen
                if name is None:
                    self._replaceable = chosen
            return LoadedEngine(chosen, engine, replaced=freed[0] if freed else None)

    def _free_name(self, name: str) -> str:
        """`name`, unless one of the user's own engines has it."""
        taken = set(self._engines) - set(self._configs)
        return name if name not in taken else next(f"{name}-{n}" for n in range(2, 99) if f"{name}-{n}" not in taken)

    async def unload(self, name: str | None = None) -> UnloadReport:
        """Free an engine (the current one by default) and say what that gave back.

        Raises:
            NoEngineError: there is none of that name.
        """
        return await self.loop.run(self._unload(name))

    def unload_sync(self, name: str | None = None) -> UnloadReport:
        """`unload`, blocking the calling thread."""
        return self.loop.run_sync(self._unload(name))

    async def _unload(self, name: str | None) -> UnloadReport:
        self.need_engine(name)
        chosen = name or self.engine_name
        engine = self._engines[chosen]
        memory = engine.memory()
        device = memory.device if memory is not None else "cpu"
        before = await asyncio.to_thread(_used_bytes, device)
        await engine.close()
        with self._lock:
            self._engines.pop(chosen, None)
            self._configs.pop(chosen, None)
            if self._replaceable == chosen:
                self._replaceable = None
            if self._current == chosen:
                self._current = next(reversed(self._engines), None)
        after = await asyncio.to_thread(_used_bytes, device)
        return UnloadReport(chosen, before, after, memory.weight_bytes if memory is not None else None)

    def _known(self, name: str) -> str:
        if name not in self._engines:
            loaded = list(self._engines)
            fix = did_you_mean(name, loaded) or (
                f"loaded are {', '.join(loaded)}" if loaded else "%load_engine smollm2"
            )
            raise NoEngineError(f"no engine is called {name!r}", fix=fix)
        return name

    def _share_slot(self, engine: BaseEngine) -> None:
        """Engines on one device take turns: two at once on the same cores or the same card are slower than in turn."""
        memory = engine.memory()
        if memory is not None and isinstance(getattr(engine, "slot", None), Slot):
            engine.slot = self._slots.setdefault(memory.device, Slot())  # type: ignore[attr-defined]

    # -- conversations ---------------------------------------------------------------------------------------------

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
            if self._chat is None:
                self.new_chat()
            assert self._chat is not None
            return self._chat

    @property
    def current_chat(self) -> ChatSession | None:
        """The current conversation, or None; unlike `chat` it makes none."""
        return self._chat

    def set_chat(self, chat: ChatSession | None) -> None:
        """Make an open conversation the current one; with None the next one asked for is new."""
        self._chat = chat

    @property
    def chats(self) -> dict[str, ChatSession]:
        """The conversations that were opened in this process, by name; a copy."""
        return {chat.conversation.name: chat for chat in self._chats.values()}

    def new_chat(self, name: str | None = None, system: str | None = None) -> ChatSession:
        """Start a conversation and make it the current one.

        Raises:
            ConversationError: there is one of that name.
        """
        taken = {summary.name for summary in self.list_chats()} | set(self.chats)
        if name is None:
            name = next(f"chat-{number}" for number in range(1, len(taken) + 2) if f"chat-{number}" not in taken)
        elif name in taken:
            raise ConversationError(f"there is a conversation {name!r} already", fix=f"%chat open {name}")
        return self._adopt(Conversation.new(name, self.notebook, system))

    def open_chat(self, name: str) -> ChatSession:
        """Make the conversation of that name the current one, with all turns that the store has of it.

        Looks among those open here, those of this notebook, and then those of all notebooks.

        Raises:
            ConversationError: there is none, or several notebooks have one.
        """
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
        return self._adopt(conversation)

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
            ConversationError: there is none of that name.
            ConversationBusyError: it is answering.
        """
        open_ones = self.chats
        if name in open_ones:
            if open_ones[name].is_busy:
                raise ConversationBusyError(f"conversation {name!r} is answering", fix="%chat stop, then delete it")
            del self._chats[open_ones[name].conversation.id]
            if self._chat is open_ones[name]:
                self._chat = None
        saved = [summary for summary in self.list_chats() if summary.name == name]
        if not saved and name not in open_ones:
            raise ConversationError(f"there is no conversation {name!r}", fix="%chat list")
        for summary in saved:
            assert self.store is not None
            self.store.delete(summary.id)

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

    def stop(self) -> bool:
        """End every running answer at its next token; whether there was one."""
        stopped = [chat.stop() for chat in list(self._chats.values())]
        return any(stopped)

    def close(self) -> None:
        """Free every engine, close the store and end the loop. The runtime can be used again afterwards."""
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


def _short_name(model: str) -> str:
    """What an engine is called when nobody named it: the last part of its model."""
    name = model.split(":", 1)[0] if model.startswith("echo") else Path(model.rstrip("/\\")).name
    return name or model


def _used_bytes(device: str) -> int:
    """Bytes that this process holds on `device`."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.memory_reserved(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


_RUNTIME: Runtime | None = None
_RUNTIME_LOCK = threading.Lock()


def runtime() -> Runtime:
    """The Runtime of this process."""
    global _RUNTIME  # the one mutable root of the package
    with _RUNTIME_LOCK:
        if _RUNTIME is None:
            _RUNTIME = Runtime()
        return _RUNTIME
