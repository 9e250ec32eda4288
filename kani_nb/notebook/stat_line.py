"""The one line under an answer that says what it took, and the way sizes and counts are written for people.

Pure functions of `GenerationMetrics`; nothing is measured or shown here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kani_nb._amounts import in_words
from kani_nb.hardware.spill import SEEN_SLOWDOWN

if TYPE_CHECKING:
    from kani_nb.engines.base import EngineMemory
    from kani_nb.metrics.recorder import GenerationMetrics

#: Share of the context window from which the line says how full it is.
_NEARLY_FULL = 0.75
#: Waiting for the engine that is worth a word.
_NOTICEABLE_S = 0.2

_SOURCES = {"rss": "process RSS", "cuda": "CUDA allocator"}
_ENDINGS = {
    "stop": "stop",
    "length": "stopped at the token limit",
    "tool_calls": "called tools",
    "cancelled": "stopped",
    "interrupted": "interrupted",
    "error": "failed",
}


def stat_line(metrics: GenerationMetrics) -> str:
    """One line: tokens, speed, first text, cached tokens, context, memory, where it ran, and how the answer ended.

    What is not known is left out.
    """
    parts = [
        _counted(metrics.completion_tokens, "token") + (f" in {metrics.steps} steps" if metrics.steps > 1 else ""),
        "" if metrics.tokens_per_s is None else f"{metrics.tokens_per_s:,.1f} tok/s",
        "" if metrics.ttft_s is None else f"first after {seconds(metrics.ttft_s)}",
        f"waited {seconds(metrics.queued_s)} for the engine" if metrics.queued_s >= _NOTICEABLE_S else "",
        _prompt(metrics),
        "" if metrics.is_estimated else context_use(metrics.context_tokens, metrics.max_context_size),
        peak_memory(metrics),
        placement(metrics),
        spilled(metrics),
        _ENDINGS.get(metrics.finish_reason, metrics.finish_reason),
    ]
    return " · ".join(part for part in parts if part)


def context_use(used_tokens: int | None, window_tokens: int | None) -> str:
    """How much of the context is used; from three quarters on, in per cent too."""
    if used_tokens is None or not window_tokens:
        return ""
    share = used_tokens / window_tokens
    warning = f" ({share:.0%} full)" if share >= _NEARLY_FULL else ""
    return f"context {used_tokens:,}/{window_tokens:,}{warning}"


def seconds(duration_s: float) -> str:
    """A duration with the digits that matter."""
    if duration_s < 10:
        return f"{duration_s:.2f} s"
    return f"{duration_s:.0f} s" if duration_s < 100 else f"{duration_s // 60:.0f} min {duration_s % 60:.0f} s"


def _counted(count: int | None, noun: str) -> str:
    return "" if count is None else f"{count:,} {noun}{'' if count == 1 else 's'}"


def _prompt(metrics: GenerationMetrics) -> str:
    if metrics.prompt_tokens is None:
        return ""
    if metrics.cached_tokens is None:
        return ("about " if metrics.is_estimated else "") + _counted(metrics.prompt_tokens, "prompt token")
    return f"{metrics.cached_tokens:,} of {_counted(metrics.prompt_tokens, 'prompt token')} cached"


def peak_memory(metrics: GenerationMetrics) -> str:
    """The most memory that an answer took, and by whose account."""
    if metrics.peak_bytes is None:
        return ""
    return f"peak {in_words(metrics.peak_bytes)} ({_SOURCES.get(metrics.peak_source, metrics.peak_source)})"


#: Less than this is a constant or two that stays in memory when all else is put on the disk.
_SMALL_BYTES = 2**16


def places_in_words(memory: EngineMemory) -> str:
    """What the weights take, and where: `257 MiB on cpu`, `195 MiB on cpu + 62 MiB on disk`."""
    held = {device: count for device, count in memory.shares.items() if count >= _SMALL_BYTES} or {
        memory.device: memory.weight_bytes
    }
    return " + ".join(f"{in_words(count)} on {device}" for device, count in held.items())


def placement(metrics: GenerationMetrics) -> str:
    """Which share of the weights was where: only when a part was not where the rest was, or was on the disk."""
    held = {device: share for device, share in metrics.placement.items() if share > 0}
    if len(held) < 2 and "disk" not in held:
        return ""
    ordered = sorted(held.items(), key=lambda each: -each[1])
    return ", ".join(f"{_percent(share)} on {device}" for device, share in ordered)


def _percent(share: float) -> str:
    """A share that is neither nothing nor everything never reads as one."""
    if share < 0.005:
        return "under 1 %"
    return "over 99 %" if 0.995 <= share < 1 else f"{share * 100:.0f} %"


def spilled(metrics: GenerationMetrics) -> str:
    """What the driver has moved into main memory by itself, and what that usually costs."""
    if not metrics.spilled_bytes:
        return ""
    return (
        f"{in_words(metrics.spilled_bytes)} spilled into shared memory: {SEEN_SLOWDOWN} times slower was seen"
        " (%kani doctor says how to forbid it)"
    )
