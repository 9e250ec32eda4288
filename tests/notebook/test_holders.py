"""Who holds on to a model that was unloaded: it is named, with how to let go, and how much it holds is true."""

import gc

import pytest

from kani_nb.notebook.stat_line import size

FAILING = "def fail(model): raise ValueError\n"
LOAD = "import kani_nb; rt = kani_nb.runtime()"
#: Cells that keep a model or memory of it -> what the unload must name.
HOLDERS = [
    {
        "m = rt.engine.model": "the variable m (LlamaForCausalLM)",
        "layers = {'first': [rt.engine.model.model.layers[0]]}": "the variable layers (dict)",
        "row = rt.engine.model.lm_head.weight.detach()[3]": "the variable row (Tensor)",
        "array = rt.engine.model.lm_head.weight.detach().numpy()": "the variable array (ndarray)",
        "state = rt.engine.model.state_dict()": "the variable state (OrderedDict)",
        "parts = (p for p in rt.engine.model.parameters())": "the variable parts (generator)",
    },
    {
        "def ask(model=rt.engine.model): pass": "the variable ask",
        "forward = rt.engine.model.forward": "the variable forward (method)",
        "import torch; optimizer = torch.optim.SGD(rt.engine.model.parameters(), lr=1)": "the variable optimizer (SGD)",
        "loss = rt.engine.model(torch.tensor([[1, 2]])).logits.sum()": "the variable loss (Tensor)",
        "class Mine:\n    model = rt.engine.model": "the variable Mine (type)",
        FAILING
        + "try:\n    fail(rt.engine.model)\nexcept ValueError as e:\n    error = e": "the variable error (ValueError)",
    },
]


def loaded(cells, folder, *options):
    cells.good(f"%load_engine {folder} --as tiny --dtype float32 --threads 1 {' '.join(options)}")
    cells.good(LOAD)


@pytest.mark.parametrize("held", HOLDERS, ids=["objects and tensors", "code and graphs"])
def test_what_holds_an_unloaded_model_is_named(cells, tiny_model, held):
    loaded(cells, tiny_model)
    for code in held:
        cells.good(code)
    names = list(held.values())
    printed = cells.good("%unload_engine")
    assert f"still held by {', '.join(names[:-1])} and {names[-1]}: " in printed
    assert f"stay taken until they let go ({'; '.join(f'del {name.split()[2]}' for name in names)})" in printed


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_peft_wrapper_and_a_cached_output_are_named_together_with_the_bytes_they_hold(cells, tiny_model):
    loaded(cells, tiny_model, "--quant int8")
    cells.good("from peft import LoraConfig, get_peft_model")
    cells.good("tuned = get_peft_model(rt.engine.model, LoraConfig(r=2, target_modules=['q_proj']))")
    cells.good("rt.engine.model.lm_head")
    output = cells.shell.execution_count - 1
    held = sum(each.untyped_storage().nbytes() for each in cells.shell.user_ns["tuned"].parameters())
    assert held > 250_000
    printed = cells.good("%unload_engine")
    assert f"held by the variable tuned (PeftModel) and Out[{output}]: {size(held)} stay taken" in printed
    assert "(del tuned; %reset -f out)" in printed


def test_a_thread_that_still_runs_is_named(cells, tiny_model):
    loaded(cells, tiny_model)
    cells.good(
        "import threading\n"
        "go_on, has_begun = threading.Event(), threading.Event()\n"
        "def work(model):\n    has_begun.set()\n    go_on.wait(30)\n"
        "threading.Thread(target=work, args=(rt.engine.model,), name='evaluation').start()\n"
        "has_begun.wait(30)"
    )
    assert "held by the running thread 'evaluation' (in work)" in cells.good("%unload_engine")
    cells.good("go_on.set()")


def test_the_frames_of_a_failed_cell_hold_nothing_beyond_the_unload(cells, tiny_model):
    loaded(cells, tiny_model)
    result, printed = cells.run(FAILING + "fail(rt.engine.model)")
    assert "ValueError" in printed
    del result
    assert "held" not in cells.good("%unload_engine")


def test_what_holds_the_engine_that_was_freed_for_another_is_named_too(cells, tiny_model):
    cells.good(f"%load_engine {tiny_model} --dtype float32 --threads 1")
    cells.good(f"{LOAD}; m = rt.engine.model")
    assert "held by the variable m" in cells.good("%load_engine echo")


def test_nothing_is_named_when_nothing_is_held(cells, tiny_model):
    loaded(cells, tiny_model)
    cells.good("engine = rt.engine\nnumbers = [p.sum().item() for p in engine.model.parameters()]")
    cells.good("%%chat --max-new-tokens 4\nhello")
    printed = cells.good("%unload_engine")
    assert "tiny is unloaded" in printed
    assert "held" not in printed
    gc.collect()
    assert cells.shell.user_ns["engine"].model is None
