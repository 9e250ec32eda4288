"""The memory plan that follows the engine panel's controls: the model is read once, and planned anew for each change.

Reading and planning are done in threads, and of both only what was asked for last.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from kani_nb.config import EngineConfig
from kani_nb.errors import ConfigError, DoesNotFitError, KaniNbError, ModelFilesError
from kani_nb.load_preview import LoadPreview, ModelReading, read_model
from kani_nb.notebook.panels.engine_form import field_of
from kani_nb.notebook.panels.engine_view import plan_view
from kani_nb.notebook.panels.latest import Latest
from kani_nb.notebook.secrets import error_words

_Key = tuple[str, str | None, bool]


class PlanFollower:
    """Any thread may call.

    Args:
        given_back: bytes by device that the load would free first.
        changed: called when there is more to show, on the thread that found it.

    Attributes:
        is_reading: a model is being read.
        errors: what is wrong with the model or its plan, by control.
    """

    def __init__(self, given_back: Callable[[], Mapping[str, int]], changed: Callable[[], None]) -> None:
        self._given_back, self._changed = given_back, changed
        self._lock = threading.RLock()
        self._config: EngineConfig | None = None
        self._readings: dict[_Key, ModelReading | KaniNbError] = {}
        self._preview: LoadPreview | None = None
        self._reader, self._planner = Latest("kani-nb-panel-read"), Latest("kani-nb-panel-plan")
        self._cancelled = threading.Event()
        self._read_key: _Key | None = None
        self.is_reading = False
        self.errors: dict[str, str] = {}

    @property
    def reading(self) -> ModelReading | None:
        """What is known of the model."""
        found = self._readings.get(_key(self._config)) if self._config is not None else None
        return found if isinstance(found, ModelReading) else None

    def view(self) -> dict[str, Any] | None:
        """The plan as it is shown; None where there is none yet. It is that of the configuration before until then."""
        config, preview, reading = self._config, self._preview, self.reading
        if preview is None:
            return None
        return plan_view(
            preview,
            context_tokens=config.max_context_size if config is not None else None,
            window_tokens=reading.window_tokens if reading is not None else None,
        )

    def follow(self, config: EngineConfig | None) -> None:
        """Plan this configuration; None is one that cannot be read."""
        with self._lock:
            self._config = config
            self.errors = {}
            if config is None:
                return
            known = self._readings.get(_key(config))
            if known is None:
                self._begin_to_read(config)
                return
            self._end_reading()
            if isinstance(known, KaniNbError):
                self._preview = None
                self.errors = {field_of(known, ("revision", "trust_remote_code")) or "model": str(known)}
            else:
                self._planner.submit(lambda: self._plan(config, known))

    def forget_failures(self) -> None:
        """What was not to be had may be there the next time it is asked for."""
        with self._lock:
            self._readings = {key: each for key, each in self._readings.items() if isinstance(each, ModelReading)}

    def wait(self, timeout_s: float) -> bool:
        """Block until the plan is that of the configuration; whether that came in time."""
        ends_at = time.monotonic() + timeout_s
        return all(each.wait(max(0.0, ends_at - time.monotonic())) for each in (self._reader, self._planner))

    def close(self) -> None:
        """End what runs as soon as it can be. Safe to call twice."""
        self._cancelled.set()
        self._reader.close()
        self._planner.close()

    def _begin_to_read(self, config: EngineConfig) -> None:
        if self.is_reading and self._read_key == _key(config):
            return
        self._end_reading()
        self._cancelled = cancelled = threading.Event()
        self.is_reading, self._read_key, self._preview = True, _key(config), None
        self._reader.submit(lambda: self._read(config, cancelled))

    def _end_reading(self) -> None:
        self._cancelled.set()
        self.is_reading = False

    def _read(self, config: EngineConfig, cancelled: threading.Event) -> None:
        try:
            found: ModelReading | KaniNbError = read_model(config, cancelled=cancelled)
        except KaniNbError as error:
            found = error
        except Exception as error:  # noqa: BLE001 - what is wrong with a model is said at its field
            found = ModelFilesError(f"{config.model} could not be read", why=error_words(error))
        with self._lock:
            if cancelled.is_set():
                return
            self.forget_failures()
            self._readings[_key(config)] = found
            self.is_reading = False
            self.follow(self._config)
        self._changed()

    def _plan(self, config: EngineConfig, reading: ModelReading) -> None:
        try:
            preview = reading.preview(config, also_free=self._given_back())
        except Exception as error:  # noqa: BLE001 - without a plan, but not without a word
            preview = LoadPreview(error=ConfigError("model: no plan could be made", why=error_words(error)))
        refusal = preview.error
        with self._lock:
            if self._config != config:
                return  # a newer one is on its way
            self._preview = preview
            about = "" if refusal is None or isinstance(refusal, DoesNotFitError) else field_of(refusal)
            self.errors = {about: str(refusal)} if about else {}
        self._changed()


def _key(config: EngineConfig) -> _Key:
    return (config.model, config.revision, config.trust_remote_code)
