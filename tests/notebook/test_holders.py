"""Who holds on to a model that was unloaded: it is named, with how to let go, and how much it holds is true."""

import gc

import pytest

FAILING = "def fail(model): raise ValueError\n"
THREAD = """
import threading
go_on, has_begun = threading.Event(), threading.Event()
def work(model):
    has_begun.set()
    go_on.wait(30)
threading.Thread(target=work, args=(rt.engine.model,), name='evaluation').start()
has_begun.wait(30)
"""
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
    names = sorted(held.values(), key=lambda each: "thread" in each)
    printed = cells.good("%unload_engine")
    if THREAD in held:
        cells.good("go_on.set()")
    assert f"still held by {', '.join(names[:-1])} and {names[-1]}: " in printed
    variables = [each.split()[2] for each in names if "variable" in each]
    assert f"stay taken until they let go ({'; '.join(f'del {name}' for name in variables)})" in printed


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
    assert f"held by the variable tuned (PeftModel) and Out[{output}]: {held / 1024:.0f} KiB stay taken" in printed
    assert "(del tuned; %reset -f out)" in printed


def test_what_holds_the_engine_that_was_freed_for_another_is_named_too(cells, tiny_model):
    cells.good(f"%load_engine {tiny_model} --dtype float32 --threads 1")
    cells.good(f"{LOAD}; m = rt.engine.model")
    assert "held by the variable m" in cells.good("%load_engine echo")


def test_nothing_is_named_when_nothing_is_held_but_by_the_frames_of_a_failed_cell(cells, tiny_model):
    loaded(cells, tiny_model)
    cells.good("engine = rt.engine\nnumbers = [p.sum().item() for p in engine.model.parameters()]")
    cells.good("%%chat --max-new-tokens 4\nhello")
    assert "ValueError" in cells.run(FAILING + "fail(rt.engine.model)")[1]
    printed = cells.good("%unload_engine")
    assert "tiny is unloaded" in printed
    assert "held" not in printed
    gc.collect()
    assert cells.shell.user_ns["engine"].model is None


def test_a_load_lets_go_of_what_the_frames_of_a_failed_cell_hold(cells):
    cells.good("import weakref\nclass Tensor: pass\nbig = Tensor()\nref = weakref.ref(big)")
    assert (
        "ValueError"
        in cells.run(FAILING + "def use():\n    global big\n    mine, big = big, None\n    fail(mine)\nuse()")[1]
    )
    assert cells.shell.user_ns["ref"]() is not None
    cells.good("%load_engine echo")
    assert cells.shell.user_ns["ref"]() is None
