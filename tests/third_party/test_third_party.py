"""A real second package adds an engine and a scheme by entry points; broken neighbours harm nobody until named."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import ClassVar

import pytest

from kani_nb import EngineConfig, HuggingEngine
from kani_nb.config import parse_config
from kani_nb.engines.registry import create_engine, engine_class, engine_names
from kani_nb.errors import ConfigError, EngineError, MissingDependencyError
from kani_nb.hardware.planner import make_plan, plan_row
from kani_nb.hardware.plans import Budget
from kani_nb.hardware.schemes import find_scheme, scheme_names
from kani_nb.planning import plan_model, read_schemes
from kani_nb.quantization import Quantization
from kani_nb.testing import EngineContract

pytestmark = pytest.mark.usefixtures("neighbours")
BROKEN = ("kani_nb_raising", "kani_nb_lacking", "kani_nb_mistaken", "kani_nb_shadowing")


@pytest.fixture(autouse=True)
def broken_ones_are_imported_anew():
    yield
    for name in BROKEN:
        sys.modules.pop(name, None)


class TestAStrangersEngine(EngineContract):
    params: ClassVar = {"max_new_tokens": 12}

    def make_engine(self):
        return create_engine(EngineConfig("abacus"))


def in_a_process(overlay, code):
    """What `code` prints in a new Python that has the packages on its path."""
    variables = os.environ | {"PYTHONPATH": str(overlay)}
    ran = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_an_engine_of_another_package_is_loaded_by_its_name_and_answers(cells, clean_runtime):
    assert "abacus" in cells.good("%load_engine abacus:base=2 --max-context-size 40 --max-new-tokens 3")
    assert clean_runtime.engine.max_context_size == 40
    assert "11 101 101" in cells.good("%%chat --into reply\nthe quick brown fox")
    assert cells.shell.user_ns["reply"].metrics.completion_tokens == 3
    assert cells.shell.user_ns["reply"].metrics.finish_reason == "length"
    assert "%load_engine abacus:base=2" in cells.good("%engine list")
    assert "an abacus has 2 to 16 beads" in cells.bad("%load_engine abacus:base=1")
    assert "did you mean abacus" in cells.bad("%load_engine abacu:base=2")
    assert clean_runtime.engine_name, "the one before still answers"
    assert "holds no weights here" in cells.bad("%engine plan abacus")


def test_a_scheme_of_another_package_loads_a_model_that_answers(cells, clean_runtime, tiny_model):
    import torch

    cells.good(f"%load_engine {tiny_model} --dtype float32 --device cpu --as whole")
    plain = clean_runtime.engine.memory().weight_bytes
    said = cells.good(f"%load_engine {tiny_model} --dtype float32 --device cpu --quant abacus8 --as beads")
    assert "abacus8" in said
    model = clean_runtime.engine.model
    kinds = {type(module).__name__ for module in model.modules()}
    assert "AbacusLinear" in kinds
    assert type(model.lm_head) is torch.nn.Linear, "the head stays, as transformers has it"
    assert clean_runtime.engine.memory().weight_bytes < plain
    cells.good("%%chat --max-new-tokens 6 --into reply\nthe quick brown fox")
    assert cells.shell.user_ns["reply"].metrics.completion_tokens >= 1
    assert cells.shell.user_ns["reply"].text
    assert "abacus8" in cells.good("%engine info")


@pytest.mark.parametrize("skipped", [None, ("lm_head", "down_proj")])
async def test_the_plan_of_a_strangers_scheme_is_what_is_held(tiny_model, skipped):
    settings = Quantization("abacus8", llm_int8_skip_modules=skipped)
    options = {"llm_int8_skip_modules": skipped} if skipped else {}
    engine = HuggingEngine(
        str(tiny_model), quantization="abacus8", dtype="float32", device="cpu", max_context_size=128, **options
    )
    await engine.load()
    try:
        held = engine.memory().weight_bytes
    finally:
        await engine.close()
    plan = plan_model(str(tiny_model), quantizations=(settings,), dtype="float32", context=128)
    (row,) = plan.rows
    assert row.weight_bytes == held
    assert row.label.startswith("abacus8")
    assert parse_config(row.line).quantization == settings


def test_a_strangers_scheme_is_planned_beside_ours(cells, tiny_model):
    said = cells.good(f"%engine plan {tiny_model} --schemes none,abacus8,int8 --context 64")
    assert "abacus8" in said
    assert f"%load_engine {tiny_model}" in said
    assert "did you mean abacus8" in cells.bad(f"%engine plan {tiny_model} --schemes abacus")
    assert "only cpu-int4 and gptq have it" in cells.bad(f"%load_engine {tiny_model} --quant abacus8 --group-size 64")
    assert "abacus8" in cells.bad(f"%load_engine {tiny_model} --quant zzz"), "all that there are"


def test_nothing_is_claimed_of_a_strangers_scheme_that_was_not_measured(tiny_model):
    from transformers import AutoConfig

    from kani_nb.hardware.shape_reading import shape_of

    shape = shape_of(AutoConfig.from_pretrained(tiny_model), "tiny")
    whole = plan_row(shape, Quantization(), budgets=_budgets(1 << 40), context_tokens=64)
    beads = plan_row(shape, Quantization("abacus8"), budgets=_budgets(1 << 40), context_tokens=64)
    assert beads.peak_bytes < whole.peak_bytes
    between = _budgets((beads.peak_bytes + whole.peak_bytes) // 2)
    plan = make_plan(shape, budgets=between, quantizations=["none", "abacus8"], context_tokens=64)
    assert plan.best is not None
    assert plan.best.label == "abacus8"
    assert "was not measured" in plan.best.notes[-1]
    assert "KL" not in plan.best.notes[-1]
    assert "times the speed" not in plan.best.notes[-1]


def _budgets(usable):
    return (Budget(name="cpu", description="a CPU", total_bytes=usable, usable_bytes=usable),)


def test_a_strangers_scheme_goes_through_a_line_and_back():
    config = EngineConfig("org/model", quantization=Quantization("abacus8", llm_int8_skip_modules=("lm_head",)))
    assert "--quant=abacus8" in config.to_line()
    assert parse_config(config.to_line()) == config
    assert EngineConfig("org/model", quantization="ABACUS8").quantization.scheme == "abacus8"
    assert [each.scheme for each in read_schemes("none, Abacus8")] == ["none", "abacus8"]
    assert find_scheme("abacus8").bits_per_weight() == pytest.approx(8, abs=0.01)


def test_names_are_listed_and_nobody_is_imported_for_it(neighbours):
    code = (
        "import sys\n"
        "from kani_nb.engines.registry import engine_names, engine_class\n"
        "from kani_nb.hardware.schemes import scheme_names, find_scheme\n"
        "print(engine_names(), scheme_names())\n"
        "[engine_class(each) for each in ('abacus', 'echo')]\n"
        "[find_scheme(each) for each in ('abacus8', 'nf4', '8bit', 'none')]\n"
        "print(sorted(each for each in sys.modules if each.startswith('kani_nb_')))\n"
    )
    names, modules = in_a_process(neighbours, code).splitlines()
    for name in ("abacus", "raising", "mistaken", "echo", "raising4", "misnamed"):
        assert f"'{name}'" in names
    assert modules == "['kani_nb_abacus', 'kani_nb_abacus.engine', 'kani_nb_abacus.scheme']"


@pytest.mark.slow
def test_a_scheme_is_found_in_a_process_of_its_own(neighbours, tiny_model):
    code = (
        "from kani_nb.serve.cli import main\n"
        f"main(['plan', {str(tiny_model)!r}, '--schemes', 'none,abacus8', '--context', '64', '--json'])\n"
    )
    assert '"scheme": "abacus8"' in in_a_process(neighbours, code).splitlines()[-1]


def test_an_engine_that_cannot_be_imported_says_its_own_error_when_it_is_named(cells, clean_runtime):
    said = cells.bad("%load_engine raising:x")
    assert "RuntimeError: the licence server of raising.example does not answer" in said
    assert "kani-nb-raising" in said
    said = cells.bad("%load_engine lacking:x")
    assert "a_library_that_nobody_has" in said
    assert "kani-nb-raising" in said
    assert "kani_nb_mistaken" in cells.bad("%load_engine mistaken:x")
    with pytest.raises(MissingDependencyError, match="a_library_that_nobody_has"):
        engine_class("lacking")
    with pytest.raises(EngineError, match="NotThere"):
        engine_class("elsewhere")
    with pytest.raises(ConfigError, match="not a subclass of BaseEngine"):
        engine_class("mistaken")
    cells.good("%load_engine abacus")
    assert "5" in cells.good("%%chat\nbeads")


def test_a_scheme_that_cannot_be_imported_says_its_own_error_when_it_is_named(cells, tiny_model):
    said = cells.bad(f"%load_engine {tiny_model} --quant raising4")
    assert "kani-nb-raising could not be imported" in said
    assert "RuntimeError: the licence server of raising.example does not answer" in said
    assert "kani-nb-mistaken is {'model': 'none'}: that is no Scheme" in cells.bad(
        f"%load_engine {tiny_model} --quant mistaken3"
    )
    said = cells.bad(f"%engine plan {tiny_model} --schemes none,misnamed")
    assert "kani-nb-mistaken calls itself 'named_otherwise'" in said
    assert "abacus8" in cells.good(f"%engine plan {tiny_model} --schemes abacus8 --context 64")


def test_nobody_takes_over_a_name_of_ours(cells):
    assert engine_class("echo").__module__ == "kani_nb.engines.echo"
    assert engine_class("hf") is HuggingEngine
    assert find_scheme("NF4").backend == "bitsandbytes"
    assert find_scheme("none").backend == "torch"
    assert find_scheme("8bit").name == "int8"
    assert len(engine_names()) == len(set(engine_names()))
    assert len(scheme_names()) == len(set(scheme_names()))
    cells.good("%load_engine echo")
    assert "hello" in cells.good("%%chat\nhello")
