"""`%engine dashboard`: memory and latency of the current conversation, drawn anew after each answer, in one place."""

from __future__ import annotations

import threading
from html import escape

from kani_nb._runtime import Runtime, runtime
from kani_nb.figures.conversation import conversation_figure
from kani_nb.figures.dashboard import LiveFigure
from kani_nb.metrics.recorder import GenerationMetrics
from kani_nb.notebook.panels.showing import ShownPanel
from kani_nb.notebook.stats import metrics_of
from kani_nb.notebook.theme import style_tag

_NOTHING_YET = "No answer yet: the dashboard draws the conversation's memory and latency after each one."


class Dashboard:
    """The one live figure of a runtime, in the cell that asked for it last.

    Args:
        rt: whose answers it follows.
    """

    def __init__(self, rt: Runtime) -> None:
        self._rt = rt
        self._lock = threading.Lock()  # answers end on the loop's thread, conversations change on any
        self._drawn = metrics = self._metrics()
        self._figure = LiveFigure(metrics)
        self._shown = ShownPanel(self._figure.widget, _twin(metrics))
        self._unlisten = rt.metrics.listen(lambda _latest: self._redraw())
        self._unwatch = rt.watch_chats(self._redraw)

    def close(self) -> None:
        """Take the figure away; what stands in its place stays. Safe to call twice."""
        self._unlisten()
        self._unwatch()
        self._figure.close()

    def _metrics(self) -> list[GenerationMetrics]:
        chat = self._rt.current_chat
        return [] if chat is None else metrics_of(chat)

    def _redraw(self) -> None:
        with self._lock:
            metrics = self._metrics()
            if metrics == self._drawn:
                return
            self._drawn = metrics
            self._figure.draw(metrics)
            self._shown.update(_twin(metrics))


def _twin(metrics: list[GenerationMetrics]) -> dict[str, str]:
    if not metrics:
        text = _NOTHING_YET
        markup = f'<div class="kani-nb"><div class="kani-nb-stat">{text}</div></div>'
        return {"text/html": style_tag() + markup, "text/plain": text}
    still = conversation_figure(metrics).still
    words = str(still["text/plain"])
    return {
        "text/html": f'{still["image/svg+xml"]}<pre class="kani-words">{escape(words)}</pre>',
        "text/plain": words,
    }


def show_dashboard() -> Dashboard:
    """Open the dashboard in the running cell, and close the one before."""
    rt = runtime()
    rt.close_shown("dashboard")
    dashboard = Dashboard(rt)
    rt.keep_shown("dashboard", dashboard)
    return dashboard
