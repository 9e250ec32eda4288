"""The llama.cpp library, imported when it is needed, and what it says while it works.

It is used through llama-cpp-python's binding of `llama.h`, not through its class `Llama`: that one turns the whole
process's output off while it loads, compiles every template it finds, and cannot be stopped. llama.cpp tells why
something failed only in its log; what it says on a thread that listens is kept for the error, and never printed.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kani_nb.errors import MissingDependencyError

INSTALL = "pip install llama-cpp-python"
_NEEDED = (
    *("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab", "llama_get_memory"),
    *("llama_memory_seq_rm", "llama_memory_seq_pos_min", "llama_set_abort_callback", "llama_log_get"),
)
_WARNING, _ERROR, _GOES_ON = 3, 4, 5
_PREFIXES = re.compile(r"^(?:\w+: )*(?:error loading model: )?(?:error loading model \w+: )?")


@functools.cache
def library() -> Any:
    """The module of llama.cpp's functions.

    Raises:
        MissingDependencyError: it is not installed, does not start on this machine, or is too old.
    """
    try:
        llama: Any = importlib.import_module("llama_cpp")
    except ImportError as error:
        raise MissingDependencyError(
            "llama.cpp is not installed", why=str(error), fix=f"{INSTALL} (it is compiled: 5 to 20 minutes, once)"
        ) from error
    except (OSError, RuntimeError) as error:
        raise MissingDependencyError(
            "llama-cpp-python does not start",
            why=str(error),
            fix=f"{INSTALL} --force-reinstall --no-cache-dir, to build it for this machine",
        ) from error
    if lacking := [name for name in _NEEDED if not hasattr(llama, name)]:
        raise MissingDependencyError(
            f"llama-cpp-python {llama.__version__} is too old", why=f"it lacks {lacking[0]}", fix=f"{INSTALL} --upgrade"
        )
    with listening(_ear(llama)):
        llama.llama_backend_init()
    return llama


class Said:
    """What llama.cpp said while one listened."""

    def __init__(self) -> None:
        self._records: list[tuple[int, str]] = []

    def add(self, level: int, text: str) -> None:
        """One record; level 5 goes on with the line before."""
        if level == _GOES_ON and self._records:
            level, before = self._records.pop()
            text = before + text
        if len(self._records) < 2000:
            self._records.append((level, text))

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for _, text in self._records)

    @property
    def reason(self) -> str:
        """The error it told of, without the names of its functions; else its last warning; else nothing."""
        for wanted in (_ERROR, _WARNING):
            lines = [text.strip() for level, text in self._records if level == wanted and text.strip()]
            told = next((line for line in lines if "error loading model" in line), lines[0] if lines else "")
            if told:
                return _PREFIXES.sub("", told)
        return ""


class _Ear:
    """llama.cpp's one log callback: keeps what is said on threads that listen, and passes the rest on as it was."""

    def __init__(self, llama: Any) -> None:
        self.by_thread = threading.local()
        self._previous, self._data = llama.llama_log_callback(), ctypes.c_void_p()
        llama.llama_log_get(ctypes.byref(self._previous), ctypes.byref(self._data))
        self._callback = llama.llama_log_callback(self._hear)
        llama.llama_log_set(self._callback, None)

    def _hear(self, level: int, text: bytes | None, _: Any) -> None:
        said: Said | None = getattr(self.by_thread, "said", None)
        if said is not None:
            said.add(level, (text or b"").decode("utf-8", "replace"))
        elif self._previous:
            self._previous(level, text, self._data)


@functools.cache
def _ear(llama: Any) -> _Ear:
    return _Ear(llama)


@contextmanager
def listening(ear: _Ear | None = None) -> Iterator[Said]:
    """What llama.cpp says on this thread meanwhile; nothing of it is printed."""
    by_thread = (ear or _ear(library())).by_thread
    before = getattr(by_thread, "said", None)
    by_thread.said = said = Said()
    try:
        yield said
    finally:
        by_thread.said = before
