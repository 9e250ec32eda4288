"""What the engine panel shows, as one JSON-safe record made from what is known. Pure: no widget, no thread.

Bytes stay bytes; sentences are made here, so that every front end says the same.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kani_nb._amounts import in_words
from kani_nb.engines.base import BaseEngine, LoadProgress
from kani_nb.hardware.plans import Budget, PlanRow, Share
from kani_nb.load_preview import LoadPreview, ModelReading
from kani_nb.notebook.stat_line import places_in_words, seconds


@dataclass(frozen=True, slots=True)
class Busy:
    """A load or an unload that runs.

    Attributes:
        title: what is done, in a few words.
        stages: those of a load so far, each as it was last heard of.
        can_cancel: it can be given up.
    """

    title: str
    stages: tuple[LoadProgress, ...] = ()
    started_at: float = field(default_factory=time.monotonic)
    can_cancel: bool = True

    def with_progress(self, event: LoadProgress) -> tuple[LoadProgress, ...]:
        """The stages with one more event; one of the running stage replaces that before it."""
        if self.stages and self.stages[-1].stage == event.stage:
            return (*self.stages[:-1], event)
        return (*self.stages, event)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        last = self.stages[-1] if self.stages else None
        return {
            "title": self.title,
            "done": [each.stage for each in self.stages[:-1]],
            "stage": "" if last is None else f"{last.stage} {last.detail}".strip(),
            "fraction": None if last is None or last.fraction is None else min(1.0, max(0.0, last.fraction)),
            "elapsed": seconds(time.monotonic() - self.started_at),
            "can_cancel": self.can_cancel,
        }


def model_words(reading: ModelReading | None) -> dict[str, Any]:
    """What is known of the model."""
    if reading is None:
        return {"title": "", "window": None, "note": ""}
    return {"title": reading.title, "window": reading.window_tokens, "note": reading.note}


def plan_view(
    preview: LoadPreview, *, context_tokens: int | None = None, window_tokens: int | None = None
) -> dict[str, Any]:
    """The plan as a bar for each device, and its verdict in a sentence.

    Args:
        preview: what a load would take.
        context_tokens: the context that was asked for; None where none was.
        window_tokens: the longest that the model has.
    """
    row = preview.row
    shares = {share.device: share for share in (row.shares if row is not None else ())}
    is_refused = preview.error is not None
    devices = [_bar(budget, shares.get(budget.name)) for budget in _shown(preview.budgets, shares)]
    if row is not None and not shares:  # it fits nowhere: drawn where it would have gone first
        devices = [_overfull(devices[0], row), *devices[1:]] if devices else []
    return {
        "devices": devices,
        "fits": None if row is None else not is_refused,
        "verdict": _verdict(preview),
        "fix": preview.error.fix if preview.error is not None else "",
        "notes": list(dict.fromkeys((*preview.notes, *_counted(row, context_tokens, window_tokens)))),
        "speed": _speed(row),
        "map": dict(row.device_map) if row is not None else {},
    }


def _counted(row: PlanRow | None, context_tokens: int | None, window_tokens: int | None) -> list[str]:
    if row is None or context_tokens is not None or not window_tokens or window_tokens <= row.context_tokens:
        return []
    asked = "since no context length is set; the engine takes up to"
    return [
        f"The KV cache is counted for {row.context_tokens:,} tokens, {asked} {window_tokens:,}, and then needs more."
    ]


def _shown(budgets: Sequence[Budget], shares: Mapping[str, Share]) -> list[Budget]:
    known = {budget.name for budget in budgets}
    more = [
        Budget(name=name, description="", total_bytes=share.peak_bytes, usable_bytes=share.peak_bytes)
        for name, share in shares.items()
        if name not in known
    ]
    return [*budgets, *more]


def _bar(budget: Budget, share: Share | None) -> dict[str, Any]:
    parts = {"weights": 0, "kv": 0, "working": 0}
    if share is not None:
        parts = {"weights": share.weight_bytes, "kv": share.kv_bytes, "working": share.working_bytes}
    return {
        "name": budget.name,
        "description": budget.description if budget.description != budget.name else "",
        "total": budget.total_bytes,
        "usable": budget.usable_bytes,
        **parts,
        "is_over": sum(parts.values()) > budget.usable_bytes,
        "words": _bar_words(budget, parts),
    }


def _bar_words(budget: Budget, parts: Mapping[str, int]) -> str:
    if budget.name == "disk":
        return f"{in_words(parts['weights'])} weights"
    taken = sum(parts.values())
    free = budget.usable_bytes - taken
    end = f"{in_words(free)} free" if free >= 0 else f"{in_words(-free)} too much"
    if not taken:
        return f"{in_words(budget.usable_bytes)} of {in_words(budget.total_bytes)} free"
    held = (
        f"{in_words(parts['weights'])} weights, {in_words(parts['kv'])} KV cache, {in_words(parts['working'])} working"
    )
    return f"{held}, {end}"


def _overfull(bar: dict[str, Any], row: PlanRow) -> dict[str, Any]:
    parts = {"weights": row.weight_bytes, "kv": row.kv_bytes, "working": row.working_bytes}
    over = max(0, row.peak_bytes - bar["usable"])
    words = f"{in_words(row.peak_bytes)} needed, {in_words(over)} too much"
    return {**bar, **parts, "is_over": True, "words": words}


def _verdict(preview: LoadPreview) -> str:
    row, error = preview.row, preview.error
    if error is not None:
        return f"{error.what}: {error.why}" if error.why else error.what
    if row is None:
        return "What it takes is known when it is loaded."
    where = " and ".join(share.device for share in row.shares if share.peak_bytes)
    if row.fits:
        tight = "" if row.has_headroom else ", with little to spare"
        size = f"{in_words(row.peak_bytes)} in {preview.precision or row.label} on {where}"
        return f"Fits{tight}: {size}, with a context of {row.context_tokens:,} tokens."
    aside = sum(share.weight_bytes for share in row.shares if share.device in ("cpu", "disk"))
    return f"Fits with {in_words(aside)} of the weights in slower memory, as was asked for ({where})."


def _speed(row: PlanRow | None) -> str:
    if row is None or row.ceiling_tokens_per_s is None:
        return ""
    return f"at most {row.ceiling_tokens_per_s:,.0f} tokens a second, by the memory's bandwidth"


def engines_view(engines: Mapping[str, BaseEngine], current: str) -> list[dict[str, Any]]:
    """The engines that are loaded: name, what they hold, and which answers."""
    found = []
    for name, engine in engines.items():
        memory = engine.memory()
        found.append(
            {
                "name": name,
                "holds": places_in_words(memory) if memory is not None else "",
                "is_current": name == current,
            }
        )
    return found
