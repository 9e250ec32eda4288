"""One call of a tool: found, checked, approved, run within its time, and its result told.

Whatever goes wrong is told to the model, and to the person; nothing that a function raises ends more than the function.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kani_nb.conversation.tools import APPROVAL_CHOICES, Approval, CannotAskError, Host, Tools, ToolStep
from kani_nb.engines.worker import run_in_thread
from kani_nb.errors import ArgumentsError, did_you_mean
from kani_nb.functions import AIFunction, result_text
from kani_nb.messages import ChatMessage, ChatRole, MessagePart, TextPart, ToolCall

#: Characters of a result that a model is told, unless the function says otherwise.
MAX_RESULT_CHARACTERS = 16_000
#: How often an answer that is neither yes nor no is asked for.
_QUESTIONS = 3
#: What no tokenizer can be given.
_UNREADABLE = re.compile("[\x00\ud800-\udfff]")
#: What would end the thread or the loop that a function runs on.
_ENDING = (SystemExit, GeneratorExit, StopIteration, StopAsyncIteration, asyncio.CancelledError)

Content = str | tuple[MessagePart | str, ...]


@dataclass(frozen=True, slots=True)
class _Told:
    """What a function gave, as a model is told it."""

    content: Content


@dataclass(slots=True)
class ToolRunner:
    """Runs the calls of one round.

    Args:
        tools: what may be called.
        host: where.
        approved: names that the person always allows; what is allowed here is added.

    Attributes:
        is_running: a function has begun, and has not ended.
    """

    tools: Tools
    host: Host
    approved: set[str] = field(default_factory=set)
    is_running: bool = False

    async def run(self, call: ToolCall) -> ToolStep:
        """Run one call to its end. Cancelling ends it; see `Host.run`."""
        self.is_running = False
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
        step = await self._run(call, function, arguments)
        self.is_running = False
        return step

    async def _run(self, call: ToolCall, function: AIFunction, arguments: dict[str, Any]) -> ToolStep:
        began = time.perf_counter()
        try:
            async with asyncio.timeout(function.timeout_s) as limit:
                content = await self._content(lambda: function.inner(**arguments), is_async=function.is_async)
        except TimeoutError as error:
            why = f"took longer than {function.timeout_s:g} s" if limit.expired() else _in_words(error)
            return _failed(call, f"{function.name} failed: {why}", function, time.perf_counter() - began)
        except Exception as error:  # noqa: BLE001 - the function's own: told to the model and to the person
            return _failed(call, f"{function.name} failed: {_in_words(error)}", function, time.perf_counter() - began)
        told = _fitted(content, function.auto_truncate or MAX_RESULT_CHARACTERS)
        result = ChatMessage.function(function.name, told, call.id)
        ends = function.after is ChatRole.USER
        return ToolStep(call, result, time.perf_counter() - began, ends_round=ends)

    async def _content(self, call: Callable[[], Any], *, is_async: bool) -> Content:
        """What `call` gives, as a model is told it; put into words where it was made, and within its time."""

        def begun() -> Any:
            self.is_running = True
            return call()

        def told() -> Any:
            value = begun()
            return value if inspect.isawaitable(value) else _Told(result_text(value))

        given = await (_run_async(begun) if is_async else self.host.run(_contained(told)))
        if not isinstance(given, _Told):  # a sync function around an async one
            given = await _run_async(lambda: given)
        content: Content = given.content
        return content

    async def _denial(self, function: AIFunction, arguments: dict[str, Any]) -> str:
        """Why the call may not run; empty where it may."""
        if function.read_only or self.tools.approve is Approval.ALWAYS or function.name in self.approved:
            return ""
        if self.tools.approve is Approval.NEVER:
            return f"the user does not allow {function.name} to run"
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        question = f"Run {_shortened(f'{function.name}({shown})', 400)}? {APPROVAL_CHOICES}"
        try:
            for _ in range(_QUESTIONS):
                answer = (await self.host.ask(question)).strip().lower()
                if answer in ("y", "yes", "a", "always"):
                    self.approved |= {function.name} if answer in ("a", "always") else set()
                    return ""
                if answer in ("", "n", "no"):
                    break
        except CannotAskError as error:
            why = f"it needs the user's approval, and {error} (--approve always allows it)"
            return f"{function.name} was not run: {why}"
        except Exception as error:  # noqa: BLE001 - whatever a front end's input raises: no answer is no approval
            return f"{function.name} was not run: the question for approval failed ({_in_words(error)})"
        return f"the user refused to run {function.name}"


def not_run(call: ToolCall) -> ToolStep:
    """A call that a stop came before, so that the conversation has an answer to each."""
    return _failed(call, f"{call.function.name} was not run: the user stopped it")


def stopped(call: ToolCall, duration_s: float) -> ToolStep:
    """A call that was under way when a stop came."""
    what = "was stopped by the user while it ran, and may have taken effect"
    return _failed(call, f"{call.function.name} {what}", None, duration_s)


def not_offered(call: ToolCall) -> ToolStep:
    """A call of a model that was offered nothing to call."""
    return _failed(call, f"{call.function.name} was not run: no function could be called here")


def answered(messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
    """`messages` with a result for each call: models and servers refuse a history where one has none."""
    whole: list[ChatMessage] = []
    waiting: list[ToolCall] = []
    for message in messages:
        if message.role is ChatRole.FUNCTION:
            waiting = [call for call in waiting if call.id != message.tool_call_id]
        else:
            whole += [not_run(call).result for call in waiting]
            waiting = list(message.tool_calls or ())
        whole.append(message)
    return (*whole, *(not_run(call).result for call in waiting))


def _failed(call: ToolCall, text: str, function: AIFunction | None = None, duration_s: float = 0.0) -> ToolStep:
    result = ChatMessage.function(call.function.name, _readable(text), call.id, is_tool_call_error=True)
    return ToolStep(call, result, duration_s, may_retry=function is None or function.auto_retry)


def _in_words(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {_shortened(text, 500)}" if text else type(error).__name__


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit:,} more characters)"


def _readable(text: str) -> str:
    return _UNREADABLE.sub("\N{REPLACEMENT CHARACTER}", text)


def _fitted(content: Content, limit: int) -> Content:
    """`content` without what no tokenizer can read, its texts no longer than the limit."""
    if isinstance(content, str):
        return _shortened(_readable(content), limit)
    return tuple(
        _shortened(_readable(str(part)), limit) if isinstance(part, str | TextPart) else part for part in content
    )


def _contained(call: Callable[[], Any]) -> Callable[[], Any]:
    """`call`, without the exceptions that would end more than the function."""

    def run() -> Any:
        try:
            return call()
        except _ENDING as error:
            raise RuntimeError(f"it raised {_in_words(error)}") from error
        except KeyboardInterrupt as error:
            if threading.current_thread() is threading.main_thread():
                raise  # a real one: the host knows what to do
            raise RuntimeError("it raised KeyboardInterrupt") from error

    return run


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
        return _Told(result_text(await start()))

    try:
        return await run_in_thread(lambda _: _contained(lambda: asyncio.run(main()))(), name="kani-nb-tool")
    except asyncio.CancelledError:
        if ready.is_set():
            loop, task = running[0]
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)
        raise
