"""What `%load_engine` shows: the stages of loading as they pass, and one line when the model is there.

Text and HTML in one output, updated in place at most five times a second; no widget, so nothing of it is left in the
saved notebook. In a terminal each stage is a printed line.
"""

from __future__ import annotations

import html
import threading
import time
from collections.abc import Callable
from typing import Any

from kani_nb._secrets import without_secrets
from kani_nb.engines.base import LoadProgress
from kani_nb.notebook.render import showable
from kani_nb.notebook.stat_line import seconds
from kani_nb.notebook.surface import Surface, SurfaceKind
from kani_nb.notebook.theme import style_tag
from kani_nb.notebook.transcript import plain

_EVERY_S = 0.2


class LoadView:
    """The progress of one load. `progress` is for any thread; all else for the main thread.

    Args:
        model: what is being loaded, as the user wrote it; what is secret in an address is not shown.
        display: as `IPython.display.display`; by default the running shell decides.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        model: str,
        *,
        display: Callable[..., Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        kind: SurfaceKind | None = None,
    ) -> None:
        self._model = without_secrets(model)
        self._clock = clock
        self._surface = Surface(kind, display)
        self._lock = threading.Lock()
        self._stages: list[tuple[LoadProgress, float]] = []
        self._started_at = clock()
        self._drawn: Any = None
        self._printed = 0
        self._next_at = 0.0
        self._is_finished = False

    def progress(self, event: LoadProgress) -> None:
        """Take one step of the load; an event of the running stage replaces the one before."""
        with self._lock:
            if self._stages and self._stages[-1][0].stage == event.stage:
                self._stages[-1] = (event, self._stages[-1][1])
            else:
                self._stages.append((event, self._clock()))

    def pump(self) -> None:
        """Show where the load is, if it is time to."""
        if self._is_finished:
            return
        with self._lock:
            stages = list(self._stages)
        if self._surface.kind is SurfaceKind.TERMINAL:
            for event, _ in stages[self._printed :]:
                self._surface.write(f"{event.stage} {event.detail}".rstrip() + "\n")
            self._printed = len(stages)
            return
        now = self._clock()
        state = (stages, int(now - self._started_at))
        if not stages or now < self._next_at or state == self._drawn or not self._surface.is_live:
            return
        self._next_at, self._drawn = now + _EVERY_S, state
        self._surface.show(_frame(self._model, stages, now - self._started_at), _metadata("running", self._model))

    def finish(
        self,
        *,
        model: str = "",
        origin: str = "",
        dtype: str = "",
        held: str = "",
        note: str = "",
        remarks: str = "",
        has_failed: bool = False,
    ) -> None:
        """Replace the stages by one line, and a second one of remarks. Safe to call twice.

        Args:
            model: the model's own name, where it differs.
            origin: where its weights came from.
            dtype: in what precision.
            held: what they take, and where.
            note: instead of the time it took, for example that the engine was loaded already; of a load that failed,
                what stands now.
            remarks: what was decided on the way.
            has_failed: it was not loaded.
        """
        if self._is_finished:
            return
        self.pump()
        self._is_finished = True
        duration = seconds(self._clock() - self._started_at)
        if has_failed:
            line = f"{self._model} was not loaded after {duration}{f'; {note}' if note else ''}"
        else:
            parts = [model or self._model, origin, dtype, held, note or f"loaded in {duration}"]
            line = " · ".join(part for part in parts if part)
        lines = [each for each in (line, "" if has_failed else remarks) if each]
        if self._surface.kind is SurfaceKind.TERMINAL:
            self._surface.write("\n".join(lines) + "\n")
            return
        bundle = {"text/html": _html("".join(map(_escaped_line, lines))), "text/plain": plain("\n".join(lines))}
        self._surface.show(bundle, _metadata("error" if has_failed else "done", self._model), is_final=True)


def _frame(model: str, stages: list[tuple[LoadProgress, float]], elapsed_s: float) -> dict[str, str]:
    event = stages[-1][0]
    done = [each.stage for each, _ in stages[:-1]]
    percent = "" if event.fraction is None else f" {_clamped(event.fraction):.0%}"
    head = f"loading {model}, {int(elapsed_s)} s"
    text = "\n".join(
        [head, *(f"  {stage}: done" for stage in done), f"  {event.stage}{percent} {event.detail}".rstrip()]
    )
    bar = "" if event.fraction is None else f' <progress max="1" value="{_clamped(event.fraction):.3f}"></progress>'
    rows = [_escaped_line(head), *(_escaped_line(f"\N{CHECK MARK} {stage}") for stage in done)]
    rows.append(_escaped_line(f"{event.stage} {event.detail}".rstrip(), bar))
    return {"text/html": _html("".join(rows)), "text/plain": plain(text)}


def _clamped(fraction: float) -> float:
    return min(1.0, max(0.0, fraction))


def _escaped_line(text: str, after: str = "") -> str:
    return f'<div class="kani-nb-stat">{html.escape(showable(text))}{after}</div>'


def _html(inner: str) -> str:
    return f'{style_tag()}<div class="kani-nb mathjax_ignore" role="status" aria-label="Loading a model">{inner}</div>'


def _metadata(state: str, model: str) -> dict[str, Any]:
    return {"kani_nb": {"version": 1, "state": state, "load": model}}
