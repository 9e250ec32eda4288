"""What a load and an unload did, in words: for the magics and the panel alike."""

from __future__ import annotations

from typing import Any

from kani_nb._amounts import in_words
from kani_nb._runtime import LoadedEngine, Runtime, UnloadReport
from kani_nb.engines.base import details_of
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
