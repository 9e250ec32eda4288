"""How a magic fails: one short paragraph for what was expected to go wrong, the traceback for everything else.

A failed cell stays reachable through `sys.last_value` and IPython's own traceback, and with it all locals of the frames
it went through; so the frames of our own errors are cleared, lest a failed load keeps its tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from kani_nb._frames import release_frames
from kani_nb._interrupts import Interrupted
from kani_nb.errors import KaniNbError

F = TypeVar("F", bound=Callable[..., Any])


def short_errors(magic: F) -> F:
    """`magic`, whose `KaniNbError`s and interrupts reach IPython without what their frames held."""

    @functools.wraps(magic)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return magic(*args, **kwargs)
        except KaniNbError as error:
            release_frames(error)
            raise error.with_traceback(None) from error.__cause__
        except Interrupted as error:
            release_frames(error)
            raise error.with_traceback(None) from None
        except KeyboardInterrupt:
            raise Interrupted from None

    return cast("F", run)
