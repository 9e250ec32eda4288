"""Errors of the libraries in our words, running out of memory among them, and how memory is given back.

What a library says becomes the reason of a short error; its traceback stays as the cause. Nothing here loads.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from kani_nb._frames import release_frames
from kani_nb.errors import KaniNbError, MissingDependencyError, ModelFilesError, OutOfMemoryError

#: What torch, its libraries and the system call it.
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "defaultcpuallocator",
    "bad_alloc",
)
#: Who logs how a load went, in transformers 5.15 to 5.23 and accelerate 1.14 and 1.15.
_REPORTING = (
    "transformers.modeling_utils",
    "transformers.utils.loading_report",
    "transformers.configuration_utils",
    "accelerate.big_modeling",
)
#: Parts of what they log that is not shown: pages with tracebacks, and what the engine or an error says anyway.
_NOT_SHOWN = (
    "LOAD REPORT",
    "parameters are on the meta device because they were offloaded",
    "You are using a model of type",
)


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
    report: list[str] = []
    try:
        with _kept_report(report):
            yield
    except KaniNbError:
        raise
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error) or any(map(_says_out_of_memory, report)):
            release_frames(error)
            raise out_of_memory(f"loading {name}") from None
        why = _reason_in("\n".join(report)) or short(error)
        raise ModelFilesError(f"{name} could not be loaded from {where}", why=why) from error
    except ImportError as error:
        raise MissingDependencyError(f"{name} needs a library that is not installed", why=short(error)) from error
    except Exception as error:
        if isinstance(error, TypeError | AssertionError | AttributeError):
            raise  # a wrong argument or a defect: its traceback says more than we could
        fix = "delete that folder and load again" if "safetensor" in type(error).__name__.lower() else ""
        if "trust_remote_code" in str(error):
            fix = "--trust-remote-code runs the repository's Python code; read it first"
        elif "does not recognize this architecture" in str(error):
            fix = "%pip install -U transformers, then restart the kernel"
        raise ModelFilesError(f"{name} could not be loaded from {where}", why=short(error), fix=fix) from error


@contextlib.contextmanager
def _kept_report(report: list[str]) -> Iterator[None]:
    """Put what the libraries log about a load into `report` instead of showing it.

    What goes wrong while weights are converted (quantized, for one) stands only there; the error that follows does not
    say it.
    """

    def keep(record: logging.LogRecord) -> bool:
        is_report = any(each in str(record.msg) for each in _NOT_SHOWN)
        if is_report:
            report.append(str(record.msg))
        return not is_report

    loggers = [logging.getLogger(each) for each in _REPORTING]
    for each in loggers:
        each.addFilter(keep)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(keep)


def _reason_in(report: str) -> str:
    """The first error that a report quotes, or an empty string."""
    found = re.search(r"^(?:\w+\.)*\w+(?:Error|Exception): .*", report, re.MULTILINE)
    return found[0][:300] if found else ""


def short(error: BaseException) -> str:
    """The first line of an exception, with its type, for a person."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:300]}" if first else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the process ran out of memory; torch says it in several ways."""
    return (
        isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _says_out_of_memory(str(error))
    )


def _says_out_of_memory(text: str) -> bool:
    return any(each in text.lower() for each in _OUT_OF_MEMORY)


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
