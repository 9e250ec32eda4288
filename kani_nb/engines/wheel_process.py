"""Child processes that are watched line by line and can be ended at any moment: pip, and the conversion."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import threading
from collections.abc import Iterator


def parse_record(line: str) -> dict[str, object]:
    """The JSON object that `line` holds, or an empty one."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


@contextlib.contextmanager
def running(
    command: list[str], environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[str], queue.SimpleQueue[str]]]:
    """A running child and the lines it prints; leaving ends it."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    # A session of its own: an interrupt of the kernel reaches its whole group, and it is for us to end the child.
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,  # ends when we do, however we end: a child may watch it
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True)
        reader.start()
        try:
            yield process, lines
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            reader.join(timeout=5)


def _pump(stream: Iterator[str], lines: queue.SimpleQueue[str]) -> None:
    for line in stream:
        lines.put(line)


def remaining(lines: queue.SimpleQueue[str]) -> list[str]:
    """Every line that is still to be read."""
    found = []
    while True:
        try:
            found.append(lines.get(timeout=0.2))
        except queue.Empty:
            return found
