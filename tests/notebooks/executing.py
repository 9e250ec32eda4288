"""How the tests execute a notebook of ours."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

#: In a process of its own, which takes its sockets with it. Without a folder to look in, its Python is the only kernel.
_EXECUTE = """
import sys, nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
timeout = float(sys.argv[3])
NotebookClient(notebook, km=manager, timeout=timeout, extra_arguments=["--log-level=ERROR"], resources={}).execute()
nbformat.write(notebook, sys.argv[2])
"""


def executed(notebook: Path, folder: Path, cell_timeout_s: float) -> dict[str, Any]:
    """What a fresh run of `notebook` in `folder` leaves; each cell may take so many seconds."""
    left = folder / "executed.ipynb"
    done = subprocess.run(
        [sys.executable, "-c", _EXECUTE, str(notebook), str(left), str(cell_timeout_s)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "KANI_NB_HOME": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(left.read_text(encoding="utf-8"))


def committed(notebook: Path, most_bytes: int) -> dict[str, Any]:
    """What is committed, which names no folder of the machine it was run on."""
    text = notebook.read_text(encoding="utf-8")
    found = json.loads(text)
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    assert not re.search(r"/(root|home|tmp|work)/", text)
    assert len(text) < most_bytes
    return found
