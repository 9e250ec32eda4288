"""Errors of the libraries in our words, running out of memory among them, and how memory is given back.

What a library says becomes the reason of a short error; its traceback stays as the cause. Nothing here loads.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from kani_nb.errors import KaniNbError, MissingDependencyError, ModelFilesError, OutOfMemoryError


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers meanwhile: progress is shown once, by whoever asked for it."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@contextlib.contextmanager
def translated(name: str, where: Path) -> Iterator[None]:
    """Errors of the libraries in our words, the originals as their cause."""
    try:
        yield
    except KaniNbError:
        raise
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise out_of_memory(f"loading {name}") from None
        raise ModelFilesError(f"{name} could not be loaded from {where}", why=short(error)) from error
    except ImportError as error:
        raise MissingDependencyError(f"{name} needs a library that is not installed", why=short(error)) from error
    except Exception as error:
        if isinstance(error, TypeError | AssertionError | AttributeError):
            raise  # a wrong argument or a defect: its traceback says more than we could
        fix = "delete that folder and load again" if "safetensor" in type(error).__name__.lower() else ""
        if "trust_remote_code" in str(error):
            fix = "--trust-remote-code runs the repository's Python code; read it first"
        raise ModelFilesError(f"{name} could not be loaded from {where}", why=short(error), fix=fix) from error


def short(error: BaseException) -> str:
    """The first line of an exception, with its type, for a person."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the process ran out of memory; torch says it in several ways."""
    text = str(error).lower()
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in text
        or "can't allocate memory" in text
        or "defaultcpuallocator" in text
    )


def out_of_memory(doing: str, fix: str = "") -> OutOfMemoryError:
    """The error for it, after what the attempt held has been freed."""
    free_memory()
    return OutOfMemoryError(
        f"out of memory while {doing}",
        why="what it held has been freed",
        fix=fix or "a smaller model or --max-context-size, or %unload_engine another one first",
    )


def free_memory() -> None:
    """Give memory that nobody uses back to the device and to the system."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a libc without malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def forget_frames(error: BaseException) -> None:
    """Let go of the tensors that a traceback's frames still hold; the lines stay."""
    if error.__traceback__ is not None and sys.exc_info()[1] is not None:
        traceback.clear_frames(error.__traceback__)
    for earlier in (error.__cause__, error.__context__):
        if earlier is not None:
            forget_frames(earlier)
