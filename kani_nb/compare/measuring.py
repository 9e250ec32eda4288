"""`compare`: one scheme after the other loaded, asked, read and freed, with everything it took.

Times are those of `conversation.round`, as every answer's; memory is read before a load and after it was freed, so that
what stays behind is seen. A scheme that fails becomes a row with its reason. Nothing here draws.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from kani_nb._frames import release_frames
from kani_nb.compare.cases import DEFAULT_MAX_NEW_TOKENS, DEFAULT_PROMPT, DEFAULT_RUNS, Case, Sweep, expand
from kani_nb.compare.machine import (
    MemoryInUse,
    OthersCpus,
    devices_of,
    environment,
    load_average,
    memory_in_use,
    memory_without_leftovers,
    threads_for,
)
from kani_nb.compare.reference import provenance, reference_cases, reference_name, text_pieces
from kani_nb.config import EngineConfig
from kani_nb.conversation.round import Round, RoundRequest
from kani_nb.engines.base import BaseEngine, LoadProgress, ProgressCallback, details_of
from kani_nb.engines.registry import create_engine, parse_spec
from kani_nb.errors import ConfigError, DoesNotFitError, EngineError, KaniNbError, OutOfMemoryError
from kani_nb.messages import ChatMessage
from kani_nb.metrics.comparison import ComparedRow, Comparison
from kani_nb.metrics.divergence import Quality, QualityTotals, Reference
from kani_nb.metrics.passages import PASSAGES
from kani_nb.metrics.recorder import GenerationMetrics
from kani_nb.metrics.sampler import MemorySampler
from kani_nb.quantization import Quantization

#: Memory still allocated after a model was freed, from which on its row says so. Less stays without anybody's fault:
#: bitsandbytes and what it imports take 60 MiB, and libraries keep scratch memory for their threads (90 MiB were seen).
LEFTOVER_BYTES = 128 * 2**20
#: The same where only resident memory is known, most of which is what allocators keep.
RESIDENT_LEFTOVER_BYTES = 256 * 2**20
_WARM_UP_TOKENS = 8

OnResult = Callable[[Comparison], None]


async def compare(
    config: EngineConfig,
    quantizations: Sequence[Quantization],
    *,
    runs: int = DEFAULT_RUNS,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
    text: str | None = None,
    text_name: str = "",
    prompt: str | None = None,
    sweep: Sweep | None = None,
    progress: ProgressCallback | None = None,
    on_result: OnResult | None = None,
) -> Comparison:
    """Each scheme's memory, time per token and quality, measured on this machine. Awaitable on any event loop.

    They are loaded one after the other, and each is freed before the next. Cancelling ends the running answer at its
    next token and frees its model. Engines that the Runtime holds are not touched.

    Args:
        config: the model, and how it is loaded; its quantization is replaced by each of `quantizations`.
        quantizations: what to compare; speed-ups are relative to the first one that could be measured.
        runs: timed greedy answers of each, after a warm-up.
        max_new_tokens: most tokens of an answer.
        text: what the quality is measured on; None takes our own.
        text_name: what to call it.
        prompt: what each is asked.
        sweep: a setting, and the values that it takes in the schemes that have it.
        progress: called with each step, on any thread.
        on_result: called with what was measured so far, after each row, on the loop's thread.

    Raises:
        ConfigError: an argument that cannot be used, or a text that is empty or too long.
        KaniNbError: no scheme could be measured; the first one's error.
    """
    from kani_nb._runtime import runtime

    request = _Request(
        cases=expand(config, quantizations, sweep),
        runs=_at_least_one("runs", runs),
        max_new_tokens=_at_least_one("max_new_tokens", max_new_tokens),
        passages=PASSAGES if text is None else (_not_empty("the text", text),),
        text_name=text_name or ("our own text" if text is None else "your text"),
        prompt=DEFAULT_PROMPT if prompt is None else _not_empty("the prompt", prompt),
    )
    rt = runtime()
    beside = [
        f"{name} on {memory.device}" for name, engine in rt.engines.items() if (memory := engine.memory()) is not None
    ]
    measuring = _Measuring(request, tuple(beside), progress or (lambda event: None), on_result or (lambda result: None))
    return await rt.loop.run(measuring.run())


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ConfigError(f"{name} is {value!r}", why="it must be a whole number of at least 1")
    return value


def _not_empty(what: str, text: str) -> str:
    if not text.strip():
        raise ConfigError(f"{what} is empty", fix="give some words, or leave it out for our own")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """What was asked for, checked."""

    cases: list[Case]
    runs: int
    max_new_tokens: int
    passages: tuple[str, ...]
    text_name: str
    prompt: str


@dataclass(slots=True)
class _Measuring:
    """One comparison as it goes on. Everything runs on the event loop, and what blocks in threads."""

    request: _Request
    beside: tuple[str, ...]
    report: ProgressCallback
    on_result: OnResult
    pieces: list[list[int]] = field(default_factory=list)
    reference: Reference | None = None
    result: Comparison | None = None
    failures: list[BaseException] = field(default_factory=list)
    devices: tuple[str, ...] = ("cpu",)
    threads: int = 1

    async def run(self) -> Comparison:
        """Measure the reference, then each case."""
        cases = self.request.cases
        self.devices = await asyncio.to_thread(devices_of, cases[0].config)
        self.threads = await asyncio.to_thread(threads_for, cases[0].config)
        self.result = Comparison(
            model=cases[0].config.model,
            environment=await asyncio.to_thread(environment, self.devices, self.threads, self.beside),
            runs=self.request.runs,
            max_new_tokens=self.request.max_new_tokens,
            prompt=self.request.prompt,
        )
        with ExitStack() as held:
            await self._measure_reference(held)
            before = await asyncio.to_thread(memory_without_leftovers, self.devices)
            for number, case in enumerate(cases):
                row = await self._measured(case, before, number / len(cases))
                after = await asyncio.to_thread(memory_without_leftovers, self.devices)
                row, before = _with_leftovers(row, before, after), after
                self._update(rows=(*self.result.rows, row))
                self.on_result(self.result)
        if not self.result.measured:
            raise _as_error(self.failures[0])
        return self.result

    def _update(self, **changes: Any) -> None:
        assert self.result is not None
        self.result = replace(self.result, **changes)

    # -- the reference ---------------------------------------------------------------------------------------------

    async def _measure_reference(self, held: ExitStack) -> None:
        """Keep the probabilities of the highest precision that fits."""
        assert self.result is not None
        tried: list[str] = []
        for case in reference_cases(self.request.cases):
            try:
                await self._keep_reference(case, held)
            except (DoesNotFitError, OutOfMemoryError) as error:
                tried.append(f"{case.label} ({error.what})")
                release_frames(error)
                continue
            if tried:
                said = f"{'; '.join(tried)}: so the reference is {case.label}"
                self._update(notes=(said, *self.result.notes))
            return
        self._update(notes=(f"There is no reference: {'; '.join(tried)}",))

    async def _keep_reference(self, case: Case, held: ExitStack) -> None:
        engine = create_engine(self._config_of(case))
        try:
            self._say(f"reference {case.label}", "loading", 0.0)
            await engine.load()
            if not hasattr(engine, "log_probs") or not hasattr(engine, "tokenizer"):
                self._update(notes=(f"{type(engine).__name__} gives no probabilities: the quality is not measured",))
                return
            self.pieces = await asyncio.to_thread(text_pieces, engine, self.request.passages)
            total = sum(len(piece) for piece in self.pieces)
            if not any(len(piece) > 1 for piece in self.pieces):
                raise ConfigError(
                    "the text has a single token", why="perplexity needs at least two", fix="a longer one"
                )
            if self.reference is None:
                self.reference = held.enter_context(Reference(total))
            self.reference.clear()
            totals = QualityTotals()
            for number, ids in enumerate(self.pieces):
                self._say(f"reference {case.label}", f"reading, piece {number + 1} of {len(self.pieces)}", 0.0)
                log_probs = await engine.log_probs(ids)
                await asyncio.to_thread(self.reference.add, log_probs)
                await asyncio.to_thread(totals.add, ids, log_probs)
            details = details_of(engine)
            self._update(
                notes=provenance(str(details.get("origin", ""))),
                reference=reference_name(case, details),
                reference_perplexity=totals.quality.perplexity,
                text_name=self.request.text_name,
                text_tokens=total,
                text_pieces=len(self.pieces),
            )
        finally:
            await engine.close()

    # -- one case --------------------------------------------------------------------------------------------------

    async def _measured(self, case: Case, before: MemoryInUse, done: float) -> ComparedRow:
        """The row of a case, whatever becomes of it."""
        row = ComparedRow(
            label=case.label, settings=case.config.quantization, line=case.config.to_line(), memory_source=before.source
        )
        try:
            return await self._measure(case, row, before, done)
        except Exception as error:  # noqa: BLE001 - the others go on; it is told of in the row
            self.failures.append(error)
            release_frames(error)
            reason, fix = _reason(error)
            return replace(row, reason=reason, fix=fix)

    async def _measure(self, case: Case, row: ComparedRow, before: MemoryInUse, done: float) -> ComparedRow:
        _check_engine(case.config)
        engine = create_engine(self._config_of(case))
        try:
            self._say(case.label, "loading", done)
            await engine.prepare()
            started = time.perf_counter()
            await engine.load()
            load_s = time.perf_counter() - started
            memory = await asyncio.to_thread(engine.memory)  # before the first forward, which may re-pack the weights
            loaded = await asyncio.to_thread(memory_in_use, self.devices)
            details = details_of(engine)
            held = str(details.get("quantization", "none"))
            row = replace(
                row,
                # A checkpoint may have been quantized before.
                label=held if case.config.quantization.is_none and held != "none" else row.label,
                load_s=load_s,
                dtype=str(details.get("dtype", "")),
                device=memory.device if memory is not None else "",
                weight_bytes=memory.weight_bytes if memory is not None else None,
                in_use_bytes=loaded.total_bytes - before.total_bytes,
                notes=tuple(filter(None, [str(details.get("notes", ""))])),
            )
            row = await self._answers(engine, case, row, before, done)
            quality = await self._quality(engine, case, done)
            if quality is not None:
                row = replace(
                    row,
                    kl_nats=quality.kl_nats,
                    top1_agreement=quality.top1_agreement,
                    perplexity=quality.perplexity,
                    positions=quality.positions,
                )
            return row
        finally:
            await engine.close()

    async def _answers(
        self, engine: BaseEngine, case: Case, row: ComparedRow, before: MemoryInUse, done: float
    ) -> ComparedRow:
        """The timed runs, after one that is not."""
        self._say(case.label, "warming up", done)
        await self._ask(engine, case, min(_WARM_UP_TOKENS, self.request.max_new_tokens))
        load_now, others = load_average(), OthersCpus()
        metrics, texts, peaks = [], [], []
        for number in range(self.request.runs):
            self._say(case.label, f"answering, run {number + 1} of {self.request.runs}", done)
            with ExitStack() as watching:
                samplers = [watching.enter_context(MemorySampler(device)) for device in self.devices]
                answered, text = await self._ask(engine, case, self.request.max_new_tokens)
            metrics.append(answered)
            texts.append(text)
            peaks.append(sum(sampler.peak_bytes for sampler in samplers))
        return replace(
            row,
            peak_bytes=max(peaks) - before.total_bytes,
            ttft_runs_s=tuple(each.ttft_s for each in metrics if each.ttft_s is not None),
            tpot_runs_s=tuple(each.tpot_s for each in metrics if each.tpot_s is not None),
            answer_tokens=metrics[-1].completion_tokens,
            answer=texts[0],
            load_average=load_now,
            others_cpus=others.measured(),
            notes=(*row.notes, *_remarks(metrics, texts)),
        )

    async def _ask(self, engine: BaseEngine, case: Case, max_new_tokens: int) -> tuple[GenerationMetrics, str]:
        """One greedy answer, timed as every answer is."""
        request = RoundRequest(
            engine,
            None,
            (),
            (ChatMessage.user(self.request.prompt),),
            {"max_new_tokens": max_new_tokens, "do_sample": False},
        )
        running = Round(request, asyncio.get_running_loop())
        async with aclosing(running.events()) as events:
            async for _ in events:
                pass
        await running.measure_memory()
        return running.metrics(model=case.config.model, turn=1, conversation=""), running.text

    async def _quality(self, engine: Any, case: Case, done: float) -> Quality | None:
        """What it makes of the text, beside what the reference made of it; None where there is none."""
        if self.reference is None or len(self.reference) < len(self.pieces):
            return None
        totals = QualityTotals()
        for number, ids in enumerate(self.pieces):
            self._say(case.label, f"reading, piece {number + 1} of {len(self.pieces)}", done)
            log_probs = await engine.log_probs(ids)
            known = await asyncio.to_thread(self.reference.read, number)
            await asyncio.to_thread(totals.add, ids, log_probs, known)
        return totals.quality

    def _config_of(self, case: Case) -> EngineConfig:
        """The case's configuration, without reuse of earlier prompts, and with the threads that all of them have."""
        return replace(case.config, cache_gib=0.0, threads=self.threads, cache_quantized=False)

    def _say(self, stage: str, detail: str, fraction: float) -> None:
        self.report(LoadProgress(stage, detail, fraction))


def _check_engine(config: EngineConfig) -> None:
    """Refuse a scheme that the model's engine does not know, and would silently leave out."""
    from kani_nb.hardware.schemes import find_scheme

    engine = parse_spec(config.model).engine
    scheme = find_scheme(config.quantization.scheme)
    if not config.quantization.is_none and scheme.engine != engine:
        raise ConfigError(f"{scheme.name} is no scheme of the engine {engine}", why=f"{scheme.engine} runs it")


def _remarks(metrics: Sequence[GenerationMetrics], texts: Sequence[str]) -> list[str]:
    """What the runs themselves give away."""
    last = metrics[-1]
    remarks = []
    if any(text != texts[0] for text in texts):
        remarks.append("its greedy answers differ from run to run; the first is shown")
    if any(each.cached_tokens for each in metrics):
        remarks.append("a part of the prompt was cached: the time to the first text is too short")
    if last.tpot_s is None:
        remarks.append(f"its answer has {last.completion_tokens} tokens: too few for a time per token")
    if len(last.placement) > 1:
        shares = ", ".join(f"{share:.0%} on {device}" for device, share in last.placement.items())
        remarks.append(f"its weights are spread: {shares}")
    if last.spilled_bytes:
        remarks.append(
            f"the driver has put {last.spilled_bytes / 2**20:,.0f} MiB into main memory: that is why it is slow"
        )
    return remarks


def _with_leftovers(row: ComparedRow, before: MemoryInUse, after: MemoryInUse) -> ComparedRow:
    """`row` with what did not come back when its model was freed."""
    resident = after.total_bytes - before.total_bytes
    left, bound, what = resident, RESIDENT_LEFTOVER_BYTES, "in use"
    if before.allocated_bytes is not None and after.allocated_bytes is not None:
        left, bound, what = after.allocated_bytes - before.allocated_bytes, LEFTOVER_BYTES, "still allocated"
    note = f"after it was freed, {left / 2**20:,.0f} MiB more were {what} than before: something of it is held on to"
    return replace(
        row,
        left_bytes=left,
        left_resident_bytes=resident,
        notes=row.notes if left <= bound else (*row.notes, note),
    )


def _reason(error: BaseException) -> tuple[str, str]:
    """Why a row is empty, and what to do about it."""
    if isinstance(error, KaniNbError):
        why = " ".join(f"{error.what}: {error.why}".split()) if error.why else error.what
        return why, " ".join(error.fix.split())
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__, ""


def _as_error(error: BaseException) -> BaseException:
    """What is raised when nothing could be measured."""
    if isinstance(error, KaniNbError):
        return error
    failure = EngineError("no scheme could be measured", why=_reason(error)[0])
    failure.__cause__ = error
    return failure
