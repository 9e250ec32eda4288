"""What a model may call in a round, and one call: found, checked, approved, run within its time, its result told.

Whatever goes wrong is told to the model, and to the person. Where a function runs (the kernel's main thread, a worker)
is the host's; the loop of call, result and answer is `running_turn`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from kani_nb.engines.worker import run_in_thread
from kani_nb.errors import ArgumentsError, ConfigError, did_you_mean
from kani_nb.functions import AIFunction, as_ai_function, result_text
from kani_nb.messages import ChatMessage, ChatRole, ToolCall

#: Rounds of calls after which the model must answer without any.
MAX_STEPS = 8
#: Rounds of calls in a row that all failed, after which it must.
MAX_FAILURES = 3
#: Characters of a result that a model is told, unless the function says otherwise.
MAX_RESULT_CHARACTERS = 16_000


class Approval(StrEnum):
    """Who decides whether a function that changes something may run; read-only ones always may."""

    ALWAYS = "always"
    ASK = "ask"
    NEVER = "never"


class CannotAskError(Exception):
    """There is nobody who could be asked; the text says why."""


class Host(Protocol):
    """Where functions run, and where the person is asked."""

    async def run(self, call: Callable[[], Any]) -> Any:
        """What `call` gives. Cancelling ends it where that can be done, and else leaves it to end by itself."""

    async def ask(self, question: str) -> str:
        """The person's answer.

        Raises:
            CannotAskError: nobody can be asked.
        """


class WorkerHost:
    """Runs each function in a thread of its own, and asks nobody."""

    async def run(self, call: Callable[[], Any]) -> Any:
        """See `Host.run`; a thread cannot be ended from outside, so a cancelled call goes on unseen."""
        return await run_in_thread(lambda _: call(), name="kani-nb-tool")

    async def ask(self, question: str) -> str:
        """See `Host.ask`."""
        raise CannotAskError("nobody can be asked outside of a %%chat cell")


@dataclass(frozen=True, slots=True)
class Tools:
    """What a model may call in a round.

    Args:
        functions: `AIFunction`s, or plain functions with type hints.
        approve: `always`, `ask` (the default) or `never`: whether functions that are not marked read-only may run.
        max_steps: rounds of calls before the model must answer without any.

    Raises:
        ConfigError: two functions of one name, something that is no function, or a bad value.
    """

    functions: tuple[AIFunction, ...]
    approve: Approval = Approval.ASK
    max_steps: int = MAX_STEPS

    def __post_init__(self) -> None:
        """Check each value once, here."""
        functions = tuple(as_ai_function(each) for each in self.functions)
        names = [each.name for each in functions]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"two tools are called {twice!r}", fix="@ai_function(name=...) renames one")
        if self.approve not in list(Approval):
            raise ConfigError(f"approve is {self.approve!r}", why=f"it must be {', '.join(Approval)}")
        if not _is_count(self.max_steps):
            raise ConfigError(f"max_steps is {self.max_steps!r}", why="it must be a whole number of at least 1")
        object.__setattr__(self, "functions", functions)
        object.__setattr__(self, "approve", Approval(self.approve))

    @property
    def names(self) -> list[str]:
        """What the model calls them."""
        return [each.name for each in self.functions]

    @property
    def enabled(self) -> tuple[AIFunction, ...]:
        """Those that the model is told of."""
        return tuple(each for each in self.functions if each.enabled)


def tools_of(given: Tools | Sequence[Any] | None) -> Tools | None:
    """`given` as `Tools`; None where there is nothing to call.

    Raises:
        ConfigError: as `Tools`.
    """
    tools = given if isinstance(given, Tools) or given is None else Tools(tuple(given))
    return tools if tools is not None and tools.functions else None


@dataclass(frozen=True, slots=True)
class ToolStep:
    """One call that has ended, whatever came of it.

    Attributes:
        call: what the model asked for.
        result: what it is told.
        duration_s: that the function took; 0 where it was not run.
        ends_round: the person speaks next, not the model.
        may_retry: the model may call again after this failure.
    """

    call: ToolCall
    result: ChatMessage
    duration_s: float = 0.0
    ends_round: bool = False
    may_retry: bool = True

    @property
    def is_error(self) -> bool:
        """Whether there is no result."""
        return bool(self.result.is_tool_call_error)


@dataclass(slots=True)
class ToolRunner:
    """Runs the calls of one round.

    Args:
        tools: what may be called.
        host: where.
    """

    tools: Tools
    host: Host
    _approved: set[str] = field(default_factory=set)

    async def run(self, call: ToolCall) -> ToolStep:
        """Run one call to its end. Cancelling ends it; see `Host.run`."""
        name = call.function.name
        function = next((each for each in self.tools.enabled if each.name == name), None)
        if function is None:
            known = [each.name for each in self.tools.enabled]
            hint = did_you_mean(name, known) or f"there are {', '.join(known)}"
            return _failed(call, f"there is no function {name!r}; {hint}")
        try:
            arguments = function.read_arguments(call.function.arguments)
        except ArgumentsError as error:
            return _failed(call, str(error), function)
        denial = await self._denial(function, arguments)
        if denial:
            return _failed(call, denial, function)
        return await self._run(call, function, arguments)

    async def _run(self, call: ToolCall, function: AIFunction, arguments: dict[str, Any]) -> ToolStep:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(function.timeout_s) as limit:
                if function.is_async:
                    value = await _run_async(lambda: function.inner(**arguments))
                else:
                    value = await self.host.run(lambda: function.inner(**arguments))
            content = result_text(value)
        except TimeoutError as error:
            why = f"took longer than {function.timeout_s:g} s" if limit.expired() else _in_words(error)
            return _failed(call, f"{function.name} failed: {why}", function, time.perf_counter() - began)
        except Exception as error:  # noqa: BLE001 - the function's own: told to the model and to the person
            return _failed(call, f"{function.name} failed: {_in_words(error)}", function, time.perf_counter() - began)
        if isinstance(content, str):
            content = _shortened(content, function.auto_truncate or MAX_RESULT_CHARACTERS)
        result = ChatMessage.function(function.name, content, call.id)
        ends = function.after is ChatRole.USER
        return ToolStep(call, result, time.perf_counter() - began, ends_round=ends)

    async def _denial(self, function: AIFunction, arguments: dict[str, Any]) -> str:
        """Why the call may not run; empty where it may."""
        if function.read_only or self.tools.approve is Approval.ALWAYS or function.name in self._approved:
            return ""
        if self.tools.approve is Approval.NEVER:
            return f"the user does not allow {function.name} to run"
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        question = f"Run {_shortened(f'{function.name}({shown})', 400)}? [y]es, [n]o, [a]lways: "
        try:
            answer = (await self.host.ask(question)).strip().lower()
        except CannotAskError as error:
            return (
                f"{function.name} was not run: it needs the user's approval, and {error} (--approve always allows it)"
            )
        if answer in ("a", "always"):
            self._approved.add(function.name)
        return "" if answer in ("y", "yes", "a", "always") else f"the user refused to run {function.name}"


def not_run(call: ToolCall) -> ToolStep:
    """A call that a stop came before, so that the conversation has an answer to each."""
    return _failed(call, f"{call.function.name} was not run: the user stopped it")


def _failed(call: ToolCall, text: str, function: AIFunction | None = None, duration_s: float = 0.0) -> ToolStep:
    result = ChatMessage.function(call.function.name, text, call.id, is_tool_call_error=True)
    return ToolStep(call, result, duration_s, may_retry=function is None or function.auto_retry)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _in_words(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {_shortened(text, 500)}" if text else type(error).__name__


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"


async def _run_async(start: Callable[[], Any]) -> Any:
    """What an async function gives, run on a loop of its own: a function that blocks then blocks only that.

    Cancelling cancels it there, and returns at once.
    """
    ready = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def main() -> Any:
        task = asyncio.current_task()
        assert task is not None
        running.append((asyncio.get_running_loop(), task))
        ready.set()
        return await start()

    def work(_: threading.Event) -> Any:
        try:
            return asyncio.run(main())
        except asyncio.CancelledError as error:
            raise RuntimeError("it was cancelled") from error

    try:
        return await run_in_thread(work, name="kani-nb-tool")
    except asyncio.CancelledError:
        if ready.is_set():
            loop, task = running[0]
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)
        raise
