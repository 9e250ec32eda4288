"""What a person typed as a path: it may be no path at all, and looking must not fail for that."""

from __future__ import annotations

from pathlib import Path

from kani_nb.errors import UnknownModelError


def typed_path(text: str) -> Path:
    """The path, with `~` for the home.

    Raises:
        UnknownModelError: nothing on a disk can be called so.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        shown = text if len(text) <= 60 else f"{text[:60]}…"
        why = getattr(error, "strerror", None) or str(error)
        raise UnknownModelError(f"there is no model {shown!r}", why=f"it cannot be looked up: {why}") from None
    return path


def exists(text: str) -> bool:
    """Whether there is something of that name; what can be no name is not there."""
    try:
        return Path(text).exists()
    except (OSError, ValueError):
        return False
