"""Starts a real kernel and talks to it as a front end does: cell ids, interrupts, all outputs in order."""

from __future__ import annotations

import os
import queue
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import KernelManager

from tests.kernels import overlays

#: Every set of versions that kernels are tested with.
VERSIONS = ("installed", *overlays.OVERLAYS)


@dataclass
class Outcome:
    """What came of one execution: the reply's status, and every output as a front end would hold it at the end."""

    status: str
    reply: dict[str, Any]
    outputs: list[dict[str, Any]] = field(default_factory=list)
    frames: dict[str, list[str]] = field(default_factory=dict)
    duration_s: float = 0.0

    @property
    def text(self) -> str:
        """All text of all outputs."""
        parts = []
        for output in self.outputs:
            parts.append(
                output.get("text") or output.get("data", {}).get("text/plain") or "\n".join(output.get("traceback", []))
            )
        return "\n".join(parts)

    @property
    def error(self) -> str:
        """The lines of the error, or an empty string."""
        return "\n".join(self.reply.get("traceback", [])) if self.status == "error" else ""


class Kernel:
    """A running kernel and its client."""

    def __init__(self, manager: KernelManager) -> None:
        self.manager = manager
        self.client = manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def send(self, code: str, *, cell_id: str | None = None, allow_stdin: bool = False) -> str:
        """Ask for `code` to be run, as JupyterLab would from the cell `cell_id`; gives the request's id."""
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": allow_stdin,
            "stop_on_error": True,
        }
        metadata = {} if cell_id is None else {"cellId": cell_id}
        message = self.client.session.msg("execute_request", content, metadata=metadata)
        self.client.shell_channel.send(message)
        return str(message["header"]["msg_id"])

    def collect(self, request: str, timeout: float = 60, on_output: Any = None, person: Any = None) -> Outcome:
        """Wait for the request to end; `on_output(message)` sees each of its iopub messages as it comes.

        `person(question)` answers what `input()` asks.
        """
        started = time.monotonic()
        outcome = Outcome("", {})
        displays: dict[str, list[int]] = {}
        is_idle = False
        while not is_idle:
            message = self._next(timeout - (time.monotonic() - started), person)
            kind, content = message["msg_type"], message["content"]
            if kind == "update_display_data":
                self._update(outcome, displays, content)
            if message["parent_header"].get("msg_id") != request:
                continue
            if on_output is not None:
                on_output(message)
            if kind == "status":
                is_idle = content["execution_state"] == "idle"
            elif kind == "stream":
                outcome.outputs.append({"text": content["text"]})
            elif kind in ("display_data", "execute_result"):
                display_id = content.get("transient", {}).get("display_id")
                if display_id is not None:
                    displays.setdefault(display_id, []).append(len(outcome.outputs))
                    outcome.frames.setdefault(display_id, []).append(content["data"].get("text/plain", ""))
                outcome.outputs.append({"data": content["data"], "metadata": content["metadata"]})
            elif kind == "error":
                outcome.outputs.append({"traceback": content["traceback"], "ename": content["ename"]})
        while True:
            reply = self.client.get_shell_msg(timeout=max(1.0, timeout))
            if reply["parent_header"].get("msg_id") == request:
                break
        outcome.status, outcome.reply = reply["content"]["status"], reply["content"]
        outcome.duration_s = time.monotonic() - started
        return outcome

    def _next(self, left: float, person: Any) -> dict[str, Any]:
        """The next iopub message; questions that come before it are answered."""
        ends = time.monotonic() + left
        while person is not None and time.monotonic() < ends:
            if self.client.stdin_channel.msg_ready():
                self.client.input(person(self.client.get_stdin_msg(timeout=1)["content"]["prompt"]))
            if self.client.iopub_channel.msg_ready():
                break
            time.sleep(0.02)
        return self.client.get_iopub_msg(timeout=max(0.1, ends - time.monotonic()))

    @staticmethod
    def _update(outcome: Outcome, displays: dict[str, list[int]], content: dict[str, Any]) -> None:
        display_id = content["transient"]["display_id"]
        outcome.frames.setdefault(display_id, []).append(content["data"].get("text/plain", ""))
        for at in displays.get(display_id, []):
            outcome.outputs[at] = {"data": content["data"], "metadata": content["metadata"]}

    def run(self, code: str, *, cell_id: str | None = None, timeout: float = 60, on_output: Any = None) -> Outcome:
        """Run `code` and wait for it."""
        return self.collect(self.send(code, cell_id=cell_id), timeout, on_output)

    def value(self, expression: str) -> str:
        """What `print(expression)` prints."""
        outcome = self.run(f"print({expression})")
        while outcome.status == "aborted":  # for a moment after a cell failed, as if it had been queued behind that
            outcome = self.run(f"print({expression})")
        assert outcome.status == "ok", outcome.text
        return "".join(output.get("text", "") for output in outcome.outputs).strip()

    def interrupt(self) -> None:
        """Interrupt the running cell."""
        self.manager.interrupt_kernel()

    def drain(self) -> None:
        """Forget messages that nobody waits for."""
        for channel in (self.client.get_iopub_msg, self.client.get_shell_msg):
            try:
                while True:
                    channel(timeout=0.1)
            except queue.Empty:
                pass

    def close(self) -> None:
        """End the kernel."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@contextmanager
def kernel(
    versions: str = "installed", *, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Iterator[Kernel]:
    """A kernel of the installed versions, or with an overlay laid over them; skips the test where that is missing."""
    environment = dict(os.environ, PYDEVD_DISABLE_FILE_VALIDATION="1", **(env or {}))
    if versions != "installed":
        if not overlays.is_installed(versions):
            pytest.skip(f"python -m tests.kernels.overlays installs {versions}")
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(overlays.overlay_folder(versions)), environment.get("PYTHONPATH")])
        )
    manager = KernelManager()
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    manager._kernel_spec = KernelSpec(argv=argv, display_name=versions, language="python")
    manager.start_kernel(env=environment, cwd=str(cwd) if cwd else None)
    running = Kernel(manager)
    try:
        yield running
    finally:
        running.close()
