"""The child process from the side that starts it: requests, answers, its death, and its end when told to.

Blocking; one request at a time. What the process printed before it died is kept for the error.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

from kani_nb.errors import EngineError, GenerationError, MissingDependencyError

#: How long a stop may take before the process is ended.
PATIENCE_S = 0.3
SUCCESSOR = "take a GGUF file of this model, and LlamaCppEngine: %load_engine FILE.gguf"


class ChildHost:
    """A running child process.

    Args:
        name: of the model, for messages to people.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._printed: collections.deque[str] = collections.deque(maxlen=50)
        self._turn = threading.Lock()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kani_nb.engines.ctransformers.process"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # an interrupt of the kernel is not for it
        )
        self._readers = [
            threading.Thread(target=self._read_answers, args=(self._process.stdout,), daemon=True),
            threading.Thread(target=self._read_prints, args=(self._process.stderr,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def printed(self) -> str:
        """The last lines that it printed."""
        return "\n".join(line for line in self._printed if line.strip())

    def _read_answers(self, stream: IO[str]) -> None:
        for line in stream:
            with contextlib.suppress(ValueError):  # it died within a line
                self._answers.put(json.loads(line))
        self._answers.put(None)

    def _read_prints(self, stream: IO[str]) -> None:
        for line in stream:
            self._printed.append(line.rstrip())

    def ask(self, doing: str, stop: threading.Event | None = None, **request: Any) -> Iterator[dict[str, Any]]:
        """Each answer to one request, until the one that ends it: `ready`, `ids` or `done`.

        Setting `stop` asks the process to stop, and ends it when it does not.

        Raises:
            EngineError: the process died; the signal is named.
            GenerationError: what ctransformers raised.
            MissingDependencyError: it could not be imported there.
        """
        with self._turn:
            self._send(request, doing)
            asked_to_stop: float | None = None
            while True:
                if stop is not None and stop.is_set():
                    if asked_to_stop is None:
                        asked_to_stop = time.monotonic()
                        self._send({"stop": True}, doing)
                    elif time.monotonic() - asked_to_stop > PATIENCE_S:
                        self.kill()
                        yield {"done": "cancelled"}
                        return
                try:
                    answer = self._answers.get(timeout=0.05)
                except queue.Empty:
                    continue
                if answer is None:
                    raise self._death(doing)
                if "failed" in answer:
                    raise self._failure(doing, answer)
                yield answer
                if answer.keys() & {"ready", "ids", "done"}:
                    return

    def _send(self, request: dict[str, Any], doing: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            raise self._death(doing) from None

    def _failure(self, doing: str, answer: dict[str, Any]) -> EngineError:
        if answer.get("is_import"):
            return missing_package(answer["failed"])
        lines = self.printed.splitlines()
        why = answer["failed"] + (f" ({lines[-1]})" if lines else "")
        return GenerationError(f"ctransformers failed while {doing} {self._name}", why=why, fix=SUCCESSOR)

    def _death(self, doing: str) -> EngineError:
        status = self._process.wait()
        self.kill()  # what is left of it
        if status < 0:
            how = f"was ended by signal {-status} ({_signal_name(-status)})"
        else:
            how = f"ended with status {status}"
        return EngineError(
            f"the process of ctransformers {how} while {doing} {self._name}",
            why=self.printed.splitlines()[-1] if self.printed else "the package is not maintained any more",
            fix=f"ask again, and it is started anew; better, {SUCCESSOR}",
        )

    def kill(self) -> None:
        """End it, and wait until it has ended. Safe to call twice, and from any thread."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join(timeout=2)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError, ValueError):
                    stream.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def last_of(answers: Iterator[dict[str, Any]], each: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """The last of the answers; `each` is called with those before."""
    answer: dict[str, Any] = {}
    for following in answers:
        if answer and each is not None:
            each(answer)
        answer = following
    return answer


def missing_package(why: str) -> MissingDependencyError:
    """The error for a package that is not there, with its successor."""
    return MissingDependencyError(
        "ctransformers is not installed",
        why=why,
        fix=f"pip install ctransformers py-cpuinfo; better, {SUCCESSOR}",
    )
