"""KaniEngine: an engine of the `kani` package as one of ours.

An engine of kani may block its event loop for a whole answer, and knows nothing of being stopped. So each has a loop of
its own, which runs in a thread only while a call lasts; calls take turns, and leaving one returns at once: the foreign
call is cancelled where it can be, and abandoned where it blocks. What the providers are asked is kani's own affair.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import fields
from typing import Any, Self, TypeVar

from kani_nb.config import EngineConfig
from kani_nb.engines.base import (
    BaseEngine,
    Completion,
    FinishReason,
    LoadProgress,
    PrefillProgress,
    ProgressCallback,
    StreamEvent,
    TextDelta,
)
from kani_nb.engines.kani_adapter.calls import (
    Call,
    closing,
    count_tokens,
    end,
    events_of,
    in_our_words,
    stopping_criteria,
)
from kani_nb.engines.kani_adapter.messages import from_kani, functions_to_kani, kani_module, to_kani
from kani_nb.engines.kani_adapter.names import Recipe, recipe_of
from kani_nb.engines.kani_adapter.params import Asked, Family, StreamedText, family_of, limit_held
from kani_nb.engines.kinds import Ability, EngineKind
from kani_nb.engines.worker import Emit, Slot, iterate_in_thread, run_in_thread
from kani_nb.errors import ConfigError, PromptTooLongError
from kani_nb.generation_params import GenerationParams
from kani_nb.messages import ChatMessage

T = TypeVar("T")


class KaniEngine(BaseEngine):
    """An engine of the kani package.

    Args:
        engine: one of kani's, or a function without arguments that makes one: then `load` makes it, `close` drops it,
            and it can be loaded again.
        max_context_size: tokens of prompt and answer together; the engine's own by default.
        generation: defaults of every answer. Without it the engine's own hold.
        name: what it is called in messages.

    Raises:
        ConfigError: `engine` is neither.
        MissingDependencyError: kani is not installed.
    """

    kind = EngineKind(
        runs="engines of the kani package: Anthropic, Google and the rest of its table",
        example="%load_engine kani:anthropic:claude-sonnet-4-5",
        install="pip install 'kani-nb[kani]'",
        can=(
            Ability.TOOLS,
            Ability.REASONING,
            Ability.IMAGES,
            Ability.AUDIO,
        ),
        tested="kani 1.10: its HuggingEngine, engines of the tests' own; no paid service",
    )

    def __init__(
        self,
        engine: Any,
        *,
        max_context_size: int | None = None,
        generation: GenerationParams | None = None,
        name: str | None = None,
    ) -> None:
        is_engine = isinstance(engine, kani_module("kani.engines.base").BaseEngine)
        if not is_engine and not callable(engine):
            raise ConfigError(
                f"{type(engine).__name__} is no engine of kani",
                why="it must be a kani.engines.BaseEngine, or a function that makes one",
            )
        self.name: str = name or (type(engine).__name__ if is_engine else str(getattr(engine, "__name__", "engine")))
        self.generation = generation
        self.slot = Slot()
        self._asked_context = max_context_size
        self._make: Callable[[], Any] | None = None if is_engine else engine
        self._engine: Any = None
        self._family: Family | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._calls: set[Call] = set()
        self.max_context_size = max_context_size or 0
        if is_engine:
            self._take(engine)

    @classmethod
    def from_config(cls, config: EngineConfig) -> Self:
        """From `%load_engine kani:PROVIDER:MODEL` or `%load_engine kani:package.module:Class:MODEL`.

        Raises:
            ConfigError: no such provider or class, a model that kani cannot know, or an option of others.
            UnknownModelError: a folder that is not there.
            MissingDependencyError: kani, or the named module, cannot be imported.
        """
        model = config.model.strip()
        if model.lower().startswith("kani:"):
            model = model[len("kani:") :]
        usual, used = EngineConfig(config.model), {"model", "max_context_size", "generation"}
        changed = [each.name for each in fields(config) if getattr(config, each.name) != getattr(usual, each.name)]
        if others := [name for name in changed if name not in used]:
            raise ConfigError(
                f"engines of kani do not take {', '.join(others)}",
                why="they are told the model, and how to answer; not how it is loaded",
                fix=f"%load_engine kani:{model}",
            )
        return cls(
            recipe_of(model),
            max_context_size=config.max_context_size,
            generation=config.generation,
            name=f"kani:{model}",
        )

    @property
    def engine(self) -> Any:
        """The engine of kani; None before it is made."""
        return self._engine

    @property
    def is_loaded(self) -> bool:
        """Whether the engine of kani has been made."""
        return self._engine is not None

    async def prepare(self, progress: ProgressCallback | None = None) -> None:
        """Import what the engine needs; one that asks a service, and so takes no memory, is made already.

        Raises:
            EngineError, MissingDependencyError: as `load`.
        """
        make = self._make
        if self.is_loaded or not isinstance(make, Recipe):
            return

        def check(cancelled: threading.Event) -> bool:
            with in_our_words(self.name, "made", self._extra):
                return make.is_of_a_service()

        if await run_in_thread(check, name="kani-nb-prepare"):
            await self.load(progress)

    async def load(self, progress: ProgressCallback | None = None) -> None:
        """Make the engine, where it is not made yet.

        Raises:
            EngineError: it could not be made.
            MissingDependencyError: a package that it needs is not installed.
        """
        if progress is not None and not self.is_loaded:
            progress(LoadProgress("making", self.name))

        async def nothing_more(engine: Any) -> None:
            pass

        await self._ask(nothing_more)

    async def close(self) -> None:
        """End the answers that run, and close the engine and its loop. One that blocks is waited for."""
        for call in list(self._calls):
            call.give_up(f"{self.name} was closed meanwhile")
        await run_in_thread(self._shut, name="kani-nb-kani-close", slot=self.slot)

    async def prompt_len(
        self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **kwargs: Any
    ) -> int:
        """Tokens of the whole prompt, as the engine counts them."""
        given = list(messages)

        async def count(engine: Any) -> int:
            return await count_tokens(engine, [to_kani(each) for each in given], functions_to_kani(functions))

        return await self._ask(count)

    async def stream(
        self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **hyperparams: Any
    ) -> AsyncIterator[StreamEvent]:
        """The answer, in the pieces that the engine gives; in one piece where it only predicts.

        Whitespace around the text is made the same in the pieces and the message. Where the engine's message says
        anything else than its stream did, the message holds: it is what the engine wants to be remembered.

        Raises:
            ConfigError: a generation parameter that is not known, or that the engine does not have.
            PromptError: a message that kani cannot hold.
            PromptTooLongError: no room for an answer.
            GenerationError: the engine failed, or was closed.
        """
        asked = Asked.of(hyperparams, self.generation)
        given, began, call = list(messages), time.monotonic(), Call()

        def work(emit: Emit[StreamEvent], stop: threading.Event) -> None:
            queued_s = time.monotonic() - began
            self._run(call, lambda engine: self._answer(engine, call, given, functions, asked, queued_s, emit))

        self._calls.add(call)
        try:
            async with aclosing(iterate_in_thread(work, self.slot, name="kani-nb-kani")) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
        finally:
            call.give_up()
            self._calls.discard(call)

    async def _answer(
        self,
        engine: Any,
        call: Call,
        messages: list[ChatMessage],
        functions: Sequence[Any] | None,
        asked: Asked,
        queued_s: float,
        emit: Emit[StreamEvent],
    ) -> None:
        """On the engine's own loop: count, ask, and hand on what comes."""
        assert self._family is not None
        prompt, tools = [to_kani(each) for each in messages], functions_to_kani(functions)
        prompt_tokens = await count_tokens(engine, prompt, tools)
        room = self.max_context_size - prompt_tokens
        if room < 1:
            raise PromptTooLongError(
                f"the prompt has {prompt_tokens:,} tokens", why=f"the context holds {self.max_context_size:,}"
            )
        hyperparams = asked.hyperparams(engine, self._family, room)
        limit = asked.limit(hyperparams, self._family)
        if self._family.name == "huggingface":
            hyperparams["stopping_criteria"] = stopping_criteria(call)
            call.ends_by_itself = True
        emit(PrefillProgress(0, prompt_tokens, 0, queued_s=queued_s))
        text = StreamedText(strips=self._family.strips)
        end: Any = None
        with limit_held(engine, self._family, hyperparams):
            async with closing(events_of(engine, prompt, tools, hyperparams)) as events:
                async for event in events:
                    if call.is_given_up and not call.ends_by_itself:
                        break
                    if not isinstance(event, str):
                        end = event
                    elif piece := text.piece(event):
                        emit(TextDelta(piece))
        if call.is_given_up:
            raise asyncio.CancelledError
        message = from_kani(end.message) if end is not None else ChatMessage.assistant(text.said)
        if rest := text.rest(message.text):
            emit(TextDelta(rest))
        completion_tokens = getattr(end, "completion_tokens", None)
        emit(
            Completion(
                text.reconciled(message),
                _known(getattr(end, "prompt_tokens", None), prompt_tokens),
                completion_tokens,
                finish_reason=_finish_reason(message, completion_tokens, limit),
            )
        )

    # -- the engine's own loop -------------------------------------------------------------------------------------

    async def _ask(self, question: Callable[[Any], Awaitable[T]]) -> T:
        """What `question(engine)` gives, on the engine's loop, when its turn comes."""
        call = Call()
        self._calls.add(call)
        try:
            return await run_in_thread(lambda stop: self._run(call, question), name="kani-nb-kani", slot=self.slot)
        finally:
            call.give_up()
            self._calls.discard(call)

    def _run(self, call: Call, question: Callable[[Any], Awaitable[T]]) -> T:
        """Run one call to its end, in the thread that holds the slot."""

        async def answer() -> T:
            if self._engine is None:
                assert self._make is not None
                with in_our_words(self.name, "made", self._extra):
                    self._take(self._make())
            with in_our_words(self.name, "run", self._extra):
                return await question(self._engine)

        return call.run(self._open_loop, answer, self.name)

    @property
    def _extra(self) -> str | None:
        return self._make.provider if isinstance(self._make, Recipe) else None

    def _open_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # Where nobody closes the engine, its loop goes with it; what it was connected to is lost either way.
            weakref.finalize(self, _close_idle, self._loop).atexit = False
        return self._loop

    def _take(self, engine: Any) -> None:
        if not isinstance(engine, kani_module("kani.engines.base").BaseEngine):
            raise ConfigError(f"{self.name} made a {type(engine).__name__}", why="that is no kani.engines.BaseEngine")
        self._engine = engine
        self._family = family_of(engine)
        self.max_context_size = min(self._asked_context or engine.max_context_size, engine.max_context_size)

    def _shut(self, cancelled: threading.Event) -> None:
        engine, loop = self._engine, self._loop
        if self._make is not None:
            self._engine = None
        if loop is None:  # never used, or closed already
            return
        self._loop = None
        try:
            with in_our_words(self.name, "closed"):
                loop.run_until_complete(end(engine))
        finally:
            loop.close()

    def __repr__(self) -> str:
        """The name and the context; nothing of the engine inside, whose own may hold a key."""
        return f"KaniEngine({self.name}, max_context_size={self.max_context_size})"


def _close_idle(loop: asyncio.AbstractEventLoop) -> None:
    if not loop.is_running():
        loop.close()


def _known(told: int | None, counted: int) -> int:
    return counted if told is None else told


def _finish_reason(message: ChatMessage, tokens: int | None, limit: int | None) -> FinishReason | None:
    """Why the answer ended, where it can be told: kani does not say."""
    if message.tool_calls:
        return FinishReason.TOOL_CALLS
    return FinishReason.LENGTH if tokens is not None and limit is not None and tokens >= limit else None
