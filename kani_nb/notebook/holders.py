"""Who keeps a freed model alive: names in the notebook, cached outputs, threads, the last error's frames.

What IPython and Python keep by themselves for debuggers is let go of; what the person keeps is only named, since it is
theirs to delete. Names are looked for from the notebook's variables on, through whatever they hold: a peft wrapper, a
trainer, a list, a function's closure, a generator, the frames of a saved exception.
"""

from __future__ import annotations

import gc
import re
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kani_nb._amounts import in_words
from kani_nb.hardware.remains import Remains

_LAST = ("last_type", "last_value", "last_traceback", "last_exc")
_IN_TRACEBACK = ("etype", "evalue", "tb")
#: Libraries whose objects lead everywhere, and hold a model only through what is looked at anyway.
_MACHINERY = {"IPython", "ipykernel", "traitlets", "zmq", "tornado", "jupyter_client"}
_MOST_NAMED = 8
#: Objects that are looked through for each name. A tuned model of a hundred layers has about 20,000.
_MOST_OBJECTS = 100_000
#: `_`, `__`, `_3`: what IPython calls an output, which `Out` has too.
_OUTPUT_NAMES = re.compile(r"_+(\d*)|_oh|Out")


@dataclass(frozen=True, slots=True)
class Holder:
    """What still holds a model.

    Attributes:
        words: for the person, as a part of a sentence.
        release: the code that lets go of it, where that is known.
    """

    words: str
    release: str = ""


class Watched:
    """Engines that are loaded now, to see what is left of those that are freed from here on.

    Args:
        engines: some or all of them; they are not kept alive.
    """

    def __init__(self, engines: Iterable[object]) -> None:
        self._engines = [(weakref.ref(each), Remains(getattr(each, "model", None))) for each in engines]

    def still_held(self, shell: Any, loaded: Iterable[object]) -> str:
        """What of those that are not among `loaded` any more is held, by whom, in sentences; empty where nothing is."""
        kept = {id(each) for each in loaded}
        freed = [remains for engine, remains in self._engines if engine() is None or id(engine()) not in kept]
        return "\n".join(filter(None, (_sentence(shell, remains) for remains in freed)))


def _sentence(shell: Any, remains: Remains) -> str:
    holders = holders_of(shell, remains)
    if not holders:
        return ""
    names = [each.words for each in holders]
    held = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    release = "; ".join(dict.fromkeys(each.release for each in holders if each.release))
    held_bytes = remains.held_bytes
    taken = f"{in_words(held_bytes)} stay taken" if held_bytes else "its memory stays taken"
    return f"It is still held by {held}: {taken} until they let go{f' ({release})' if release else ''}."


def forget_tracebacks(shell: Any) -> None:
    """Drop the last error and value that Python and IPython keep by themselves: an error's frames hold their locals."""
    kept = getattr(shell, "InteractiveTB", None)
    held = [(sys, name) for name in _LAST] + [(kept, name) for name in _IN_TRACEBACK]
    held = [(owner, name) for owner, name in held if getattr(owner, name, None) is not None]
    for owner, name in held:
        setattr(owner, name, None)
    if getattr(shell, "last_execution_result", None) is not None:
        shell.last_execution_result = None
    if held:
        gc.collect()  # an error and its frames refer to each other


def holders_of(shell: Any, remains: Remains) -> list[Holder]:
    """Who still holds the watched memory; empty when it is gone."""
    if remains.is_gone:
        return []
    search = _Search(shell, remains)
    found = [*search.variables(), *search.outputs(), *search.threads()]
    return (found or search.others() or [Holder("something that no name in this notebook leads to")])[:_MOST_NAMED]


class _Search:
    """One search through what a notebook holds."""

    def __init__(self, shell: Any, remains: Remains) -> None:
        self._variables: dict[str, Any] = getattr(shell, "user_ns", {})
        self._remains = remains
        # Everything is reached through these.
        everywhere = (shell, self._variables, self._variables.get("Out"), sys.modules, self, remains)
        self._left_out = {id(each) for each in everywhere}

    def variables(self) -> Iterator[Holder]:
        outputs = self._variables.get("Out")
        for name, value in list(self._variables.items()):
            match = _OUTPUT_NAMES.fullmatch(name)
            is_output = match is not None and (not match[1] or int(match[1]) in (outputs or {}))
            if not is_output and self._reaches(value):
                yield Holder(f"the variable {name}{_kind(value)}", f"del {name}")

    def outputs(self) -> Iterator[Holder]:
        found = False
        outputs = self._variables.get("Out")
        for number, value in list(outputs.items() if isinstance(outputs, dict) else ()):
            if self._reaches(value):
                found = True
                yield Holder(f"Out[{number}]", "%reset -f out")
        if not found and any(self._reaches(self._variables.get(name)) for name in ("_", "__", "___")):
            yield Holder("the last output (_)", "%reset -f out")

    def threads(self) -> Iterator[Holder]:
        """Running threads of the person's, in whose frames it is."""
        frames = sys._current_frames()
        for thread in threading.enumerate():
            if thread is threading.current_thread() or thread.name.startswith("kani-nb"):
                continue
            frame = frames.get(thread.ident or 0)
            while frame is not None:
                if frame.f_locals is not self._variables and any(map(self._reaches, [*frame.f_locals.values()])):
                    yield Holder(f"the running thread {thread.name!r} (in {frame.f_code.co_name})")
                    break
                frame = frame.f_back

    def others(self) -> list[Holder]:
        """What refers to the model directly, by its type or the module it stands in, when no name leads to it."""
        target = self._remains.object
        if target is None:
            return []
        found = []
        for each in gc.get_referrers(target):
            if isinstance(each, dict) and (module := sys.modules.get(str(each.get("__name__")))) is not None:
                names = [key for key, value in each.items() if value is target]
                found += [Holder(f"{module.__name__}.{name}") for name in names if vars(module) is each]
            elif not isinstance(each, types.FrameType | types.CellType | dict):
                found.append(Holder(f"an object of type {type(each).__name__}"))
        return list(dict.fromkeys(found))

    def _reaches(self, root: Any) -> bool:
        """Whether the memory is held by `root`, or by what it holds."""
        pending, seen = deque([root]), set(self._left_out)
        while pending and len(seen) < _MOST_OBJECTS:
            value = pending.popleft()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if self._remains.is_part(value):
                return True
            pending.extend(_held_by(value))
        return False


def _held_by(value: Any) -> list[Any]:
    """The objects that `value` itself keeps alive; not the whole namespace that a function was defined in."""
    if isinstance(value, types.FunctionType):
        return [value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__]
    if isinstance(value, types.ModuleType | types.CodeType) or type(value).__module__.partition(".")[0] in _MACHINERY:
        return []
    if isinstance(value, type):
        return [vars(value)] if value.__module__ == "__main__" else []
    if type(value).__module__ == "numpy":
        return [getattr(value, "base", None)]  # an array that looks at a tensor's memory
    return gc.get_referents(value) if gc.is_tracked(value) else []


def _kind(value: Any) -> str:
    """What it is, where its name may not say so."""
    kind = type(value).__name__
    return "" if isinstance(value, types.FunctionType) else f" ({kind})"
