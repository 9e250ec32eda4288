"""`kani-nb compare` in a terminal: its progress on one line, then the table; on Ctrl-C what there is of it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import CancelledError
from typing import Any

from kani_nb._interrupts import Interrupted, InterruptGuard
from kani_nb._runtime import runtime
from kani_nb._waiting import Call
from kani_nb.compare import compare, compare_arguments
from kani_nb.errors import KaniNbError
from kani_nb.metrics.comparison import Comparison
from kani_nb.serve.terminal import ProgressLine, harmless

#: How long the running answer may take to end after Ctrl-C: one token of a slow model, and freeing it.
_LET_GO_S = 20.0


def run_compare(given: Mapping[str, Any]) -> Comparison:
    """Measure what a parsed command line asks for, print it, and return it.

    Raises:
        KaniNbError: an argument cannot be used, or no scheme could be measured.
        KeyboardInterrupt: interrupted; what had been measured is printed.
    """
    arguments = compare_arguments(given)
    so_far: list[Comparison] = []
    with ProgressLine() as line, InterruptGuard() as guard:
        running = compare(**arguments, progress=line.progress, on_result=so_far.append)
        call = Call(runtime().loop, running, guard, grace_s=_LET_GO_S)
        try:
            found = call.result()
        except (CancelledError, Interrupted, KaniNbError):
            line.clear()
            if not call.was_interrupted:
                raise
            if so_far and so_far[-1].measured:
                print(harmless(so_far[-1].to_text()))
            raise Interrupted from None
    print(harmless(found.to_text()))
    return found
