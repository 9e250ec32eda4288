"""One turn while it is answered: a generation, the calls it asks for, and so on until there is an answer.

The user's message, every step and the answer belong to one turn, so that they are committed together. How one
generation is read and timed is `round`, how one call is run `tool_calls`; what is committed is `session`'s.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from kani_nb.conversation.reply import Notice
from kani_nb.conversation.round import Round, RoundRequest
from kani_nb.conversation.structured import AnswerRejected, Structure, told
from kani_nb.conversation.tool_calls import ToolRunner, answered, not_offered, not_run, stopped
from kani_nb.conversation.tools import MAX_FAILURES, Host, Tools, ToolStep
from kani_nb.engines.base import FinishReason, StreamEvent, TokenLogprob
from kani_nb.errors import SchemaError
from kani_nb.messages import ChatMessage, ToolCall
from kani_nb.metrics.recorder import GenerationMetrics, combined

TurnEvent = StreamEvent | Notice | ToolStep | AnswerRejected


@dataclass(slots=True)
class RunningTurn:
    """One turn on its way. Everything but `stop` belongs to the event loop.

    Attributes:
        request: what is asked of the engine first; what tools gave is added to it.
        tools: what the model may call; None where it may call nothing.
        host: where functions run.
        structure: the type that the answer must have; None where any text will do.
        value: the answer as an object of that type, when it is there.
        approved: names of functions that the person always allows.
        stop_reason: `cancelled` or `interrupted` once somebody asked for the end; `error` where memory ran out.
    """

    request: RoundRequest
    loop: asyncio.AbstractEventLoop
    tools: Tools | None = None
    host: Host | None = None
    structure: Structure | None = None
    value: Any = None
    approved: set[str] = field(default_factory=set)
    stop_reason: str = ""
    started_at: float = field(default_factory=time.time)
    _steps: list[ChatMessage] = field(default_factory=list)
    _notices: list[Notice] = field(default_factory=list)
    _rejected: list[ChatMessage] = field(default_factory=list)
    _rounds: list[Round] = field(default_factory=list)
    _calling: asyncio.Task[ToolStep] | None = None
    _has_ended: bool = False

    def stop(self, reason: str) -> bool:
        """End the turn as it is. Called from any thread; False when it has ended or was stopped already."""
        if self.stop_reason or self._has_ended:
            return False
        current = self._rounds[-1] if self._rounds else None
        is_last = current is not None and current.completion is not None and self.structure is None
        if current is not None and is_last and not self._goes_on(current):
            return False
        self.stop_reason = reason
        if current is not None:
            current.stop(reason)
        try:
            self.loop.call_soon_threadsafe(self._cancel_call)
        except RuntimeError:  # the loop is closed, and nothing runs on it any more
            return False
        return True

    def _cancel_call(self) -> None:
        if self._calling is not None:
            self._calling.cancel()

    def _is_stopped(self) -> bool:
        return bool(self.stop_reason)

    @property
    def has_begun(self) -> bool:
        """Whether anything of an answer is there."""
        return bool(self._steps) or (bool(self._rounds) and self._rounds[-1].has_begun)

    @property
    def message(self) -> ChatMessage:
        """The model's latest message: whole, or as far as it came."""
        if self._rounds and (self._rounds[-1].has_begun or not self._steps):
            return self._rounds[-1].message
        spoken = [each for each in self._steps if each.tool_calls]
        return spoken[-1] if spoken else ChatMessage.assistant("")

    @property
    def has_steps(self) -> bool:
        """Whether anything was called: what it did is done, whatever comes after."""
        return bool(self._steps)

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """Everything after the user's message so far; each call has a result."""
        current = self._rounds[-1] if self._rounds else None
        if current is None or (self._steps and (not current.has_begun or current.message in self._steps)):
            return answered(self._steps)
        return answered((*self._steps, current.message))

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Of the latest message's tokens, where they were asked for."""
        completion = self._rounds[-1].completion if self._rounds else None
        return tuple(getattr(completion, "logprobs", None) or ())

    @property
    def notices(self) -> list[Notice]:
        """What the person should know."""
        return [*self._notices, *(each for one in self._rounds for each in one.notices)]

    async def events(self) -> AsyncGenerator[TurnEvent]:
        """Everything of the turn as it comes: what engines send, and a `ToolStep` for each call that has ended.

        Closing or cancelling this ends the turn. Raises what `Round.events` raises.
        """
        runner = None
        if self.tools is not None and self.host is not None:
            runner = ToolRunner(self.tools, self.host, self.approved)
        failures = calls_made = 0
        while True:
            may_call = runner is not None and failures < MAX_FAILURES and calls_made < runner.tools.max_steps
            current = self._next_round(may_call=may_call)
            async with aclosing(current.events()) as events:
                async for event in events:
                    yield event
            if self._is_stopped():
                return
            if runner is None or not self._goes_on(current):
                for step in self._unoffered(current):
                    yield step
                rejected = self._rejection(current)
                if rejected is None:
                    self._has_ended = True
                    return
                yield rejected
                continue
            self._steps.append(current.message)
            ended: list[ToolStep] = []
            async with aclosing(self._call_all(runner, current.message.tool_calls or ())) as steps:
                async for step in steps:
                    ended.append(step)
                    yield step
            if self._is_stopped() or any(step.ends_round and not step.is_error for step in ended):
                return
            calls_made += 1
            failures = failures + 1 if all(step.is_error for step in ended) else 0
            if any(step.is_error and not step.may_retry for step in ended):
                failures = MAX_FAILURES
            if failures == MAX_FAILURES or calls_made == runner.tools.max_steps:
                why = "its calls kept failing" if failures == MAX_FAILURES else f"it has called {calls_made} times"
                notice = Notice(f"the model must answer without tools now: {why}")
                self._notices.append(notice)
                yield notice

    def _rejection(self, current: Round) -> AnswerRejected | None:
        """Why the model must try again; None where its answer will do.

        Raises:
            SchemaError: it has tried often enough.
        """
        if self.structure is None:
            return None
        completion = current.completion
        try:
            self.value = self.structure.read(current.message.text)
        except SchemaError as error:
            if completion is not None and completion.finish_reason is FinishReason.LENGTH:
                raise self.structure.cut_short(completion.completion_tokens) from None
            if len(self._rejected) >= 2 * self.structure.retries:
                raise self.structure.given_up(error) from None
            self._rejected += [current.message, told(error)]
            return AnswerRejected(f"{error.what}: {error.why}")
        return None

    def _unoffered(self, current: Round) -> list[ToolStep]:
        """Calls of a message that was offered no function: each gets an answer, as every model's history must have."""
        calls = current.message.tool_calls or ()
        if not calls:
            return []
        ended = [not_offered(call) for call in calls]
        self._steps += [current.message, *(step.result for step in ended)]
        names = ", ".join(dict.fromkeys(call.function.name for call in calls))
        self._notices.append(Notice(f"the model called {names}, and was offered no function to call"))
        return ended

    @staticmethod
    def _goes_on(current: Round) -> bool:
        """Whether calls follow what this generation said; one that was offered no function can call none."""
        return bool(current.request.functions and current.message.tool_calls)

    def _next_round(self, *, may_call: bool) -> Round:
        # What did not fit is asked for again without tools, so that the model can be held to the schema.
        may_call = may_call and not self._rejected
        functions = self.tools.enabled if self.tools is not None and may_call else ()
        request = replace(self.request, pending=(*self.request.pending, *self._steps), functions=functions)
        if self.structure is not None:
            pending = [*self.structure.asked_for(request.pending), *self._rejected]
            # A model that is held to a schema can call nothing.
            is_held = self.request.engine.holds_to_schemas and not functions and self.structure.can_be_held_to
            more = {"json_schema": self.structure.schema_text} if is_held else {}
            request = replace(request, pending=pending, params={**self.request.params, **more})
        current = Round(request, self.loop)
        self._rounds.append(current)
        if self.stop_reason:
            current.stop(self.stop_reason)
        return current

    async def _call_all(self, runner: ToolRunner, calls: Sequence[ToolCall]) -> AsyncGenerator[ToolStep]:
        """The calls of one message, one after the other: they share the main thread, and the person who is asked."""
        for call in calls:
            step = not_run(call)
            if not self.stop_reason:
                began = time.perf_counter()
                self._calling = asyncio.create_task(runner.run(call), name="kani-nb-tool")
                try:
                    await asyncio.wait({self._calling})
                except asyncio.CancelledError:
                    self._calling.cancel()
                    if runner.is_running:
                        self._steps.append(stopped(call, time.perf_counter() - began).result)
                    raise
                if not self._calling.cancelled():
                    step = self._calling.result()
                elif runner.is_running:
                    step = stopped(call, time.perf_counter() - began)
                self._calling = None
            self._steps.append(step.result)
            yield step

    async def measure_memory(self) -> None:
        """Ask the engine what it holds now, and its device what is left."""
        if self._rounds:
            await self._rounds[-1].measure_memory()

    def metrics(self, *, model: str, turn: int, conversation: str) -> GenerationMetrics:
        """What the whole turn took: that of its generations together."""
        if self._rounds and self.stop_reason:
            self._rounds[-1].stop_reason = self._rounds[-1].stop_reason or self.stop_reason
        each = [one.metrics(model=model, turn=turn, conversation=conversation) for one in self._rounds]
        whole = combined(each)
        return replace(whole, finish_reason=self.stop_reason) if self.stop_reason else whole
