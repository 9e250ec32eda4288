"""Our engines given to the kani package: `Kani(as_kani_engine(engine))`.

The engine runs on the loop that calls it, as kani expects. kani is imported when the first one is made.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

from kani_nb.engines.base import BaseCompletion, BaseEngine
from kani_nb.engines.base import prompt_len as count
from kani_nb.engines.kani_adapter.messages import from_kani, kani_module, to_kani
from kani_nb.errors import ConfigError, PromptError, PromptTooLongError
from kani_nb.functions import as_ai_function


def as_kani_engine(engine: BaseEngine) -> Any:
    """`engine` as a `kani.engines.BaseEngine`, for `Kani(...)`.

    kani's hyperparameters (`chat_round(query, max_new_tokens=...)`) are passed on, and are ours. Reasoning is in the
    message that the answer ends with, and not among the streamed text.

    Raises:
        ConfigError: it is no engine of ours, or its context is not known before it is loaded.
        MissingDependencyError: kani is not installed.
    """
    if not isinstance(engine, BaseEngine):
        named = repr(engine) if isinstance(engine, str) else '"smollm2"'
        raise ConfigError(
            f"{type(engine).__name__} is no engine of kani_nb",
            why="it must be a kani_nb.BaseEngine",
            fix=f"as_kani_engine(kani_nb.HuggingEngine({named})), or as_kani_engine(kani_nb.runtime().engine)",
        )
    if engine.max_context_size < 1:
        raise ConfigError(
            f"{engine!r} does not know its context yet",
            why="kani plans every prompt by it",
            fix="await engine.load() first, or give max_context_size",
        )
    return _engine_class()(engine)


@functools.cache
def _engine_class() -> Any:
    """The class, made once: it derives from one of kani's."""
    base = kani_module("kani.engines.base")

    class KaniNbEngine(base.BaseEngine):  # type: ignore[misc,name-defined]
        """An engine of kani_nb, as kani's."""

        def __init__(self, engine: BaseEngine) -> None:
            self.engine = engine

        @property
        def max_context_size(self) -> int:
            """Tokens of prompt and answer together."""
            return self.engine.max_context_size

        async def prompt_len(self, messages: list[Any], functions: list[Any] | None = None, **kwargs: Any) -> int:
            """Tokens of the whole prompt."""
            with _in_kanis_words():
                return await count(self.engine, _messages(messages), _functions(functions))

        async def predict(self, messages: list[Any], functions: list[Any] | None = None, **hyperparams: Any) -> Any:
            """The whole answer."""
            with _in_kanis_words():
                made = await self.engine.predict(_messages(messages), _functions(functions), **hyperparams)
            return _event(made)

        async def stream(
            self, messages: list[Any], functions: list[Any] | None = None, **hyperparams: Any
        ) -> AsyncIterator[Any]:
            """The answer's text in pieces, then its completion."""
            with _in_kanis_words():
                answer = self.engine.stream(_messages(messages), _functions(functions), **hyperparams)
                async with aclosing(answer) as events:  # type: ignore[type-var]
                    async for event in events:
                        if (theirs := _event(event)) is not None:
                            yield theirs

        async def close(self) -> None:
            """Free what the engine loaded."""
            await self.engine.close()

        def message_len(self, message: Any) -> int:
            """Tokens of one message (what kani asked before 1.7), where the engine counts without a coroutine."""
            return self.engine.message_len(from_kani(message))

        def __repr__(self) -> str:
            """The engine inside."""
            return f"KaniNbEngine({self.engine!r})"

    return KaniNbEngine


def _event(event: Any) -> Any:
    """A piece of text or the completion as kani's; None for what kani has not."""
    if isinstance(event, str):
        return str(event)
    if not isinstance(event, BaseCompletion):
        return None
    completion = kani_module("kani.engines.base").Completion
    return completion(to_kani(event.message), event.prompt_tokens, event.completion_tokens)


def _messages(messages: list[Any]) -> list[Any]:
    return [from_kani(each) for each in messages]


def _functions(functions: list[Any] | None) -> list[Any] | None:
    return [as_ai_function(each) for each in functions] if functions else None


@contextlib.contextmanager
def _in_kanis_words() -> Iterator[None]:
    """Our refusals of a prompt as kani's, which shortens the prompt by them."""
    kani = kani_module("kani.exceptions")
    try:
        yield
    except PromptTooLongError as error:
        raise kani.PromptTooLong(str(error)) from error
    except PromptError as error:
        raise kani.PromptError(str(error)) from error
