"""`%engine plan`, `%engine explain` and `%load_engine auto` as cells."""

import pytest

pytestmark = pytest.mark.usefixtures("smollm2")


def test_a_plan_names_the_line_that_loads_it(cells):
    said = cells.good("%engine plan smollm2 --schemes none,nf4+dq --context 1000")
    assert "smollm2: LlamaForCausalLM, 135 M parameters, 1,000 tokens of context" in said
    assert "nf4 + double quant" in said
    assert "  %load_engine smollm2" in said


def test_without_a_model_the_loaded_one_is_planned_and_what_it_holds_is_said(cells, tiny_model):
    assert "no model was named, and none is loaded" in cells.bad("%engine plan")
    cells.good(f"%load_engine {tiny_model} --max-context-size 128")
    said = cells.good("%engine plan")
    assert "128 tokens of context" in said
    assert f"{tiny_model.name} is loaded and holds" in said
    assert "the engine echo holds no weights here" in cells.bad("%engine plan echo")


def test_near_misses_are_offered(cells):
    assert "did you mean RTX 3090" in cells.bad("%engine plan smollm2 --card RTX3091")
    assert "did you mean smollm2" in cells.bad("%engine plan smolm2")
    assert "did you mean --context" in cells.bad("%engine plan smollm2 --contxt 4")
    assert "--kv-bits" in cells.good("%engine plan --help")


def test_the_advice_says_what_was_measured_and_what_is_recommended_here(cells):
    said = cells.good("%engine explain smollm2")
    assert "is recommended: " in said
    assert "Not measured: any GPU" in said
    assert "is recommended" not in cells.good("%engine explain")
