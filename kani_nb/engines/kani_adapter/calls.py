"""One call of an engine of kani: where it runs, how it is given up, and what its errors become.

It runs on a loop of the engine's own, in whichever thread asks; `kani_adapter` sees to it that one does at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

from kani_nb._secrets import without_secrets
from kani_nb.engines.kani_adapter.messages import kani_module
from kani_nb.errors import (
    EngineError,
    GenerationError,
    KaniNbError,
    MissingDependencyError,
    OutOfMemoryError,
    PromptError,
    PromptTooLongError,
)

T = TypeVar("T")


class Call:
    """One call on the engine's loop, which can be given up from any thread at any moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self._why = ""
        self.is_given_up = False
        #: It looks at `is_given_up` and ends by itself; a cancellation would leave a thread of it running.
        self.ends_by_itself = False

    def give_up(self, why: str = "") -> None:
        """Cancel it, now or before it starts; with `why`, whoever still waits for it is told."""
        with self._lock:
            if self.is_given_up:
                return
            self.is_given_up, self._why = True, why
            if self._loop is not None and self._task is not None and not self.ends_by_itself:
                self._loop.call_soon_threadsafe(self._task.cancel)

    def run(self, open_loop: Callable[[], asyncio.AbstractEventLoop], work: Callable[[], Awaitable[T]], name: str) -> T:
        """The result of `work`, run by this thread on the loop that `open_loop` gives.

        Raises:
            GenerationError: it was given up, or cancelled itself.
        """

        async def started() -> T:
            return await work()

        with self._lock:
            if self.is_given_up:
                raise GenerationError(self._why or f"{name} was left before it began")
            loop = open_loop()
            self._loop, self._task = loop, loop.create_task(started())
            task: asyncio.Task[T] = self._task
        try:
            return loop.run_until_complete(task)
        except asyncio.CancelledError as error:
            raise GenerationError(self._why or f"{name} cancelled its own call") from error
        finally:
            with self._lock:
                self._loop = self._task = None


async def count_tokens(engine: Any, prompt: list[Any], tools: list[Any] | None) -> int:
    """Tokens of the prompt, whichever form the engine's `prompt_len` has."""
    counted = engine.prompt_len(prompt, tools)
    return int(await counted if inspect.isawaitable(counted) else counted)


def events_of(engine: Any, prompt: list[Any], tools: list[Any] | None, hyperparams: dict[str, Any]) -> Any:
    """The engine's stream; its prediction as one, where it has no stream (kani's own way to do that warns)."""
    base = kani_module("kani.engines.base")
    streaming = engine
    while isinstance(streaming, base.WrapperEngine) and type(streaming).stream is base.WrapperEngine.stream:
        streaming = streaming.engine
    if type(streaming).stream is not base.BaseEngine.stream:
        return engine.stream(prompt, tools, **hyperparams)

    async def predicted() -> AsyncIterator[Any]:
        yield await engine.predict(prompt, tools, **hyperparams)

    return predicted()


async def end(engine: Any) -> None:
    """Close the engine, if it was made, and end whatever else runs on this loop."""
    try:
        if engine is not None:
            await engine.close()
    finally:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await asyncio.get_running_loop().shutdown_asyncgens()


@contextlib.asynccontextmanager
async def closing(stream: Any) -> AsyncIterator[Any]:
    """The stream, closed at the end where it can be."""
    try:
        yield stream
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()


def stopping_criteria(call: Call) -> Any:
    """What transformers asks after every token: whether the call was given up."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    class GivenUp(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((input_ids.shape[0],), call.is_given_up, device=input_ids.device, dtype=torch.bool)

    return StoppingCriteriaList([GivenUp()])


@contextlib.contextmanager
def in_our_words(name: str, doing: str, extra: str | None = None) -> Iterator[None]:
    """What kani, its providers and their packages raise, as our errors, without keys.

    `extra` is what kani calls the packages that the engine needs.
    """
    kani = kani_module("kani.exceptions")
    try:
        yield
    except KaniNbError:
        raise
    except (kani.PromptTooLong, kani.MessageTooLong) as error:
        raise PromptTooLongError(f"{name} refused the prompt", why=without_secrets(str(error))) from error
    except kani.PromptError as error:
        raise PromptError(f"{name} refused the prompt", why=without_secrets(str(error))) from error
    except (kani.MissingModelDependencies, ImportError) as error:
        fix = f"pip install 'kani[{extra}]'" if extra else ""
        raise MissingDependencyError(f"{name} could not be {doing}", why=str(error), fix=fix) from error
    except Exception as error:
        reason = without_secrets(f"{type(error).__name__}: {error}".strip().splitlines()[0])
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise OutOfMemoryError(f"{name} ran out of memory", why=reason) from error
        kind = GenerationError if doing == "run" else EngineError
        what = f"{name} failed" if doing == "run" else f"{name} could not be {doing}"
        raise kind(what, why=reason) from error
