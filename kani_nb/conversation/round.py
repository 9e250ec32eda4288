"""One answer: load, fit, generate, time every event; and end at once when asked to.

The engine is read by a task of its own, so that a silent engine can be left at any moment, and every event is timed
when it arrives, however slow its reader is. This module knows nothing of trees and stores: `session` commits what it
finds here.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kani_nb._frames import release_frames
from kani_nb.conversation.fitting import fit_to_context
from kani_nb.conversation.reply import Notice
from kani_nb.conversation.tree import Turn
from kani_nb.engines.base import (
    BaseCompletion,
    BaseEngine,
    EngineMemory,
    EngineNotice,
    PrefillProgress,
    ReasoningDelta,
    StreamEvent,
    TextDelta,
    ToolCallDelta,
)
from kani_nb.errors import GenerationError, KaniNbError, OutOfMemoryError
from kani_nb.messages import ChatMessage, MessagePart, ReasoningPart
from kani_nb.metrics.recorder import GenerationMetrics

#: How long an engine may take to end after a stop before it is left alone.
CLOSE_LIMIT_S = 0.3

_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class RoundRequest:
    """What is asked of the engine.

    Attributes:
        turns: what was said before.
        pending: the user's message, and what tools were called and gave since.
        functions: what the model may call.
    """

    engine: BaseEngine
    system: str | None
    turns: Sequence[Turn]
    pending: Sequence[ChatMessage]
    params: Mapping[str, Any]
    functions: Sequence[Any] = ()


@dataclass(slots=True)
class _Clock:
    """When what arrived, in seconds of `time.perf_counter`."""

    asked: float = 0.0
    first: float | None = None
    latest: float | None = None
    ended: float | None = None
    deltas: int = 0


@dataclass(slots=True)
class _Arrived:
    event: Any


@dataclass(slots=True)
class _Ended:
    error: BaseException | None = None


@dataclass(slots=True)
class Round:
    """One running answer. Everything but `stop` belongs to the event loop.

    Attributes:
        completion: the engine's own record of the whole answer, once it has come.
        stop_reason: `cancelled` or `interrupted` once somebody asked for the end; `error` where memory ran out.
        notices: what the person should know.
    """

    request: RoundRequest
    loop: asyncio.AbstractEventLoop
    started_at: float = field(default_factory=time.time)
    completion: BaseCompletion | None = None
    stop_reason: str = ""
    notices: list[Notice] = field(default_factory=list)
    _pieces: list[str] = field(default_factory=list)
    _reasoning: list[str] = field(default_factory=list)
    _prefill: PrefillProgress | None = None
    _queued_s: float = 0.0
    _prompt_tokens: int | None = None
    _counted: int | None = None
    _clock: _Clock = field(default_factory=_Clock)
    _queue: asyncio.Queue[_Arrived | _Ended] = field(default_factory=asyncio.Queue)
    _reader: asyncio.Task[None] | None = None
    _peak: tuple[int | None, str] = (None, "rss")
    _memory: EngineMemory | None = None
    _free_bytes: int | None = None
    _spilled_bytes: int = 0

    def stop(self, reason: str) -> bool:
        """End the answer as it is. Called from any thread; False when it has ended or was stopped already."""
        if self.stop_reason or self.completion is not None:
            return False
        self.stop_reason = reason
        try:
            self.loop.call_soon_threadsafe(self._queue.put_nowait, _Ended())
        except RuntimeError:  # the loop is closed, and nothing runs on it any more
            return False
        return True

    @property
    def text(self) -> str:
        """The answer's text so far."""
        return "".join(self._pieces)

    @property
    def has_begun(self) -> bool:
        """Whether anything of an answer is there."""
        return self.completion is not None or bool(self._pieces or self._reasoning)

    @property
    def message(self) -> ChatMessage:
        """The answer: whole, or as far as it came."""
        if self.completion is not None:
            return self.completion.message
        if not self._reasoning:
            return ChatMessage.assistant(self.text)
        parts: tuple[MessagePart | str, ...] = (ReasoningPart("".join(self._reasoning)), self.text)
        return ChatMessage.assistant(parts)

    async def events(self) -> AsyncGenerator[StreamEvent | Notice]:
        """What the engine sends, without its completion, until it ends or is stopped.

        Closing or cancelling this ends the generation; an engine that does not end within `CLOSE_LIMIT_S` is left to
        end by itself, and `notices` says so.

        Raises:
            KaniNbError: the engine's own errors, as they are.
            OutOfMemoryError: the device's memory did not suffice.
            GenerationError: anything else that was raised inside the engine, which is its cause.
        """
        self._reader = asyncio.create_task(self._read(), name="kani-nb-round")
        try:
            while True:
                item = await self._queue.get()
                if self.stop_reason:
                    break
                if isinstance(item, _Ended):
                    if item.error is None:
                        break
                    failure = _as_kani_error(item.error, self.request.engine)
                    item.error = None
                    raise failure
                event = item.event
                if isinstance(event, BaseCompletion):
                    self.completion = event
                    break
                yield self._noted(event)
        finally:
            await self._end_reader()
        if self.completion is None and not self.stop_reason:
            raise GenerationError(
                f"{type(self.request.engine).__name__}.stream ended without a completion",
                fix="its last event must be a BaseCompletion",
            )

    def _noted(self, event: Any) -> StreamEvent | Notice:
        """Keep what belongs to the answer, and hand the event on."""
        if isinstance(event, EngineNotice):
            event = Notice(event.text)
        if isinstance(event, Notice):
            self.notices.append(event)
        elif isinstance(event, str):
            self._pieces.append(event)
            self._counted = getattr(event, "tokens", None) or self._counted
            self._clock.latest = time.perf_counter()
            return event if isinstance(event, TextDelta) else TextDelta(event)
        elif isinstance(event, ReasoningDelta):
            self._reasoning.append(event.text)
        elif isinstance(event, PrefillProgress):
            self._queued_s = self._queued_s or event.queued_s
            self._prefill = event
        known: StreamEvent | Notice = event
        return known

    async def _read(self) -> None:
        """The reader's task: everything that may take long, from loading to the last token."""
        last = _Ended()
        try:
            await self._generate()
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - raised again where the events are read
            last = _Ended(error)
        finally:
            self._queue.put_nowait(last)

    async def _generate(self) -> None:
        from kani_nb.metrics.sampler import MemorySampler

        request = self.request
        if not request.engine.is_loaded:
            await request.engine.load()
        self._clock.asked = time.perf_counter()
        fitted = await fit_to_context(
            request.engine,
            request.system,
            request.turns,
            request.pending,
            params=request.params,
            functions=request.functions,
        )
        self._prompt_tokens = fitted.prompt_tokens
        if fitted.notice:
            self._queue.put_nowait(_Arrived(Notice(fitted.notice)))
        memory = await asyncio.to_thread(request.engine.memory)
        sampler = MemorySampler(memory.device if memory else "cpu")
        # While another answer holds the engine, its memory is not ours, and resetting the peak would spoil its record.
        waits = bool(getattr(getattr(request.engine, "slot", None), "is_taken", False))
        # Engines of the 0.x style may take no functions at all.
        offered = [list(request.functions)] if request.functions else []
        stream = request.engine.stream(fitted.messages, *offered, **request.params)
        try:
            with ExitStack() as watching:
                if not waits:
                    watching.enter_context(sampler)
                async for event in stream:  # to its very end: engines may have work after their completion
                    self._time(event)
                    self._queue.put_nowait(_Arrived(event))
                    if self.stop_reason:
                        break
                    if waits:
                        waits = False
                        watching.enter_context(sampler)
        finally:
            self._peak = (sampler.peak_bytes or None, sampler.peak_source)
            if hasattr(stream, "aclose"):
                await stream.aclose()

    def _time(self, event: Any) -> None:
        now = time.perf_counter()
        if isinstance(event, BaseCompletion):
            self._clock.ended = now
        elif isinstance(event, str | ReasoningDelta | ToolCallDelta) and event != "":
            self._clock.first = self._clock.first or now
            self._clock.deltas += 1

    async def _end_reader(self) -> None:
        """Wait for the reader to end; after a stop not for long."""
        reader = self._reader
        if reader is None:
            return
        if self.completion is None:
            reader.cancel()
        await asyncio.wait({reader}, timeout=CLOSE_LIMIT_S)
        name = type(self.request.engine).__name__
        if not reader.done():
            reader.cancel()
            self.notices.append(
                Notice(
                    f"{name} did not end within {CLOSE_LIMIT_S:g} s: it was left to end by itself, "
                    "and the next answer may have to wait for it"
                )
            )
        while self.completion is not None and not self._queue.empty():
            item = self._queue.get_nowait()
            if isinstance(item, _Ended) and item.error is not None:
                self.notices.append(Notice(f"{name} failed after its answer was whole: {item.error!r}"))
        if self._clock.ended is None:
            self._clock.ended = time.perf_counter()

    async def measure_memory(self) -> None:
        """Ask the engine what it holds now, and its device what is left."""
        from kani_nb.hardware.devices import free_bytes
        from kani_nb.hardware.spill import spilled_bytes

        try:
            self._memory = await asyncio.to_thread(self.request.engine.memory)
            if self._memory is not None:
                self._free_bytes = await asyncio.to_thread(free_bytes, self._memory.device)
                self._spilled_bytes = await asyncio.to_thread(spilled_bytes, *self._memory.placement)
        except Exception as error:  # noqa: BLE001 - the engine's own; it must not cost the answer
            self.notices.append(Notice(f"the engine could not say what memory it holds: {error!r}"))

    def metrics(self, *, model: str, turn: int, conversation: str) -> GenerationMetrics:
        """What the answer took, as far as it is known; see `GenerationMetrics` for what each number means."""
        clock, completion, prefill = self._clock, self.completion, self._prefill
        asked = clock.asked or time.perf_counter()
        ended = clock.ended or time.perf_counter()
        prompt_tokens = completion.prompt_tokens if completion else None
        if prompt_tokens is None:
            prompt_tokens = prefill.total_tokens if prefill else self._prompt_tokens
        is_told = completion is not None and completion.prompt_tokens is not None
        cached_tokens = completion.cached_tokens if completion else None
        # An engine that holds no memory has no cache either, and nothing to say of it.
        if cached_tokens is None and prefill and self._memory is not None:
            cached_tokens = prefill.cached_tokens
        generated = completion.completion_tokens if completion else self._counted
        # A stopped answer is counted up to its latest piece.
        counted_at = ended if completion or clock.latest is None else clock.latest
        tpot_s = None
        # A single piece came with the whole answer: nothing is known of the tokens in it.
        if clock.first is not None and generated is not None and generated > 1 and clock.deltas > 1:
            tpot_s = (counted_at - clock.first) / (generated - 1)
        context_tokens = None if prompt_tokens is None or generated is None else prompt_tokens + generated
        reason = completion.finish_reason if completion else None
        return GenerationMetrics(
            model=model,
            turn=turn,
            ttft_s=None if clock.first is None else max(0.0, clock.first - asked - self._queued_s),
            tpot_s=tpot_s,
            tokens_per_s=1 / tpot_s if tpot_s else None,
            duration_s=max(0.0, ended - asked - self._queued_s),
            queued_s=self._queued_s,
            prompt_tokens=prompt_tokens,
            is_estimated=not is_told and not self.request.engine.counts_exactly,
            cached_tokens=cached_tokens,
            completion_tokens=generated,
            peak_bytes=self._peak[0],
            peak_source=self._peak[1],
            weight_bytes=self._memory.weight_bytes if self._memory else None,
            kv_bytes=self._memory.kv_bytes if self._memory else None,
            free_bytes=self._free_bytes,
            placement=self._memory.placement if self._memory else {},
            spilled_bytes=self._spilled_bytes,
            context_tokens=context_tokens,
            max_context_size=self.request.engine.max_context_size or None,
            finish_reason=(reason.value if reason else "stop") if completion else self.stop_reason or "cancelled",
            seed=getattr(completion, "seed", None),
            conversation=conversation,
            started_at=self.started_at,
        )


def _as_kani_error(error: BaseException, engine: BaseEngine) -> BaseException:
    """`error` as this package raises it."""
    if isinstance(error, KaniNbError):
        return error
    reason = str(error) or type(error).__name__
    if _is_out_of_memory(error):
        release_frames(error)  # their locals are what filled the memory
        return OutOfMemoryError(
            f"{type(engine).__name__} ran out of memory while it generated",
            why=reason.strip().splitlines()[0][:300],
            fix="ask for a shorter answer (--max-new-tokens), or load with a smaller --max-context-size",
        )
    failure = GenerationError(
        f"{type(engine).__name__} failed while it generated",
        why=f"{type(error).__name__}: {reason}{_where(error)}",
    )
    failure.__cause__ = error
    return failure


def _where(error: BaseException) -> str:
    """The innermost line outside this package that `error` went through: there the person can look."""
    lines = [(frame.f_code.co_filename, number) for frame, number in traceback.walk_tb(error.__traceback__)]
    outside = [(name, number) for name, number in lines if not Path(name).is_relative_to(_PACKAGE)]
    return f" ({Path(outside[-1][0]).name}:{outside[-1][1]})" if outside else ""


def _is_out_of_memory(error: BaseException) -> bool:
    """Also torch's own, without importing torch: by name on devices, by text on the CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and ("out of memory" in str(error) or "can't allocate memory" in str(error))
