"""Who wants to know of a change: called one after the other, and none of them can harm what changes."""

from __future__ import annotations

import logging
from collections.abc import Callable

_LOG = logging.getLogger(__name__)


class Watchers:
    """Functions to call after a change, on the thread that made it. Any thread may add one."""

    def __init__(self) -> None:
        self._all: list[Callable[[], None]] = []

    def add(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Have `changed` called from now on; the result ends that, and may be called twice."""
        self._all.append(changed)
        return lambda: self._all.remove(changed) if changed in self._all else None

    def tell(self) -> None:
        """Call each of them; what one raises is logged, since whoever only looks must not harm what is done."""
        for changed in list(self._all):
            try:
                changed()
            except Exception:  # noqa: BLE001
                _LOG.exception("a watcher failed")
