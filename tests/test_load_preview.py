"""What the panel plans is what a load takes, and it refuses what a load refuses, with the same words."""

import json

import pytest

from kani_nb.config import EngineConfig
from kani_nb.engines.registry import create_engine
from kani_nb.errors import DoesNotFitError, KaniNbError, ModelUnavailableError, UnknownModelError
from kani_nb.load_preview import read_model
from kani_nb.options import LOAD_OPTIONS
from kani_nb.quantization import Quantization

MIB = 2**20


@pytest.fixture(scope="module")
def model(tiny_model):
    return str(tiny_model)


@pytest.fixture(scope="module")
def reading(model):
    return read_model(EngineConfig(model))


def test_a_model_is_read_without_its_weights(reading, tmp_path, tiny_model):
    assert (reading.engine, reading.window_tokens) == ("hf", 512)
    assert reading.title.startswith("LlamaForCausalLM, ")
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    alone = read_model(EngineConfig(str(tmp_path)))
    assert alone.shape.parameters == reading.shape.parameters


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "float32"},
        {"dtype": "bfloat16", "max_context_size": 64},
        {"quantization": Quantization("cpu-int8")},
        {"quantization": Quantization("cpu-int4", group_size=64)},
        {"quantization": Quantization("nf4", double_quant=True)},
        {"device": "cpu"},
        {"device_map": "auto"},
        {"device_map": '{"": "cpu"}'},
    ],
    ids=str,
)
async def test_what_is_planned_is_what_is_held(model, reading, changes):
    config = EngineConfig(model, threads=1, **changes)
    preview = reading.preview(config)
    assert preview.error is None
    engine = create_engine(config)
    await engine.load()
    assert preview.row.weight_bytes == pytest.approx(engine.memory().weight_bytes, rel=0.01)
    await engine.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"max_context_size": 10**6},
        {"quantization": Quantization("nf5")},
        {"quantization": Quantization("int8", double_quant=True)},
        {"quantization": Quantization("int8", llm_int8_skip_modules=("nothing",))},
        {"quantization": Quantization("q4_0")},
        {"device": "cuda:7"},
        {"device": "cpu", "device_map": "auto"},
        {"device_map": "everywhere"},
        {"device_map": "{"},
        {"device_map": '{"model": "cpu"}'},
        {"device_map": json.dumps({"": "disk"})},
        {"max_memory": "cuda:7=1GiB"},
        {"max_memory": "cpu=lots"},
        {"max_memory": "cpu=0.1MiB"},
    ],
    ids=str,
)
async def test_what_a_load_refuses_is_refused_with_its_words(model, reading, changes):
    config = EngineConfig(model, **changes)
    preview = reading.preview(config)
    with pytest.raises(KaniNbError) as refused:
        await create_engine(config).load()
    assert str(preview.error) == str(refused.value)
    assert type(preview.error) is type(refused.value)
    assert preview.budgets, "the devices are drawn all the same"


def test_a_plan_that_does_not_fit_is_drawn_with_its_numbers(model, reading):
    preview = reading.preview(EngineConfig(model, max_memory="cpu=0.1MiB"))
    assert isinstance(preview.error, DoesNotFitError)
    assert preview.row.peak_bytes > preview.budgets[0].usable_bytes
    assert preview.row.weight_bytes > 0


def test_what_will_be_given_back_counts_as_free(model, reading):
    before = reading.preview(EngineConfig(model)).budgets[-1]
    after = reading.preview(EngineConfig(model), also_free={"cpu": 100 * MIB}).budgets[-1]
    assert 0 < after.usable_bytes - before.usable_bytes + 50 * MIB < 250 * MIB


@pytest.mark.parametrize(
    ("name", "changes"), [("echo", {"dtype": "float32"}), ("http://127.0.0.1:9/v1", {"device": "cpu"})]
)
def test_engines_that_hold_nothing_here_have_no_plan_and_refuse_what_they_cannot_be_told(name, changes):
    reading = read_model(EngineConfig(name))
    preview = reading.preview(EngineConfig(name))
    assert (preview.row, preview.error) == (None, None)
    assert reading.title
    if name != "echo":
        assert "cannot be chosen" in str(reading.preview(EngineConfig(name, **changes)).error)


@pytest.mark.parametrize(
    ("name", "error"), [("no-such-model", UnknownModelError), ("some/where", ModelUnavailableError)]
)
def test_a_model_that_cannot_be_had_is_refused_in_one_error(name, error, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(error):
        read_model(EngineConfig(name))


def test_every_option_of_a_load_is_looked_at():
    """A new option of %load_engine must be thought of here: does it change what a load takes?"""
    assert {option.dest for option in LOAD_OPTIONS if option.of == "engine"} == {
        *("revision", "dtype", "device", "device_map", "max_memory", "allow_offload", "offload_folder"),
        *("cache_quantized", "max_context_size", "cache_gib", "threads"),
        *("local_only", "trust_remote_code", "allow_pickle"),
    }
