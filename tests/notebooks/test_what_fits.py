"""The notebook that plans LLaMA: run anew it says what is committed, its numbers to within a twentieth."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "02_what_fits.ipynb"
REFRESH = f"`python {Path(__file__).relative_to(NOTEBOOK.parents[1])}` runs it and keeps what it says"


def code_cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def said(path):
    """What each cell printed, by its id."""
    return {
        cell["id"]: "".join("".join(output.get("text", "")) for output in cell["outputs"]) for cell in code_cells(path)
    }


def parted(text):
    """The words of a text, spaces alike, and its numbers."""
    words = re.split(r"\d[\d,]*(?:\.\d+)?", re.sub(r" +", " ", text))
    return words, [float(each.replace(",", "")) for each in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def assert_says(text, committed):
    """The same words; numbers may move a little, since working memory is an estimate that is improved now and then."""
    (words, numbers), (old_words, old_numbers) = parted(text), parted(committed)
    assert words == old_words, REFRESH
    assert numbers == pytest.approx(old_numbers, rel=0.05, abs=0.03), REFRESH


def test_what_is_committed_is_what_its_cells_say_today(monkeypatch):
    from kani_nb.hardware import planner, shape_reading

    monkeypatch.setattr(planner, "gguf_schemes", tuple)  # as where llama.cpp is not installed
    from tests.hardware.published import published, published_config

    def read_before(config, name):
        assert config.to_dict() == published_config(name).to_dict()
        return published(name)

    monkeypatch.setattr(shape_reading, "shape_of", read_before)  # the same shapes, which take seconds to read
    committed, names = said(NOTEBOOK), {}
    assert not re.search(r"/(root|home|tmp|work)/", NOTEBOOK.read_text(encoding="utf-8"))
    for cell in code_cells(NOTEBOOK):
        if cell["id"] == "install":  # has a magic, and does nothing but on Colab
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec("".join(cell["source"]), names)
        assert_says(printed.getvalue(), committed[cell["id"]])


@pytest.mark.notebooks
@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is not None,
    reason="where llama.cpp is installed the tables have rows for GGUF files too; they were made without it",
)
def test_a_real_kernel_says_the_same(tmp_path):
    subprocess.run([sys.executable, __file__, tmp_path / "run.ipynb"], check=True, timeout=300)
    committed = said(NOTEBOOK)
    for cell, text in said(tmp_path / "run.ipynb").items():
        assert_says(text, committed[cell])


def main(target):
    """Run the notebook in a kernel of this Python and write it to `target`, outputs included."""
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # With no folder to look in, the only kernel is the one of the running interpreter.
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(
        notebook,
        km=manager,
        timeout=200,
        extra_arguments=["--log-level=ERROR"],
        resources={},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env=dict(os.environ), cwd=str(NOTEBOOK.parent))
    notebook["metadata"] = {"kernelspec": notebook["metadata"]["kernelspec"], "language_info": {"name": "python"}}
    nbformat.write(notebook, target)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK)
