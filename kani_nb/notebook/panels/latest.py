"""Work whose latest request is all that matters: in a thread of its own, what was asked for in between is skipped."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


class Latest:
    """Runs one job at a time in a daemon thread; a job that waits is replaced by a newer one.

    Args:
        name: of the thread, which lives only while there is something to do.
        pause_s: to wait before each job, in which a newer one may take its place.
    """

    def __init__(self, name: str, pause_s: float = 0.0) -> None:
        self._name, self._pause_s = name, pause_s
        self._changed = threading.Condition()
        self._waiting: Callable[[], None] | None = None
        self._is_running = False
        self._is_closed = False

    def submit(self, job: Callable[[], None]) -> None:
        """Run `job` as soon as the present one has ended, unless another is submitted before. Any thread."""
        with self._changed:
            if self._is_closed:
                return
            self._waiting = job
            if not self._is_running:
                self._is_running = True
                threading.Thread(target=self._run, name=self._name, daemon=True).start()

    def wait(self, timeout_s: float) -> bool:
        """Block until there is nothing to do; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._is_running, timeout_s)

    def close(self) -> None:
        """Drop what waits, and take nothing more. What runs is left to end. Safe to call twice."""
        with self._changed:
            self._is_closed = True
            self._waiting = None
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._pause_s and self._waiting is not None:
                    self._changed.wait_for(lambda: self._is_closed, self._pause_s)
                job, self._waiting = self._waiting, None
                if job is None:
                    # Not later: a job submitted in between would find nobody to do it.
                    self._is_running = False
                    self._changed.notify_all()
                    return
            try:
                job()
            except Exception:  # noqa: BLE001 - the next one is done all the same
                threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
