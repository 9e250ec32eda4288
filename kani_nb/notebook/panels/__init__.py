"""Panels: what the magics do, for people who would rather look and click. `EnginePanel`, `ChatPanel`.

Each is a thin view over the same records as the magics, and shows the line that does the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kani_nb.notebook.panels.chat_panel import ChatPanel as ChatPanel
    from kani_nb.notebook.panels.engine_panel import EnginePanel as EnginePanel

__all__ = ["ChatPanel", "EnginePanel"]


def __getattr__(name: str) -> Any:
    """The panel of that name; widgets are imported when the first one is asked for."""
    if name == "ChatPanel":
        from kani_nb.notebook.panels.chat_panel import ChatPanel

        return ChatPanel
    if name == "EnginePanel":
        from kani_nb.notebook.panels.engine_panel import EnginePanel

        return EnginePanel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
