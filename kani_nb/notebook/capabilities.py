"""What was decided about the front end this runs in, in words: the part of `%kani doctor` that knows of notebooks."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kani_nb.notebook.panels.showing import can_show_panel
from kani_nb.notebook.shell import can_ask, front_end, notebook_path
from kani_nb.notebook.stop_bus import StopBus


def capabilities(shell: Any, bus: StopBus) -> dict[str, str]:
    """By topic: how outputs are drawn, how an answer is stopped, whether panels can be used, which notebook it is.

    Args:
        shell: the running shell.
        bus: what sees a Stop while a cell runs.
    """
    place = front_end(shell)
    if not place.has_kernel:
        return {"front end": f"{place.kind}: plain text, no widgets, no figures; Ctrl-C ends an answer"}
    stop = "Stop button while a cell runs" if bus.install() else "no Stop button while a cell runs: use the stop icon"
    plots = "figures by plotly from its CDN" if place.kind == "colab" else "figures as plotly JSON and SVG"
    kernel = f"{type(shell.kernel).__module__.split('.')[0]} {_version('ipykernel')}"
    path = notebook_path(shell)
    return {
        "front end": f"{place.kind}, {kernel}; outputs are updated in place, {plots}; {stop}",
        "panels": _panels(shell),
        "notebook": path or "path not known: conversations are found by name",
    }


def _panels(shell: Any) -> str:
    versions = f"ipywidgets {_version('ipywidgets')}, anywidget {_version('anywidget')}"
    if not can_show_panel(shell):
        return f"none: nobody could press them here ({versions}); %load_engine and %%chat do the same"
    way = "nobody can be asked by input(), so they ask by buttons" if not can_ask(shell) else "they can be pressed here"
    return f"%engine panel, %chat panel, %engine dashboard: {way} ({versions})"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
