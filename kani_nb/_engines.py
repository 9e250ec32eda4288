"""The engines of a process by name: which is loaded, which answers, and which is freed for which.

Called from any thread; loading and freeing run on the event loop that it is given. Conversations are the Runtime's,
which builds on this.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kani_nb._loop import LoopThread
from kani_nb._watchers import Watchers
from kani_nb.config import EngineConfig
from kani_nb.engines.base import BaseEngine, ProgressCallback
from kani_nb.engines.registry import create_engine
from kani_nb.engines.worker import Slot, run_in_thread
from kani_nb.errors import ConfigError, KaniNbError, NoEngineError, did_you_mean


@dataclass(frozen=True, slots=True)
class LoadedEngine:
    """What `Runtime.load` did.

    Attributes:
        reused: an equal engine was loaded already, and nothing was done.
        replaced: name of the engine that was freed for this one.
        why: this model was chosen, where `auto` was asked for; a few sentences.
    """

    name: str
    engine: BaseEngine
    reused: bool = False
    replaced: str | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class UnloadReport:
    """What `Runtime.unload` freed; bytes of the process (CPU) or of the device's allocator (CUDA)."""

    name: str
    before_bytes: int
    after_bytes: int
    weight_bytes: int | None


class EngineRoster:
    """Engines by name, one of them the current one.

    Attributes:
        loop: the event loop that engines live on.
    """

    def __init__(self) -> None:
        self.loop = LoopThread()
        self._lock = threading.RLock()
        self._engines: dict[str, BaseEngine] = {}
        self._configs: dict[str, EngineConfig] = {}
        self._current: str | None = None
        self._replaceable: str | None = None
        self._slots: dict[str, Slot] = {}
        self._load_lock: asyncio.Lock | None = None
        self._watchers = Watchers()

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Have `changed` called after an engine was loaded, freed or made the current one; the result ends that.

        It is called on whichever thread did that, and must be short.
        """
        return self._watchers.add(changed)

    @property
    def replaceable(self) -> str:
        """Name of the engine that the next load without a name of its own frees first; empty where there is none."""
        name = self._replaceable or ""
        return name if name in self._engines else ""

    def given_back(self) -> dict[str, int]:
        """Bytes by device that the next load without a name of its own will free before it begins."""
        engine = self._engines.get(self.replaceable)
        memory = engine.memory() if engine is not None else None
        if memory is None:
            return {}
        held = dict(memory.shares) or {memory.device: memory.weight_bytes}
        return {**held, memory.device: held.get(memory.device, 0) + memory.kv_bytes}

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
            self._watchers.tell()
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
        self._watchers.tell()
        return engine

    async def load(
        self, config: EngineConfig, *, name: str | None = None, progress: ProgressCallback | None = None
    ) -> LoadedEngine:
        """Load the engine that `config` describes and make it the current one.

        The model `auto` is the best of a short list that fits this machine (`kani_nb.auto_choice`).
        An equal configuration that is loaded already is only made current. Without a `name` the engine that was loaded
        without one is freed first, once the new one's files are known to be there.

        Raises:
            KaniNbError: it cannot be found, downloaded or loaded; as the engine's `load`.
        """
        return await self.loop.run(self._load(config, name, progress))

    def load_sync(
        self, config: EngineConfig, *, name: str | None = None, progress: ProgressCallback | None = None
    ) -> LoadedEngine:
        """`load`, blocking the calling thread."""
        return self.loop.run_sync(self._load(config, name, progress))

    async def _load(self, config: EngineConfig, name: str | None, progress: ProgressCallback | None) -> LoadedEngine:
        try:
            return await self._find_or_load(config, name, progress)
        finally:
            self._watchers.tell()

    async def _find_or_load(
        self, config: EngineConfig, name: str | None, progress: ProgressCallback | None
    ) -> LoadedEngine:
        if self._load_lock is None:
            self._load_lock = asyncio.Lock()
        async with self._load_lock:
            why = ""
            if config.model == "auto" and "auto" not in self._engines:
                from kani_nb.auto_choice import auto_config

                choice = await run_in_thread(
                    lambda cancelled: auto_config(config, progress=progress, cancelled=cancelled), name="kani-nb-choose"
                )
                config, why = choice.config, choice.why
            for known, loaded in self._configs.items():
                if loaded == config and name in (None, known) and self._engines[known].is_loaded:
                    self._current = known
                    return LoadedEngine(known, self._engines[known], reused=True, why=why)
            if self._is_name_of_an_engine(config):
                self._current = config.model
                return LoadedEngine(config.model, self._engines[config.model], reused=True)
            engine = create_engine(config)
            await engine.prepare(progress)
            chosen = name or self._free_name(_short_name(config.model, engine))
            replaceable = self._replaceable if name is None else None
            freed = [each for each in dict.fromkeys((chosen, replaceable)) if each in self._engines]
            lines = [self._configs[each].to_line() for each in freed if each in self._configs]
            for each in freed:
                await self._unload(each)
            try:
                await engine.load(progress)
            except KaniNbError as error:
                if lines:
                    note = f"{', '.join(freed)} was freed for it: {lines[0]} brings it back"
                    error.fix = f"{error.fix}\n  {note}" if error.fix else note
                raise
            self._share_slot(engine)
            with self._lock:
                self._engines[chosen] = engine
                self._configs[chosen] = config
                self._current = chosen
                if name is None:
                    self._replaceable = chosen
            return LoadedEngine(chosen, engine, replaced=freed[0] if freed else None, why=why)

    def _is_name_of_an_engine(self, config: EngineConfig) -> bool:
        """Whether `%load_engine mine` means the engine that was called so, with `use` or `--as`."""
        if config.model not in self._engines or config != EngineConfig(config.model):
            return False
        loaded = self._configs.get(config.model)
        return loaded is None or loaded.model != config.model

    def _free_name(self, name: str) -> str:
        """`name`, unless one of the user's own engines has it."""
        taken = set(self._engines) - set(self._configs)
        return name if name not in taken else next(f"{name}-{n}" for n in range(2, 99) if f"{name}-{n}" not in taken)

    async def unload(self, name: str | None = None) -> UnloadReport:
        """Free an engine (the current one by default) and say what that gave back.

        Raises:
            NoEngineError: there is none of that name.
        """
        try:
            return await self.loop.run(self._unload(name))
        finally:
            self._watchers.tell()

    def unload_sync(self, name: str | None = None) -> UnloadReport:
        """`unload`, blocking the calling thread."""
        return self.loop.run_sync(self.unload(name))

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


def _short_name(model: str, engine: BaseEngine) -> str:
    """What an engine is called when nobody named it: the last part of its model."""
    served = getattr(engine, "model", None)
    if isinstance(served, str) and served:  # by a server, whose address says less
        model = served
    name = model.split(":", 1)[0] if model.startswith("echo") else Path(model.rstrip("/\\")).name
    return name or model


def _used_bytes(device: str) -> int:
    """Bytes that this process holds on `device`."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.memory_reserved(device))
    import psutil

    return int(psutil.Process().memory_info().rss)
