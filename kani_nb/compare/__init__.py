"""Schemes of one model side by side: memory, time per token and quality, each really loaded and really freed.

`compare` itself is imported when it is first used, so that a parser can be built without all that it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kani_nb.compare.cases import Sweep, add_arguments, compare_arguments, parse_sweep

if TYPE_CHECKING:
    from kani_nb.compare.measuring import compare

__all__ = ["Sweep", "add_arguments", "compare", "compare_arguments", "parse_sweep"]


def __getattr__(name: str) -> Any:
    if name == "compare":
        from kani_nb.compare.measuring import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
