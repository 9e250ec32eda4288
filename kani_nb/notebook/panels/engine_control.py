"""What the engine panel does: reads its controls, plans, loads, cancels and unloads. Knows nothing of widgets.

Each change is answered at once with the line and the mistakes; the plan follows from a thread, the latest one only.
Any thread may call; what is shown goes out through one function, in order.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from kani_nb._runtime import Runtime
from kani_nb._secrets import without_secrets
from kani_nb.config import EngineConfig
from kani_nb.engines.base import LoadProgress
from kani_nb.engines.registry import parse_spec
from kani_nb.errors import KaniNbError
from kani_nb.hardware.placement import parse_max_memory
from kani_nb.hardware.schemes import find_scheme
from kani_nb.notebook.holders import Watched, forget_tracebacks
from kani_nb.notebook.load_words import Farewell, answering, outcome, unloaded
from kani_nb.notebook.panels.engine_form import (
    FormReading,
    Value,
    Values,
    fields_for,
    read_form,
    refusal_of,
    values_of,
    without_foreign_knobs,
)
from kani_nb.notebook.panels.engine_view import Busy, engines_view, model_words
from kani_nb.notebook.panels.plan_follower import PlanFollower
from kani_nb.notebook.secrets import error_words
from kani_nb.notebook.stat_line import seconds

_PROGRESS_EVERY_S = 0.2


class EngineControl:
    """The engine panel without its face.

    Args:
        rt: whose engines they are.
        show: takes the whole view, a JSON-safe record, whenever it changed.
        config: what the controls say at first.
        shell: the notebook's own; its variables may hold what is freed. None outside a notebook.
    """

    def __init__(
        self, rt: Runtime, show: Callable[[dict[str, Any]], None], config: EngineConfig, shell: Any = None
    ) -> None:
        self._rt = rt
        self._shell = shell
        self._show = show
        self._lock = threading.RLock()
        self._values: Values = values_of(config)
        self._form = FormReading(config, {})
        self._plan = PlanFollower(rt.given_back, self._publish)
        self._refused: dict[str, str] = {}
        self._busy: Busy | None = None
        self._running: Future[None] | None = None
        self._said: dict[str, str] = {}
        self._is_closed = False
        self._unwatch = rt.watch(self.refresh)
        self.set_values(self._values)

    # -- what the controls say -------------------------------------------------------------------------------------

    @property
    def values(self) -> Values:
        """The controls, as they were set."""
        return dict(self._values)

    @property
    def form(self) -> FormReading:
        """What they say."""
        return self._form

    def set_values(self, values: Mapping[str, Value]) -> None:
        """Take the controls as they are now. Shows the line and the mistakes at once, and the plan when it is made."""
        with self._lock:
            kept = without_foreign_knobs(self._values, values)
            if kept != self._values:
                self._refused = {}
                if self._said.get("kind") == "error":
                    self._said = {}
            for name, value in kept.items():
                if value and (why := refusal_of(value)):
                    # Not kept: it would be saved with the notebook.
                    self._refused[name], kept[name] = why, None
            self._values = kept
            self._form = read_form(self._values)
            self._plan.follow(self._form.config)
        self._publish()

    def refresh(self) -> None:
        """Plan again, for what is free now."""
        with self._lock:
            self.set_values(self._values)

    def check_again(self) -> None:
        """The same, and look again for a model that was not to be had."""
        self._plan.forget_failures()
        self.refresh()

    def wait(self, timeout_s: float = 30.0) -> bool:
        """Block until the plan is that of the controls; whether that came in time."""
        return self._plan.wait(timeout_s)

    # -- what the buttons do ---------------------------------------------------------------------------------------

    def load(self) -> bool:
        """Load what the controls say; whether that was begun."""
        with self._lock:
            config = self._form.config
            if config is None or self._busy is not None:
                return False
            self._busy, self._said = Busy(f"Loading {config.model}"), {}
            self._running = self._rt.loop.submit(self._load(config))
        self._publish()
        return True

    def unload(self, name: str) -> bool:
        """Free the engine of that name; whether that was begun."""
        with self._lock:
            if self._busy is not None:
                return False
            self._busy, self._said = Busy(f"Unloading {name}", can_cancel=False), {}
            self._running = self._rt.loop.submit(self._unload(name))
        self._publish()
        return True

    def cancel(self) -> bool:
        """Give up the load that runs; whether there was one."""
        with self._lock:
            if self._busy is None or not self._busy.can_cancel or self._running is None:
                return False
            self._busy, running = replace(self._busy, title="Cancelling", can_cancel=False), self._running
        self._publish()
        return running.cancel()

    def close(self) -> None:
        """Let go of the runtime. A load goes on; nothing is shown any more. Safe to call twice."""
        self._is_closed = True
        self._unwatch()
        self._plan.close()

    async def _load(self, config: EngineConfig) -> None:
        started_at, ticking = time.monotonic(), asyncio.ensure_future(self._tick())
        freed = self._rt.replaceable
        before = self._rt.config_of(freed)
        try:
            forget_tracebacks(self._shell)  # what the frames of a failed cell hold, the load may need
            watched = Watched(self._rt.engines.values())
            loaded = await self._rt.load(config, progress=self._progress)
            with self._lock:
                self._busy = replace(self._busy, can_cancel=False) if self._busy is not None else None
            words = outcome(loaded)
            took = words["note"] or f"loaded in {seconds(time.monotonic() - started_at)}"
            line = " · ".join(
                each for each in (loaded.name, words["origin"], words["dtype"], words["held"], took) if each
            )
            self._end(line, remarks="\n".join(filter(None, (words["remarks"], await self._held(watched)))))
        except asyncio.CancelledError:
            is_freed = freed not in self._rt.engines and before is not None
            back = f". {freed} was freed for it: {before.to_line()} brings it back" if is_freed and before else ""
            said = f"Cancelled: {config.model} was not loaded; what was downloaded is kept; {answering(self._rt)}{back}"
            self._end(without_secrets(said))
        except KaniNbError as error:
            self._end(str(error), is_error=True)
        except Exception as error:  # noqa: BLE001 - shown where the person looks; there is no cell for a traceback
            self._end(error_words(error), is_error=True)
        finally:
            ticking.cancel()

    async def _unload(self, name: str) -> None:
        try:
            farewell = Farewell(self._rt, self._rt.need_engine(name))
            forget_tracebacks(self._shell)
            report = await self._rt.unload(name)
            self._end(unloaded(report), remarks=await asyncio.to_thread(farewell.left, self._shell))
        except asyncio.CancelledError:
            self._end(f"Unloading {name} was cut off; {answering(self._rt)}", is_error=True)
        except KaniNbError as error:
            self._end(str(error), is_error=True)
        except Exception as error:  # noqa: BLE001 - as for a load
            self._end(error_words(error), is_error=True)

    async def _held(self, watched: Watched) -> str:
        """What of the engines that were freed for a load is held, and by whom."""
        return await asyncio.to_thread(watched.still_held, self._shell, self._rt.engines.values())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_PROGRESS_EVERY_S)
            self._publish()

    def _progress(self, event: LoadProgress) -> None:
        with self._lock:
            if self._busy is not None:
                self._busy = replace(self._busy, stages=self._busy.with_progress(event))

    def _end(self, text: str, *, remarks: str = "", is_error: bool = False) -> None:
        with self._lock:
            self._busy, self._running = None, None
            self._said = {"text": text, "remarks": remarks, "kind": "error" if is_error else "done"}
        self.refresh()

    # -- what is shown ---------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        with self._lock:
            if not self._is_closed:
                self._show(self._view())

    def _view(self) -> dict[str, Any]:
        config = self._form.config
        model = str(self._values.get("model") or "")
        reading = self._plan.reading
        return {
            "line": without_secrets(config.to_line()) if config is not None else "",
            "errors": {**self._form.errors, **self._plan.errors, **self._refused},
            "shown": sorted(self._shown_fields(model)),
            "model": {**model_words(reading), "is_reading": self._plan.is_reading},
            "plan": self._plan.view(),
            "blocks": list(reading.shape.blocks) if reading is not None and reading.shape is not None else [],
            "limits": self._limits(),
            "busy": self._busy.to_dict() if self._busy is not None else None,
            "said": dict(self._said),
            "frees": self._frees(config),
            "engines": engines_view(self._rt.engines, self._rt.engine_name),
        }

    def _frees(self, config: EngineConfig | None) -> str:
        """What Load would take away first."""
        name = self._rt.replaceable
        known = [self._rt.config_of(each) for each in self._rt.engines]
        return f"Load frees {name} first." if name and config is not None and config not in known else ""

    def _shown_fields(self, model: str) -> set[str]:
        try:
            engine = parse_spec(model).engine if model.strip() else "hf"
            knobs = find_scheme(str(self._values.get("scheme") or "none")).knobs
        except KaniNbError:
            engine, knobs = "hf", frozenset()
        # What is set, or wrong, can be seen and changed.
        given = {name for name, value in self._values.items() if value not in (None, "", False, [])}
        return fields_for(engine, knobs) | given | set(self._form.errors)

    def _limits(self) -> dict[str, int]:
        given = self._values.get("max_memory")
        try:
            return parse_max_memory(given if isinstance(given, str) and given.strip() else None)
        except KaniNbError:
            return {}
