"""What the frames of an exception's traceback hold, let go of: tensors, above all. Its lines and names stay.

A failed cell stays reachable through `sys.last_value`, and an error that somebody keeps is never collected; with it
stay all locals of the functions that it went through.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback
from types import FrameType, FunctionType


def release_frames(error: BaseException) -> None:
    """Drop the local variables of every frame that `error` and what caused it went through, except where they run."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        for frame, _ in traceback.walk_tb(each.__traceback__):
            _release(frame)
        pending += [each.__cause__, each.__context__]


def _release(frame: FrameType) -> None:
    """Clear a frame, and the cells of the function that it ran where nothing else uses them.

    `frame.clear()` leaves a nested function's cells. torch calls every module that has a hook through one, whose cells
    are the arguments: the KV cache among them.
    """
    try:
        frame.clear()
    except RuntimeError:  # it runs
        return
    for function in gc.get_referents(frame):
        # Counted are the frame, the list, this name and the argument.
        if isinstance(function, FunctionType) and sys.getrefcount(function) <= 4:
            for cell in function.__closure__ or ():
                # The tuple, this name and the argument.
                if sys.getrefcount(cell) <= 3:
                    with contextlib.suppress(ValueError):  # it is empty
                        del cell.cell_contents
