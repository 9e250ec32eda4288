"""Amounts of memory in words, the same in every sentence and table of the package."""

from __future__ import annotations

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30


def in_words(count: float) -> str:
    """Bytes for a person: `13.5 GiB`; below one GiB `270 MiB`, below one MiB `12 KiB`."""
    if count >= _GIB:
        return f"{count / _GIB:,.1f} GiB"
    return f"{count / _MIB:,.0f} MiB" if count >= _MIB or not count else f"{count / _KIB:,.0f} KiB"
