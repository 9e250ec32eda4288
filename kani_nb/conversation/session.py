"""A conversation that can be asked: one round is one transaction on the tree and in the store.

A session lives on the runtime's event loop and is called from anywhere: from a notebook's own loop, from plain threads,
from magics. It decides what is committed: the user's message and the answer together (whole, or partial and marked
interrupted), or neither. How an answer is generated and timed is `round`; where a turn belongs is `tree`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kani_nb._loop import LoopThread
from kani_nb.conversation.journal import Journal
from kani_nb.conversation.kept import KeptConversation
from kani_nb.conversation.reply import ChatReply, Notice, Prompt, SessionEvent, user_message
from kani_nb.conversation.round import RoundRequest
from kani_nb.conversation.running_turn import RunningTurn
from kani_nb.conversation.store import ConversationStore
from kani_nb.conversation.structured import Structure, structure_of
from kani_nb.conversation.tools import Host, Tools, WorkerHost, tools_of
from kani_nb.conversation.tree import CellRef, Conversation, Turn, new_id, replacement_notices
from kani_nb.engines.base import BaseEngine
from kani_nb.errors import KaniNbError, OutOfMemoryError, StoreError
from kani_nb.messages import ChatMessage
from kani_nb.metrics.recorder import GenerationMetrics, Recorder

__all__ = ["ChatReply", "ChatSession", "Notice", "Prompt", "SessionEvent"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Plan:
    """Where the new turn goes, and what it says."""

    prompt: ChatMessage
    parent_id: str | None
    cell: CellRef
    tools: Tools | None = None
    structure: Structure | None = None


class ChatSession(KeptConversation):
    """One conversation on the current engine. Reading is safe from any thread.

    Args:
        conversation: what is continued.
        loop: where rounds run.
        engine: gives the current engine, or raises `NoEngineError`.
        recorder: gets the metrics of every committed answer, on the loop's thread.
        store: where turns are kept; None keeps them in memory only.
        engine_name: gives the current engine's name, for the record.

    Attributes:
        tools: what the model may call in every round; None where it may call nothing. Not kept in the store.
        host: where functions run, and where the person is asked.
        reply: the latest one; None before the first.
    """

    def __init__(
        self,
        conversation: Conversation,
        *,
        loop: LoopThread,
        engine: Callable[[], BaseEngine],
        recorder: Recorder,
        store: ConversationStore | None,
        engine_name: Callable[[], str],
    ) -> None:
        super().__init__(conversation, store)
        self._loop = loop
        self._engine = engine
        self._recorder = recorder
        self._engine_name = engine_name
        self._approved: set[str] = set()
        self._asked_with: dict[str, tuple[Tools | None, Structure | None]] = {}  # by turn: to ask it so again
        self.tools: Tools | None = None
        self.host: Host = WorkerHost()
        self.reply: ChatReply | None = None

    @property
    def answering_engine(self) -> BaseEngine | None:
        """The engine that a running round uses; None when none is running."""
        running = self._round
        return running.request.engine if running is not None else None

    # Rounds.

    async def ask(
        self,
        prompt: Prompt,
        *,
        cell: CellRef | None = None,
        append: bool = False,
        tools: Any = None,
        schema: Any = None,
        **params: Any,
    ) -> ChatReply:
        """The answer to `prompt`. Awaitable from any event loop; cancelling ends the answer and keeps what has come.

        Args:
            prompt: text, or a tuple of parts and strings.
            cell: the notebook cell that asks; see `Conversation.place`.
            append: never replace an earlier turn of the same cell.
            tools: functions that the model may call in this round, or `Tools`; None takes the conversation's own.
            schema: the type that the answer must have (a pydantic model, a dataclass, `list[int]`, ...);
                `ChatReply.value` is then an object of it.
            **params: generation parameters under transformers' names, given to the engine as they are.

        Raises:
            PromptError: the prompt is empty, or the model cannot be given it.
            PromptTooLongError: the prompt alone does not fit the context.
            ConversationBusyError: a round is running on this conversation.
            NoEngineError: no engine is loaded.
            SchemaError: no answer had the type that was asked for.
            OutOfMemoryError: memory did not suffice; what had come of the answer is committed, marked interrupted.
            EngineError: generation failed. As with every other error, nothing was committed then.
        """
        return await self._loop.run(self._reply(lambda: self._ask_plan(prompt, cell, append, tools, schema), params))

    def ask_sync(
        self,
        prompt: Prompt,
        *,
        cell: CellRef | None = None,
        append: bool = False,
        tools: Any = None,
        schema: Any = None,
        **params: Any,
    ) -> ChatReply:
        """`ask` for threads that cannot await: blocks until the answer is there. See `ask` for what it raises.

        A `KeyboardInterrupt` ends the answer, keeps what has come, and is raised again.

        Raises:
            RuntimeError: called on the loop's own thread.
        """
        return self._loop.run_sync(self._reply(lambda: self._ask_plan(prompt, cell, append, tools, schema), params))

    def stream(
        self,
        prompt: Prompt,
        *,
        cell: CellRef | None = None,
        append: bool = False,
        tools: Any = None,
        schema: Any = None,
        **params: Any,
    ) -> AsyncIterator[SessionEvent]:
        """The answer piece by piece, on any event loop; the last item is the `ChatReply`.

        Items are the engine's deltas and progress (its completion is in the reply), and `Notice`s, which are strings
        too and no part of the answer; those known at the end are in the reply only.
        Leaving early ends the answer and keeps what has come. Raises what `ask` raises, when iterated.
        """
        return self._loop.iterate(
            lambda: self._run(lambda: self._ask_plan(prompt, cell, append, tools, schema), params)
        )

    async def retry(self, number: int | None = None, **params: Any) -> ChatReply:
        """Another answer to turn `number` of the branch (the last when None), as its sibling; the old one is kept.

        Raises:
            ConversationError: there is no such turn. See `ask` for the others.
        """
        return await self._loop.run(self._reply(lambda: self._again_plan(number), params))

    def stream_retry(self, number: int | None = None, **params: Any) -> AsyncIterator[SessionEvent]:
        """`retry` piece by piece; see `stream`."""
        return self._loop.iterate(lambda: self._run(lambda: self._again_plan(number), params))

    async def edit(self, number: int, prompt: Prompt, **params: Any) -> ChatReply:
        """Ask `prompt` in the place of turn `number` of the branch, as its sibling; the old one is kept.

        Raises:
            ConversationError: there is no such turn. See `ask` for the others.
        """
        return await self._loop.run(self._reply(lambda: self._again_plan(number, prompt), params))

    def stream_edit(self, number: int, prompt: Prompt, **params: Any) -> AsyncIterator[SessionEvent]:
        """`edit` piece by piece; see `stream`."""
        return self._loop.iterate(lambda: self._run(lambda: self._again_plan(number, prompt), params))

    def stop(self) -> bool:
        """End the running answer at its next token, from any thread; False when none is running.

        The partial answer is committed with the finish reason `cancelled`. Where no text has come, nothing is.
        """
        return self._stop("cancelled")

    def interrupt(self) -> bool:
        """As `stop`, with the finish reason `interrupted`."""
        return self._stop("interrupted")

    def _stop(self, reason: str) -> bool:
        with self._lock:
            if not self._is_busy:
                return False
            if self._round is None:  # asked for, and not started yet
                self._early_stop = self._early_stop or reason
                return True
            return self._round.stop(reason)

    # One round.

    async def _reply(self, plan: Callable[[], _Plan], params: dict[str, Any]) -> ChatReply:
        async with aclosing(self._run(plan, params)) as events:
            async for event in events:
                if isinstance(event, ChatReply):
                    return event
        raise AssertionError("a round ends with a reply or an error")

    async def _run(self, plan: Callable[[], _Plan], params: dict[str, Any]) -> AsyncGenerator[SessionEvent]:
        """The round, on the loop."""
        with self._changing():
            planned = plan()
            running = self._start(planned, params)
            draft = Turn(
                new_id(),
                planned.parent_id,
                (planned.prompt,),
                planned.cell,
                running.started_at,
                interrupted=True,
                model=self._engine_name(),
            )
            journal = Journal(
                self._store,
                self._conversation,
                lambda: replace(draft, messages=(planned.prompt, *running.messages)),
            )
            self._asked_with[draft.id] = (planned.tools, planned.structure)
            is_generating = True
            try:
                async with aclosing(running.events()) as events:
                    async for event in events:
                        yield event
                        if running.has_begun:
                            journal.begin()
                is_generating = False
                reply = await _to_the_end(self._settle(running, draft, journal))
                self.reply = reply
            except (asyncio.CancelledError, GeneratorExit):  # the one who asked has left: what has come is kept
                if is_generating:
                    await _to_the_end(self._settle(running, draft, journal))
                raise
            except KaniNbError as error:
                # What memory cut short is kept, and what was called: its effects are there.
                is_kept = running.has_steps or (isinstance(error, OutOfMemoryError) and running.has_begun)
                if not (is_generating and is_kept):
                    await _to_the_end(journal.discard())
                    raise
                running.stop_reason = "error"
                error.reply = await _to_the_end(self._settle(running, draft, journal))
                raise
            except BaseException:
                await _to_the_end(journal.discard())
                raise
        yield reply

    def _start(self, planned: _Plan, params: dict[str, Any]) -> RunningTurn:
        """The round, known to `stop` from here on."""
        before = self._conversation.path(planned.parent_id) if planned.parent_id is not None else ()
        request = RoundRequest(self._engine(), self._conversation.system, before, (planned.prompt,), params)
        tools = self.tools if planned.tools is None else planned.tools
        tools = tools.as_they_are_now() if tools is not None else None
        loop = asyncio.get_running_loop()
        running = RunningTurn(request, loop, tools, self.host, planned.structure, approved=self._approved)
        with self._lock:
            self._round = running
            if self._early_stop:
                running.stop(self._early_stop)
        return running

    async def _settle(self, running: RunningTurn, draft: Turn, journal: Journal) -> ChatReply:
        """Commit what has come, if anything, and say what it took."""
        await running.measure_memory()
        conversation = self._conversation
        if running.has_begun:
            number = 1 + (len(conversation.path(draft.parent_id)) if draft.parent_id is not None else 0)
        else:
            number = len(conversation.path())
        metrics = running.metrics(model=draft.model, turn=number, conversation=conversation.id)
        turn = replace(
            draft,
            messages=(*draft.messages, *running.messages),
            interrupted=metrics.finish_reason in ("cancelled", "interrupted", "error"),
            metrics=metrics.to_dict(),
        )
        notices: list[str] = list(running.notices)
        if running.request.params.get("logprobs") is not None and running.has_begun and not running.logprobs:
            notices.append("this engine gives no probabilities of tokens")
        if running.has_begun:
            self._conversation = conversation.with_turn(turn)
            notices += replacement_notices(conversation, self._conversation)
            await journal.end()
            unsaved = await self._save(turn)
            notices += unsaved or journal.problems  # both have the same reason
            notices += self._record(metrics)
        else:
            await journal.discard()
            notices += journal.problems
        message = running.message
        return ChatReply(message.text, message, metrics, turn, number, tuple(notices), running.value, running.logprobs)

    async def _save(self, turn: Turn) -> list[str]:
        """Write the turn; where that fails it stays in memory, and the notice says why."""
        conversation_id, head = self._conversation.id, self._conversation.head
        try:
            await asyncio.to_thread(self._write, lambda store: store.save_turn(conversation_id, turn, head))
        except StoreError as error:
            return [f"this answer could not be saved, and is kept in memory only: {error}"]
        return []

    def _record(self, metrics: GenerationMetrics) -> list[str]:
        try:
            self._recorder.add(metrics)
        except Exception as error:  # noqa: BLE001 - a listener's own; it must not cost the answer
            return [f"a listener of the metrics failed: {error!r}"]
        return []

    # Plans.

    def _ask_plan(self, prompt: Prompt, cell: CellRef | None, append: bool, tools: Any, schema: Any) -> _Plan:
        message = user_message(prompt)
        cell = cell or CellRef()
        parent_id = self._conversation.place(message.text, cell, append=append)
        return _Plan(message, parent_id, cell, tools_of(tools), structure_of(schema))

    def _again_plan(self, number: int | None, prompt: Prompt | None = None) -> _Plan:
        turn = self._conversation.turn_at(number)
        asked = turn.prompt if prompt is None else user_message(prompt)
        tools, structure = self._asked_with.get(turn.id, (None, None))
        return _Plan(asked, turn.parent_id, turn.cell, tools, structure)


async def _to_the_end(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of `coroutine`, which is never cut short: a cancellation is raised when it has ended."""
    task = asyncio.create_task(coroutine)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()
