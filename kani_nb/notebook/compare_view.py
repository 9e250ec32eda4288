"""`%engine compare`: reads the line, waits with a table that grows row by row, and shows the result.

HTML with plain text beside it, then one figure; no widget, so the saved notebook keeps all of it. The figures are those
of `kani_nb.compare`; nothing is measured here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from kani_nb._interrupts import Interrupted, InterruptGuard
from kani_nb._runtime import runtime
from kani_nb._waiting import Call
from kani_nb.compare import add_arguments, compare, compare_arguments
from kani_nb.engines.base import LoadProgress
from kani_nb.errors import KaniNbError
from kani_nb.metrics.comparison import COLUMNS, Comparison, beginning
from kani_nb.notebook import html_tables
from kani_nb.notebook.shell import front_end
from kani_nb.notebook.surface import Surface, SurfaceKind
from kani_nb.notebook.transcript import plain
from kani_nb.notebook.verbs import required
from kani_nb.options import LineParser

_EXAMPLES = """\
Examples:
  %engine compare smollm2                                        the default schemes, on our own text
  %engine compare smollm2 --schemes none,cpu-int8,cpu-int4       those for a CPU
  %engine compare smollm2 --schemes none,int8 --sweep llm_int8_threshold=3,6,10
"""

#: How long the running answer may take to end after an interrupt: one token of a slow model, and freeing it.
_LET_GO_S = 20.0
_EVERY_S = 0.2


def compare_parser() -> LineParser:
    """The parser of what follows the verb."""
    parser = LineParser(prog="%engine compare", usage="%(prog)s MODEL [OPTIONS]", add_help=False)
    parser.add_argument("model", metavar="MODEL", help="alias (smollm2), org/model or a folder")
    add_arguments(parser)
    return parser


def compare_details() -> str:
    """The options, for the verb's own help."""
    return compare_parser().format_help() + "\n" + _EXAMPLES


def run_compare(shell: Any, rest: str, *, draws: bool = True) -> None:
    """Compare the schemes that `rest` names, and show what was measured.

    Args:
        shell: the running shell.
        rest: the line after the verb.
        draws: whether a figure may be drawn.

    Raises:
        KaniNbError: an option cannot be used, or no scheme could be measured.
        KeyboardInterrupt: interrupted; what had been measured is shown.
    """
    args = compare_parser().parse_line(required(rest, "%engine compare MODEL"))
    arguments = compare_arguments(vars(args))
    view = CompareView(args.model)
    result: Comparison | None = None
    failure: BaseException | None = None
    with InterruptGuard() as guard:
        call: Call[Comparison] | None = None
        try:
            running = compare(**arguments, progress=view.progress, on_result=view.take)
            call = Call(runtime().loop, running, guard, pump=view.pump, grace_s=_LET_GO_S)
            result = call.result()
        except BaseException as error:
            failure = error
            if (
                call is not None
                and call.was_interrupted
                and isinstance(error, (Interrupted, CancelledError, KaniNbError))
            ):
                failure = Interrupted(view.interrupted(has_ended=call.has_ended))
                raise failure from None
            raise
        finally:
            view.finish(failure)
    place = front_end(shell)
    if draws and place.has_kernel:
        from kani_nb.figures.comparison import comparison_figure

        view.show_below(comparison_figure(result, for_colab=place.kind == "colab").data)


class CompareView:
    """One comparison as an output. `progress` and `take` are for any thread; all else for the main thread.

    Args:
        model: what is compared, as the user wrote it.
        display: as `IPython.display.display`; by default the running shell decides.
        clock: seconds that only grow.
        kind: what the output can do, where that is known.
    """

    def __init__(
        self,
        model: str,
        *,
        display: Callable[..., Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        kind: SurfaceKind | None = None,
    ) -> None:
        self._model = model
        self._surface = Surface(kind, display)
        self._clock = clock
        self._started_at = clock()
        self._lock = threading.Lock()
        self._event = LoadProgress("starting")
        self._result: Comparison | None = None
        self._drawn: Any = None
        self._next_at = 0.0
        self._printed = 0
        self._is_finished = False

    def progress(self, event: LoadProgress) -> None:
        """Take one step."""
        with self._lock:
            self._event = event

    def take(self, result: Comparison) -> None:
        """Take what was measured so far."""
        with self._lock:
            self._result = result

    def pump(self) -> None:
        """Show where it is, if it is time to."""
        if self._is_finished:
            return
        with self._lock:
            event, result = self._event, self._result
        if self._surface.kind is SurfaceKind.TERMINAL:
            rows = result.rows[self._printed :] if result is not None else ()
            for row in rows:
                self._surface.write(f"{row.label}: {'measured' if row.is_measured else row.reason}\n")
            self._printed += len(rows)
            return
        now = self._clock()
        state = (event, result, int(now - self._started_at))
        if now < self._next_at or state == self._drawn or not self._surface.is_live:
            return
        self._next_at, self._drawn = now + _EVERY_S, state
        where = f"comparing schemes of {self._model}, {int(now - self._started_at)} s: {event.stage}, {event.detail}"
        self._surface.show(_bundle(result, where.rstrip(", ")), _metadata("running", self._model))

    def interrupted(self, *, has_ended: bool) -> str:
        """What an interrupt says."""
        with self._lock:
            count = len(self._result.measured) if self._result is not None else 0
        stands = "" if not count else ", and stands above" if count == 1 else ", and stand above"
        kept = f"{count or 'no'} scheme{'s' * (count != 1)} had been measured{stands}"
        left = "" if has_ended else "; what was running was abandoned, and ends by itself in the background"
        return f"interrupted; {kept}{left}"

    def finish(self, failure: BaseException | None = None) -> None:
        """Show what was measured for good. Safe to call twice.

        Args:
            failure: why there is no more of it.
        """
        if self._is_finished:
            return
        self.pump()
        self._is_finished = True
        with self._lock:
            result = self._result
        if result is None or not result.measured:
            result = None
        said = "" if failure is None else f"{self._model} was not compared to the end: {_first_line(failure)}"
        if self._surface.kind is SurfaceKind.TERMINAL:
            self._surface.write((result.to_text() + "\n" if result is not None else "") + (said and said + "\n"))
            return
        if result is None and not said:
            return
        state = "done" if failure is None else "error"
        metadata = _metadata(state, self._model, result)
        self._surface.show(_bundle(result, said), metadata, is_final=True)

    def show_below(self, bundle: dict[str, Any]) -> None:
        """Draw one more output."""
        self._surface.show_below(bundle)


def comparison_html(comparison: Comparison) -> str:
    """The comparison as static HTML, without the frame: table, remarks, and how each answer begins."""
    table = comparison.table
    out = [index for index, row in enumerate(comparison.rows) if not row.is_measured]
    answers = [(row.label, beginning(row.answer)) for row in comparison.measured]
    first, *more = comparison.heading
    parts = [html_tables.text(first, "kani-nb-who")]
    parts += [html_tables.text(line, "kani-nb-stat") for line in more]
    parts += [
        html_tables.table(COLUMNS, table[1:], numbers=range(1, len(COLUMNS)), dimmed=out),
        html_tables.notes(comparison.remarks),
    ]
    if answers:
        parts.append(html_tables.text(f"Answers to {comparison.prompt!r} begin:", "kani-nb-stat"))
        parts += [html_tables.text(f"{label}: {words}", "kani-nb-stat") for label, words in answers]
    return "".join(parts)


def _bundle(comparison: Comparison | None, said: str) -> dict[str, str]:
    """`text/html` and `text/plain` of what was measured, with a line of what is happening, if anything."""
    head = html_tables.text(said, "kani-nb-stat") if said else ""
    has_rows = comparison is not None and bool(comparison.rows)
    body = comparison_html(comparison) if comparison is not None and has_rows else ""
    text = [said] if said else []
    text += [comparison.to_text()] if comparison is not None and has_rows else []
    return {
        "text/html": html_tables.framed(head + body, "Comparison of schemes"),
        "text/plain": plain("\n".join(text)),
    }


def _metadata(state: str, model: str, comparison: Comparison | None = None) -> dict[str, Any]:
    record: dict[str, Any] = {"version": 1, "state": state, "compare": model}
    return {"kani_nb": record if comparison is None else record | {"comparison": comparison.to_dict()}}


def _first_line(error: BaseException) -> str:
    words = str(getattr(error, "what", None) or error).strip().splitlines()
    return words[0] if words else type(error).__name__
