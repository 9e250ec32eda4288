"""How a timing test says what it measured."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any


def p95(values: Sequence[float]) -> float:
    """The value that 95 of 100 do not pass."""
    return sorted(values)[max(0, round(0.95 * len(values)) - 1)]


def show(what: str, **figures: Any) -> None:
    """Print one line of JSON: what was measured, the figures, and the load of this machine."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    print("\n" + json.dumps({"measured": what, **figures, "load": load, "cpus": os.cpu_count()}))
