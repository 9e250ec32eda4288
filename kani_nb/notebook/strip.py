"""The live strip under a running answer: Stop, what happens, tokens per second, a sparkline of memory.

A widget while the answer runs, and afterwards whatever is to stand in its place, so that a saved notebook holds no
widget. It is shown only where someone can see and press it. A click sets the caller's stop through the `StopBus`; the
main thread then acknowledges it, and where no acknowledgement comes, the front end interrupts the kernel.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kani_nb._amounts import in_words
from kani_nb.metrics.sampler import resident_bytes
from kani_nb.notebook.shell import can_ask
from kani_nb.notebook.stat_line import seconds
from kani_nb.notebook.surface import SurfaceKind, surface_kind

if TYPE_CHECKING:
    from kani_nb.notebook.stop_bus import StopBus

_UPDATE_S = 0.25
#: An answer that is over by then needs no Stop: a widget whose output is replaced while a page still makes its view is
#: an error on the page's console.
_SHOWN_AFTER_S = 0.3
#: anywidget gives up making a model after 2 s; a page may be slow to begin.
_LINGER_S = 8.0
_SPARKLINE_POINTS = 40
_NOTHING = {"text/html": "", "text/plain": ""}
_SOURCE = Path(__file__).parent.parent / "static" / "strip.js"


def can_show_strip(shell: Any) -> bool:
    """Whether a person can press a button there: a kernel, no capture, and a front end that can also ask for input.

    nbclient, papermill and `jupyter execute` say that they cannot; they would keep the widget's state in the notebook.
    """
    if surface_kind(shell) is not SurfaceKind.LIVE:
        return False
    return can_ask(shell)


class LiveStrip:
    """The strip of one answer. Main thread only, but for the click itself.

    Args:
        on_stop: called once, when Stop is pressed, on any thread: it may set an event, and little more.
        bus: sees the click while a cell runs.
        memory: bytes to draw; the process's resident memory by default.
        clock: seconds that only grow.
        shown_after_s: what an answer must last for a strip.
        linger_s: how long a widget lives at least: one that is closed while the front end still makes it is an error on
            the page's console. (The front end could say when it has; but a message to a busy kernel makes JupyterLab
            show it as idle.)
    """

    def __init__(
        self,
        on_stop: Callable[[], object],
        bus: StopBus,
        *,
        memory: Callable[[], int] = resident_bytes,
        clock: Callable[[], float] = time.monotonic,
        shown_after_s: float = _SHOWN_AFTER_S,
        linger_s: float = _LINGER_S,
    ) -> None:
        self._shown_after_s, self._linger_s = shown_after_s, linger_s
        self._on_stop = on_stop
        self._bus = bus
        self._memory = memory
        self._clock = clock
        self._clicked = threading.Event()
        self._is_acknowledged = False
        self._series: deque[int] = deque(maxlen=_SPARKLINE_POINTS)
        self._widget: Any = None
        self._handle: Any = None
        self._comm_id = ""
        self._is_open = False
        self._started_at = self._shown_at = 0.0
        self._next_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the answer runs that it belongs to; it may not be on the page yet."""
        return self._is_open

    @property
    def is_stopping(self) -> bool:
        """Whether Stop was pressed."""
        return self._clicked.is_set()

    def open(self) -> None:
        """Begin: the answer starts now."""
        self._is_open = True
        self._started_at = self._clock()
        _widget_class()  # imports what it needs before a model needs the time
        self._show_if_due()

    def _show_if_due(self) -> None:
        now = self._clock()
        if self._widget is not None or not self._is_open or now < self._started_at + self._shown_after_s:
            return
        from IPython.display import display

        self._shown_at = now
        self._widget = widget = _widget_class()(state={"status": "starting"})
        self._comm_id = str(widget.comm.comm_id)
        widget.state = {"status": "starting", "comm": self._comm_id}
        widget.on_msg(lambda _widget, content, _buffers: self._click(content))
        self._bus.register(self._comm_id, self._receive)
        # Not `display(widget)`: the ipywidgets of Colab would ignore the display id, and nothing could take its place.
        shown = widget._repr_mimebundle_()
        bundle, metadata = shown if isinstance(shown, tuple) else (shown, {})
        self._handle = display(bundle, metadata=metadata, raw=True, display_id=True)

    def update(self, status: str, tokens: int = 0, first_text_at: float | None = None) -> None:
        """Show how far the answer is, at most four times a second, and see to a click.

        Args:
            status: what happens, in a word or two.
            tokens: how many there are so far.
            first_text_at: the clock's time of the first of them.
        """
        if not self._is_open:
            return
        self._bus.pump()
        self._show_if_due()
        if self._widget is None:
            return
        if self._clicked.is_set() and not self._is_acknowledged:
            self._is_acknowledged = True
            self._widget.send({"kind": "ack"})
        now = self._clock()
        if now < self._next_at:
            return
        self._next_at = now + _UPDATE_S
        self._series.append(self._memory())
        numbers = [seconds(now - self._started_at)]
        if tokens:
            numbers.append(f"{tokens:,} tokens")
            if first_text_at is not None and tokens > 1 and now > first_text_at:
                numbers.append(f"{(tokens - 1) / (now - first_text_at):.1f} tok/s")
        self._widget.state = {
            "comm": self._comm_id,
            "status": status,
            "numbers": " · ".join(numbers),
            "memory": in_words(self._series[-1]),
            "series": [round(each / 2**20) for each in self._series],
        }

    def close(self, bundle: Mapping[str, Any] | None = None) -> None:
        """Put `bundle` (or nothing) in the place of the strip and close the widget. Safe to call twice.

        After a short answer the widget itself is closed a few seconds later, from a thread.
        """
        is_open, self._is_open = self._is_open, False
        widget, self._widget = self._widget, None
        if widget is None:
            if is_open and bundle is not None:
                from IPython.display import display

                display(dict(bundle), raw=True)
            return
        self._bus.unregister(self._comm_id)
        self._handle.update(dict(bundle or _NOTHING), raw=True)
        wait_s = self._linger_s - (self._clock() - self._shown_at)
        if wait_s <= 0:
            _close(widget)
            return
        # With this cell as the parent of what is sent; kernels differ in whether a thread inherits it.
        timer = threading.Timer(wait_s, contextvars.copy_context().run, (_close, widget))
        timer.daemon = True
        timer.start()

    def _receive(self, data: Mapping[str, Any]) -> None:
        if data.get("method") == "custom":
            self._click(data.get("content"))

    def _click(self, content: Any) -> None:
        if isinstance(content, Mapping) and content.get("kind") == "stop" and not self._clicked.is_set():
            self._clicked.set()
            self._on_stop()


def _close(widget: Any) -> None:
    widget.layout.close()
    widget.close()


@functools.cache
def _widget_class() -> Any:
    """The anywidget class; made here so that nothing of widgets is imported before one is shown."""
    import anywidget
    import traitlets

    class Strip(anywidget.AnyWidget):
        """What the front end draws; `state` holds plain words and numbers."""

        _esm = _SOURCE.read_text(encoding="utf-8")
        state = traitlets.Dict().tag(sync=True)

    return Strip
