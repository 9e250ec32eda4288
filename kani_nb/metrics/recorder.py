"""What each answer took: one frozen record per generation, and the list that keeps the latest thousand.

All times are measured by `conversation.session` around the engine's stream, so that every engine is measured alike.
This module does not measure and does not draw.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, overload


@dataclass(frozen=True, slots=True)
class GenerationMetrics:
    """One generation. Seconds, bytes and tokens; None is what could not be known.

    Attributes:
        turn: number of the turn along its branch, from 1.
        ttft_s: from the request to the first text, context fitting included, loading and queueing excluded.
        tpot_s: mean time per token after the first one.
        tokens_per_s: tokens after the first one, over the time they took; the inverse of `tpot_s`.
        duration_s: from the request to the end of the answer.
        queued_s: time spent waiting for the engine before that.
        prompt_tokens: tokens of the prompt, cached ones included.
        is_estimated: `prompt_tokens` is an estimate, since the server does not say.
        cached_tokens: tokens of the prompt that were not computed again.
        completion_tokens: tokens generated, the end-of-sequence token included.
        peak_bytes: highest memory seen while generating; `peak_source` says of what.
        peak_source: `cuda` (the allocator's peak) or `rss` (the process's resident memory).
        weight_bytes, kv_bytes: the engine's own, after the answer.
        free_bytes: free memory of the device after the answer.
        placement: share of the weights' bytes by device, `{"cuda:0": 0.62, "cpu": 0.38}`; empty where it is not known.
        spilled_bytes: what the driver has put into main memory by itself, at least (Windows, WSL).
        seed: what the answer was sampled with; the same seed gives the same answer.
        steps: generations that the turn took: one, and one more after each round of tool calls.
        finish_reason: `stop`, `length`, `tool_calls`, `cancelled` (stopped), `interrupted` or `error`.
    """

    model: str
    turn: int = 0
    ttft_s: float | None = None
    tpot_s: float | None = None
    tokens_per_s: float | None = None
    duration_s: float = 0.0
    queued_s: float = 0.0
    prompt_tokens: int | None = None
    is_estimated: bool = False
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    peak_bytes: int | None = None
    peak_source: str = "rss"
    weight_bytes: int | None = None
    kv_bytes: int | None = None
    free_bytes: int | None = None
    placement: dict[str, float] = field(default_factory=dict)
    spilled_bytes: int = 0
    context_tokens: int | None = None
    max_context_size: int | None = None
    finish_reason: str = ""
    seed: int | None = None
    steps: int = 1
    conversation: str = ""
    started_at: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, with the attributes' names as keys."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> GenerationMetrics:
        """The metrics that `to_dict` described; unknown keys of newer versions are dropped."""
        return cls(**{key: record[key] for key in cls.__dataclass_fields__ if key in record})


def combined(steps: Sequence[GenerationMetrics]) -> GenerationMetrics:
    """Several generations of one turn as one record: times and tokens summed, the prompt that of the last.

    The time to the first text is that of the first generation; the time per token is the mean over all.
    """
    if len(steps) == 1:
        return steps[0]
    last = steps[-1]
    timed = [(each.tpot_s, each.completion_tokens - 1) for each in steps if each.tpot_s and each.completion_tokens]
    tokens = sum(count for _, count in timed)
    tpot_s = sum(seconds * count for seconds, count in timed) / tokens if tokens else None
    generated = [each.completion_tokens for each in steps if each.completion_tokens is not None]
    peaks = [each.peak_bytes for each in steps if each.peak_bytes is not None]
    return replace(
        last,
        ttft_s=steps[0].ttft_s,
        tpot_s=tpot_s,
        tokens_per_s=1 / tpot_s if tpot_s else None,
        duration_s=sum(each.duration_s for each in steps),
        queued_s=sum(each.queued_s for each in steps),
        completion_tokens=sum(generated) if generated else None,
        peak_bytes=max(peaks, default=None),
        started_at=steps[0].started_at,
        steps=len(steps),
    )


Listener = Callable[[GenerationMetrics], None]


class Recorder(Sequence[GenerationMetrics]):
    """The latest generations, oldest first. Appended to on the loop thread; reading is safe from any thread."""

    def __init__(self, maxlen: int = 1000) -> None:
        self._records: deque[GenerationMetrics] = deque(maxlen=maxlen)
        self._listeners: list[Listener] = []

    @overload
    def __getitem__(self, index: int) -> GenerationMetrics: ...
    @overload
    def __getitem__(self, index: slice) -> list[GenerationMetrics]: ...
    def __getitem__(self, index: int | slice) -> GenerationMetrics | list[GenerationMetrics]:
        """As a list."""
        return list(self._records)[index]

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._records)

    def __iter__(self) -> Iterator[GenerationMetrics]:
        """Over a copy, so that recording meanwhile does no harm."""
        return iter(list(self._records))

    def add(self, metrics: GenerationMetrics) -> None:
        """Keep `metrics` and tell every listener."""
        self._records.append(metrics)
        for listener in list(self._listeners):
            listener(metrics)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` for each new record, on the thread that adds it; the result undoes it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener) if listener in self._listeners else None

    def clear(self) -> None:
        """Forget all records; the listeners stay."""
        self._records.clear()

    def __repr__(self) -> str:
        """How many there are."""
        return f"<Recorder of {len(self)} generations>"
