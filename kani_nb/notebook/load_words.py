"""What a load and an unload did, in words: for the magics and the panel alike."""

from __future__ import annotations

import weakref
from typing import Any

from kani_nb._amounts import in_words
from kani_nb._runtime import LoadedEngine, Runtime, UnloadReport
from kani_nb.engines.base import BaseEngine, details_of
from kani_nb.notebook.holders import Watched
from kani_nb.notebook.stat_line import places_in_words


def outcome(loaded: LoadedEngine | None) -> dict[str, Any]:
    """What the last frame says of a load that succeeded: arguments of `LoadView.finish`."""
    if loaded is None:
        return {}
    details = details_of(loaded.engine)
    memory = loaded.engine.memory()
    precision, scheme = str(details.get("dtype", "")), str(details.get("quantization", "none"))
    precision = precision if scheme == "none" else f"{scheme}, the rest in {precision}"
    note, notes = "", str(details.get("notes", ""))
    if loaded.reused:
        note = f"loaded already as {loaded.name}; nothing was done"
    elif loaded.replaced not in (None, loaded.name):
        note = f"loaded in the place of {loaded.replaced}"
    return {
        "origin": str(details.get("origin", "")),
        "dtype": precision,
        "held": places_in_words(memory) if memory is not None else "",
        "note": note,
        "model": loaded.name if loaded.why else "",
        "remarks": " ".join(each for each in (loaded.why, "" if loaded.reused else notes) if each),
    }


def answering(rt: Runtime) -> str:
    """Who answers now."""
    return f"{rt.engine_name} still answers" if rt.engine is not None else "no engine is loaded"


def unloaded(report: UnloadReport) -> str:
    """What an unload gave back, in a sentence."""
    freed = report.before_bytes - report.after_bytes
    change = f"{in_words(report.before_bytes)} -> {in_words(report.after_bytes)} in use"
    held = f"; its weights were {in_words(report.weight_bytes)}" if report.weight_bytes else ""
    return f"{report.name} is unloaded: {change} ({in_words(max(0, freed))} freed{held})"


class Farewell:
    """What is left of an engine that is about to be freed. Made before; the engine is not kept alive.

    Args:
        rt: whose engine it is.
        engine: the one to be freed.
    """

    def __init__(self, rt: Runtime, engine: BaseEngine) -> None:
        self._rt, self._engine = rt, weakref.ref(engine)
        self._watched = Watched([engine])

    def left(self, shell: Any) -> str:
        """Once it is freed: what still takes its memory, and what ends that. Empty where nothing does."""
        answering = (chat.answering_engine for chat in self._rt.chats.values())
        if any(engine is not None and engine is self._engine() for engine in answering):
            return "An answer is still running on it: its memory is freed when that ends (%chat stop ends it)."
        return self._watched.still_held(shell, self._rt.engines.values())
