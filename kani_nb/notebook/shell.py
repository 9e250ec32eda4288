"""Which front end and kernel this is: the running cell's identity, the notebook's path, and what can be shown there.

Only looks: at messages the kernel holds, at environment variables that servers set, and at class names. Whatever cannot
be known is empty, and callers fall back.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from uuid import uuid4

from kani_nb.conversation.tree import CellRef


@dataclass(frozen=True, slots=True)
class FrontEnd:
    """What is known of the place the cell runs in.

    Attributes:
        kind: `notebook` (a Jupyter kernel), `colab`, `vscode`, `voila` (a page made of a notebook, without its cells),
            `terminal` (IPython in a terminal) or `plain`.
        has_kernel: messages are exchanged with a front end, so that displays can be updated.
    """

    kind: str
    has_kernel: bool


def front_end(shell: Any) -> FrontEnd:
    """The front end of `shell`."""
    has_kernel = getattr(shell, "kernel", None) is not None
    if type(shell).__module__.startswith("google.colab") or "google.colab" in sys.modules:
        return FrontEnd("colab", has_kernel)
    if has_kernel and os.environ.get("SERVER_SOFTWARE", "").startswith("voila"):
        return FrontEnd("voila", has_kernel)
    if has_kernel:
        is_vscode = "__vsc_ipynb_file__" in shell.user_ns or "VSCODE_PID" in os.environ
        return FrontEnd("vscode" if is_vscode else "notebook", has_kernel)
    return FrontEnd("terminal" if type(shell).__name__ == "TerminalInteractiveShell" else "plain", has_kernel)


def cell_ref(shell: Any) -> CellRef:
    """The identity of the cell that runs now.

    The cell's id comes from the execute request (JupyterLab, Notebook 7, VS Code); None where none was sent. The
    execution's is that request's own, or the execution count in a terminal, made unique to this process.
    """
    request = _request(shell)
    metadata = request.get("metadata") or {}
    header = request.get("header") or {}
    cell_id = metadata.get("cellId") or None
    execution_id = header.get("msg_id") or f"{_process_id()}-{getattr(shell, 'execution_count', 0)}"
    return CellRef(cell_id=str(cell_id) if cell_id else None, execution_id=str(execution_id))


def can_ask(shell: Any) -> bool:
    """Whether `input()` reaches a person: the execute request says so, where there is a kernel."""
    kernel = getattr(shell, "kernel", None)
    return kernel is None or bool(getattr(kernel, "_allow_stdin", True))


def ends_source(shell: Any, prompt: str) -> bool:
    """Whether the running cell is a `%%chat` whose source ends with `prompt`, so that it can be read there."""
    source = str((_request(shell).get("content") or {}).get("code") or "").rstrip()
    return "%%chat" in source and source.endswith("\n" + prompt)


def notebook_path(shell: Any) -> str:
    """The path of the notebook this kernel belongs to, or an empty string (Colab, nbclient, a terminal)."""
    in_vscode = shell.user_ns.get("__vsc_ipynb_file__")
    if isinstance(in_vscode, str) and in_vscode:
        return in_vscode
    named = os.environ.get("JPY_SESSION_NAME", "")
    return named if named.endswith(".ipynb") else ""


def _request(shell: Any) -> Mapping[str, Any]:
    """The execute request being served, or nothing outside a kernel."""
    kernel = getattr(shell, "kernel", None)
    get_parent = getattr(kernel, "get_parent", None)
    request = get_parent("shell") if callable(get_parent) else getattr(shell, "parent_header", None)
    return request if isinstance(request, Mapping) else {}


@cache
def _process_id() -> str:
    """Distinguishes the execution counts of this process from those of others."""
    return uuid4().hex[:12]
