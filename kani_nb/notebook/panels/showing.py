"""How a panel is put into a cell: the widget, and below it a static twin that is seen where the widget is not.

A saved widget is no record: reopened, front ends show "model not found" in its place. So the cell's second output
says the same in static HTML; the panel's style hides it while the panel lives, and its own hides what is left of a
panel that does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from IPython import get_ipython

from kani_nb._runtime import Closeable, runtime
from kani_nb.errors import ConfigError
from kani_nb.notebook.shell import can_ask, cell_ref, front_end
from kani_nb.notebook.surface import SurfaceKind, surface_kind

#: Hides what stands just before our twin (the dead line of a widget) where no panel lives, and the twin where one does.
#: An untrusted notebook is shown without styles and without drawings: there the words of a drawing are seen instead.
TWIN_STYLE = (
    "<style>.jp-OutputArea:not(:has(.kani-live,.js-plotly-plot))>"
    ".jp-OutputArea-child:has(+.jp-OutputArea-child .kani-twin){display:none}"
    ".jp-OutputArea:has(.kani-live,.js-plotly-plot) .kani-twin{display:none}"
    ".kani-twin .kani-words{display:none}</style>"
)


class ShownPanel:
    """A panel in the running cell. The twin may be updated from any thread.

    Args:
        widget: an anywidget, ours or plotly's.
        twin: `text/html` and `text/plain` of the same, safe already.
    """

    def __init__(self, widget: Any, twin: Mapping[str, str]) -> None:
        from IPython.display import display

        _allow_widgets()
        # Not `display(widget)`: the ipywidgets of Colab would put its own text beside it.
        shown = widget._repr_mimebundle_()
        bundle, metadata = shown if isinstance(shown, tuple) else (shown, {})
        # Its own words would list every trait; what is to be read stands in the twin.
        display({**bundle, "text/plain": ""}, metadata=metadata, raw=True)
        self._handle = display(_marked(twin), raw=True, display_id=True)

    def update(self, twin: Mapping[str, str]) -> None:
        """Replace the twin."""
        if self._handle is not None:
            self._handle.update(_marked(twin), raw=True)


def keep_shown(what: str, panel: Closeable) -> None:
    """Close what the running cell showed the last time it ran: it is seen no more, and would follow all the same.

    In a front end that does not name its cells, a panel follows until the extension is unloaded.
    """
    cell = cell_ref(get_ipython())
    runtime().keep_shown(f"{what} in {cell.cell_id or cell.execution_id}", panel, str(cell.execution_id))


def can_show_panel(shell: Any) -> bool:
    """Whether a widget can be seen and pressed there. Voila asks nobody for input, and shows widgets all the same."""
    has_person = can_ask(shell) or front_end(shell).kind == "voila"
    return surface_kind(shell) is SurfaceKind.LIVE and has_person


def need_place_for_panel(shell: Any, instead: str) -> None:
    """Refuse a panel where nobody could press it.

    Raises:
        ConfigError: it names the command to use instead.
    """
    if not can_show_panel(shell):
        raise ConfigError("there is no place for a panel here", why="nobody could press it", fix=instead)


def _allow_widgets() -> None:
    """Let Colab draw widgets that are not Jupyter's own: anywidget asks for that by itself, plotly 5 does not."""
    try:
        from google.colab import output
    except ImportError:
        return
    output.enable_custom_widget_manager()


def _marked(twin: Mapping[str, str]) -> dict[str, str]:
    return {**twin, "text/html": f'{TWIN_STYLE}<div class="kani-twin">{twin.get("text/html", "")}</div>'}
