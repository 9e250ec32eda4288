"""Who keeps a freed model alive: names in the notebook, cached outputs, the last error's frames."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

_LAST = ("last_type", "last_value", "last_traceback", "last_exc")
_IN_TRACEBACK = ("etype", "evalue", "tb")
_MOST = 8


def watch(engine: object) -> weakref.ref[Any] | None:
    """A weak reference to what takes an engine's memory (its `model`, or the engine itself), where there can be one."""
    try:
        return weakref.ref(getattr(engine, "model", None) or engine)
    except TypeError:
        return None


def forget_tracebacks(shell: Any) -> None:
    """Drop the last error that Python and IPython keep for debuggers: its frames hold what was in them."""
    for name in _LAST:
        if hasattr(sys, name):
            setattr(sys, name, None)
    kept = getattr(shell, "InteractiveTB", None)
    for name in _IN_TRACEBACK:
        if getattr(kept, name, None) is not None:
            setattr(kept, name, None)
    gc.collect()


def holders_of(shell: Any, watched: weakref.ref[Any] | None) -> list[str]:
    """Names by which the watched object can still be reached, as Python expressions; empty when it is gone."""
    target = watched() if watched is not None else None
    if target is None:
        return []
    found = [
        name for name, value in list(shell.user_ns.items()) if _holds(value, target) and name not in ("Out", "_oh")
    ]
    outputs = shell.user_ns.get("Out")
    if isinstance(outputs, dict):
        found += [f"Out[{number}]" for number, value in list(outputs.items()) if _holds(value, target)]
    if not found:
        kinds = sorted({type(each).__name__ for each in gc.get_referrers(target)} - {"frame", "cell"})
        found = [f"an object of type {kind}" for kind in kinds]
    return found[:_MOST]


def _holds(value: Any, target: Any) -> bool:
    if value is target or getattr(value, "__self__", None) is target:
        return True
    if isinstance(value, list | tuple | set | frozenset):
        return any(each is target for each in list(value)[:1000])
    return isinstance(value, dict) and any(each is target for each in list(value.values())[:1000])
