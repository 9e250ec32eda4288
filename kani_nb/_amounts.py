"""Amounts of memory in words, the same in every sentence and table of the package."""

from __future__ import annotations

_MIB, _GIB = 2**20, 2**30


def in_words(count: float) -> str:
    """Bytes for a person: `13.5 GiB`; below one GiB `270 MiB`."""
    return f"{count / _GIB:,.1f} GiB" if count >= _GIB else f"{count / _MIB:,.0f} MiB"
