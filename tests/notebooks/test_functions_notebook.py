"""The notebook of functions: what is committed reads well, and what it does still happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.notebooks.executing import committed, executed

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "05_functions.ipynb"


def text_of(notebook, cell_id):
    outputs = next(cell for cell in notebook["cells"] if cell["id"] == cell_id)["outputs"]
    shown = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs]
    return "\n".join("".join(each) for each in shown)


def check_outputs(notebook):
    """What any run of it must have left."""
    for cell in notebook["cells"]:
        assert all(output["output_type"] != "error" for output in cell.get("outputs", ()))
    assert "scripted" in "".join(notebook["cells"][0]["source"])
    assert '[people(city="Paris") → 2103000]' in text_of(notebook, "ask")
    assert "in 2 steps" in text_of(notebook, "ask")
    wrong = text_of(notebook, "ask-wrong")
    for words in ("did you mean people?", "city: Missing required argument", "KeyError: 'Marseille'", "kept failing"):
        assert words in wrong
    assert "this front end cannot ask for input" in text_of(notebook, "ask-refused")
    assert "522,000 people forgotten" in text_of(notebook, "ask-allowed")
    assert text_of(notebook, "show-city").startswith("City(name=")
    assert text_of(notebook, "show-logprobs").count("%") >= 12


def test_what_is_committed_was_run_and_names_no_folder_of_the_machine():
    check_outputs(committed(NOTEBOOK, 200_000))


@pytest.mark.notebooks
@pytest.mark.timeout(600)
def test_it_runs_on_the_real_model_and_leaves_the_same(smollm2, tmp_path):
    check_outputs(executed(NOTEBOOK, tmp_path, 500))
