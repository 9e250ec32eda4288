"""`kani-nb quickstart`: the first notebook, run on this Python, its conversation and numbers printed as it goes.

The notebook is the one in the current folder's `notebooks`, or the copy that the package carries. Its conversations go
to a temporary folder, so that it can be repeated; the model goes to the usual cache.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kani_nb.engines.base import LoadProgress
from kani_nb.errors import KaniNbError, MissingDependencyError
from kani_nb.serve.terminal import ProgressLine, harmless

NAME = "01_quickstart.ipynb"
#: A slow machine converts the model within this.
_CELL_LIMIT_S = 1800


def quickstart_notebook() -> Path:
    """Where the first notebook is.

    Raises:
        KaniNbError: it was installed without.
    """
    package = Path(__file__).parent.parent
    # A clone's own copy first: it is the one that JupyterLab can then open from here.
    for folder in (Path.cwd() / "notebooks", package.parent / "notebooks", package / "notebooks"):
        if (folder / NAME).is_file():
            return folder / NAME
    raise KaniNbError(f"{NAME} is not here", why="it was installed without its notebooks", fix="pip install -U kani-nb")


def run_quickstart(notebook: Path | None = None) -> None:
    """Execute the notebook on the current Python, and print what it says as it goes.

    Raises:
        MissingDependencyError: there is nothing to run notebooks with.
        KaniNbError: a cell failed; it and its error are named.
    """
    path = notebook or quickstart_notebook()
    try:
        import nbclient.exceptions
        import nbformat
    except ImportError:
        raise MissingDependencyError(
            "there is nothing here to run a notebook with", fix="pip install 'kani-nb[quickstart]'"
        ) from None
    nb = nbformat.read(path, as_version=4)
    print(f"Running {path} with {sys.executable}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kani-nb-") as home:
        client = _client(nb)
        try:
            client.execute(env={**os.environ, "KANI_NB_HOME": home}, cwd=str(path.parent))
        except nbclient.exceptions.CellExecutionError as error:
            raise KaniNbError("the quickstart stopped at a cell that failed", why=harmless(error.evalue)) from None
        except nbclient.exceptions.DeadKernelError as error:
            raise KaniNbError("the notebook's kernel died", why=str(error), fix="kani-nb doctor") from None
    print(f"\nThat was {NAME}. To open it in JupyterLab:\n\n  {open_command(path)}\n")


def open_command(path: Path) -> str:
    """The one command that opens `path` in JupyterLab, installing that into this Python where it is missing."""
    python = shlex.quote(sys.executable)
    install = "" if find_spec("jupyterlab") is not None else f"{python} -m pip install -q jupyterlab && "
    return f"{install}{python} -m jupyter lab {shlex.quote(str(path))}"


def _client(nb: Any) -> Any:
    """A notebook client whose kernel is this Python, whatever kernels are registered, and which prints each cell."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    # With no folder to look in, the only kernel is the one of the running interpreter.
    specs = KernelSpecManager(kernel_dirs=[])
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)

    class Client(NotebookClient):  # type: ignore[misc]
        """Also tells how far a load is: downloading and converting a model can take minutes."""

        def process_message(self, msg: Any, cell: Any, cell_index: int) -> Any:
            if (step := _load_step(msg)) is not None:
                progress.progress(step)
            return super().process_message(msg, cell, cell_index)

    progress = ProgressLine()

    def show_source(cell: Mapping[str, Any], cell_index: int) -> None:
        if cell["cell_type"] == "code":
            print("\n" + textwrap.indent(cell["source"], "> "), flush=True)

    def show_outputs(cell: Mapping[str, Any], cell_index: int, execute_reply: Any) -> None:
        progress.clear()
        for output in cell.get("outputs", ()):
            text = _text_of(output)
            if text:
                print(textwrap.indent(harmless(text), "    "), flush=True)

    return Client(
        nb,
        km=manager,
        extra_arguments=["--log-level=ERROR"],
        timeout=_CELL_LIMIT_S,
        resources={},
        on_cell_start=show_source,
        on_cell_executed=show_outputs,
    )


def _load_step(message: Mapping[str, Any]) -> LoadProgress | None:
    """The running step of a load that a message shows, if that is what it shows."""
    content = message["content"]
    metadata = content.get("metadata") or {}
    record = metadata.get("kani_nb") if isinstance(metadata, Mapping) else None
    if not record or "load" not in record or record.get("state") != "running":
        return None
    last = str(content.get("data", {}).get("text/plain", "")).strip().splitlines()[-1:]
    stage, _, detail = (last[0].strip() if last else "").partition(" ")
    return LoadProgress(stage, detail) if stage else None


def _text_of(output: Mapping[str, Any]) -> str:
    """What an output says in plain text."""
    if output["output_type"] == "stream":
        return str(output["text"]).rstrip()
    if output["output_type"] == "error":
        return f"{output['ename']}: {output['evalue']}"
    return str(output.get("data", {}).get("text/plain", "")).rstrip()
