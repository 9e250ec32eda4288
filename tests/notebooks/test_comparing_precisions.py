"""The notebook that compares precisions: what is committed reads well, and what it does still happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.notebooks.executing import committed, executed

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "03_comparing_precisions.ipynb"
COARSE = "cpu-int4 + group_size=64"
PLOTLY = "application/vnd.plotly.v1+json"


def outputs_of(notebook, cell_id):
    return next(cell for cell in notebook["cells"] if cell["id"] == cell_id)["outputs"]


def record_of(notebook, cell_id):
    """What the comparison of a cell left in its output's metadata."""
    found = [each["metadata"]["kani_nb"] for each in outputs_of(notebook, cell_id) if each["metadata"].get("kani_nb")]
    assert [each["state"] for each in found] == ["done"]
    return found[0]["comparison"]


def check_outputs(notebook):
    """What any run of it must have left."""
    for cell in notebook["cells"]:
        assert all(output["output_type"] != "error" for output in cell.get("outputs", ()))
    for cell_id in ("schemes", "sweep"):
        shown = [output["data"] for output in outputs_of(notebook, cell_id)]
        assert [sorted(data) for data in shown] == [
            ["text/html", "text/plain"],
            [PLOTLY, "image/svg+xml", "text/plain"],
        ]
        assert "<script" not in "".join(shown[0]["text/html"])
    rows = {row["label"]: row for row in record_of(notebook, "schemes")["schemes"]}
    assert list(rows) == ["none", "int8", "fp4", "nf4", "cpu-int8", "cpu-int4", COARSE]
    assert all(row["is_measured"] for row in rows.values())
    assert all("Paris" in row["answer"] for name, row in rows.items() if name in ("none", "int8", "cpu-int8"))
    assert rows["fp4"]["kl_nats"] > rows["nf4"]["kl_nats"] > rows["int8"]["kl_nats"] > rows["none"]["kl_nats"] > 0
    # The grid that these weights come from, and one that is not.
    assert rows[COARSE]["kl_nats"] > 10 * rows["cpu-int4"]["kl_nats"]
    assert rows["none"]["weight_bytes"] > rows["int8"]["weight_bytes"] > rows["nf4"]["weight_bytes"]
    sweep = record_of(notebook, "sweep")["schemes"]
    assert [row["settings"].get("llm_int8_threshold") for row in sweep] == [None, 0, 3, 6, 10]
    said = "".join(outputs_of(notebook, "python")[0]["text"])
    assert re.search(r"nf4 +111\.\d MiB[\s\S]*nf4 \+ double quant +106\.\d MiB", said)


def test_what_is_committed_was_run_and_names_no_folder_of_the_machine():
    check_outputs(committed(NOTEBOOK, 200_000))


@pytest.mark.notebooks
@pytest.mark.timeout(1800)
def test_it_runs_on_the_real_model_and_leaves_the_same(smollm2, tmp_path):
    check_outputs(executed(NOTEBOOK, tmp_path, 1500))
