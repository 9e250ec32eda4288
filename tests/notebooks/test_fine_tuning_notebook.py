"""The notebook that fine-tunes: what is committed reads well, and a fresh run learns, keeps and loads the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.notebooks.executing import committed, executed

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "04_fine_tuning.ipynb"
ANSWER = "Old Maud Fenwick keeps the lighthouse of Tarn Point."
HOLDERS = "still held by the variable base (LlamaForCausalLM) and the variable tuned (PeftModelForCausalLM)"


def said(notebook, cell_id):
    """The plain text of a cell's outputs."""
    cell = next(cell for cell in notebook["cells"] if cell["id"] == cell_id)
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell["outputs"]]
    return "".join(line for text in texts for line in text)


def check_outputs(notebook):
    """What any run of it must have left."""
    for cell in notebook["cells"]:
        assert all(output["output_type"] != "error" for output in cell.get("outputs", ()))
        assert all(output.get("name") != "stderr" for output in cell.get("outputs", ()))
    assert "nf4" in said(notebook, "load")
    assert "Maud" not in said(notebook, "before")
    losses = [float(each) for each in re.findall(r"loss (\d+\.\d+)", said(notebook, "train"))]
    assert len(losses) == 8
    assert losses[-1] < 0.1 * losses[0]
    assert ANSWER in said(notebook, "after-1")
    assert "0 of 39 prompt tokens cached" in said(notebook, "after-1"), "not those of the weights before"
    assert "Barnacle" in said(notebook, "other-1")
    assert "Maud" not in said(notebook, "without")
    assert "'adapter_model.safetensors': 3894032" in said(notebook, "save")
    assert HOLDERS in said(notebook, "unload")
    assert ANSWER in said(notebook, "again-1")
    assert "held" not in said(notebook, "end")


def test_what_is_committed_was_run_and_names_no_folder_of_the_machine():
    check_outputs(committed(NOTEBOOK, 100_000))


@pytest.mark.notebooks
@pytest.mark.timeout(900)
def test_it_runs_on_the_real_model_and_leaves_the_same(smollm2, tmp_path):
    check_outputs(executed(NOTEBOOK, tmp_path, 600))
