"""From a model's name to its plan: what is read of a line, and what is read of a model."""

from __future__ import annotations

import threading

import pytest

from kani_nb.config import parse_config
from kani_nb.engines.registry import create_engine
from kani_nb.errors import ConfigError, ModelUnavailableError
from kani_nb.planning import plan_model, read_schemes, request_from_args
from kani_nb.quantization import Quantization


def test_schemes_are_read_with_their_settings():
    assert read_schemes("none, int8,nf4+dq ,cpu-int4+g32,NF4+double-quant") == (
        Quantization(),
        Quantization("int8"),
        Quantization("nf4", double_quant=True),
        Quantization("cpu-int4", group_size=32),
    )
    assert read_schemes("4bit") == (Quantization("nf4"),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nf5", "no quantization scheme 'nf5'"),
        ("int8+dq", "double_quant=True was given with the scheme int8"),
        ("nf4+g99", "group_size is 99"),
        ("nf4+loud", "'loud' in the scheme 'nf4\\+loud' is no setting"),
        (" , ", "--schemes is"),
    ],
)
def test_schemes_that_there_are_not_are_refused(text, said):
    with pytest.raises(ConfigError, match=said):
        read_schemes(text)


def test_what_is_not_said_is_left_to_the_planner():
    request = request_from_args({"model": "m", "context": None, "schemes": None, "unknown": 1})
    assert request.arguments == {
        "model": "m",
        "context": None,
        "cards": None,
        "quantizations": None,
        "dtype": "auto",
        "kv_bits": None,
        "max_memory": None,
        "revision": None,
    }


def test_a_folder_is_planned_from_its_configuration_alone(tiny_model, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    plan = plan_model(str(tmp_path), context=128, cards="T4", quantizations=read_schemes("none"), dtype="float16")
    assert (plan.context_tokens, plan.architecture) == (128, "LlamaForCausalLM")
    (row,) = plan.rows
    from safetensors import safe_open

    with safe_open(tiny_model / "model.safetensors", "pt") as weights:
        stored = sum(weights.get_slice(name).get_shape()[0] * _inner(weights, name) for name in weights.keys())  # noqa: SIM118
    assert plan.parameters == stored
    assert row.fits
    # Two layers of two heads for keys and two for values of 16 numbers, in two bytes.
    assert row.kv_bytes_per_token == 2 * (2 + 2) * 16 * 2


def _inner(weights, name):
    shape = weights.get_slice(name).get_shape()
    return shape[1] if len(shape) > 1 else 1


def test_the_embedded_model_is_planned_offline_for_this_machine(smollm2, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = []
    plan = plan_model("smollm2", context=512, max_memory="cpu=200MiB", progress=lambda event: said.append(event.stage))
    assert plan.row("none").weight_bytes == pytest.approx(269_060_000, rel=0.001)
    assert {each.name for each in plan.budgets} >= {"cpu"}
    assert plan.row("nf4").ceiling_tokens_per_s > 0
    assert said
    if plan.kind == "cpu":
        assert (plan.row("none").fits, plan.row("nf4").fits) == (False, True)


def test_a_quantized_cache_takes_less_and_the_line_says_nothing_of_it(smollm2):
    full, four = (
        plan_model("smollm2", context=8192, cards="T4", quantizations=read_schemes("none"), kv_bits=bits).rows[0]
        for bits in (None, 4)
    )
    assert four.kv_bytes < full.kv_bytes / 2
    assert four.weight_bytes == full.weight_bytes


def test_planning_ends_when_it_is_asked_to():
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(ModelUnavailableError, match="planning smollm2 was interrupted"):
        plan_model("smollm2", cancelled=cancelled)


@pytest.mark.parametrize("model", ["echo", "openai:gpt-4o", "http://127.0.0.1:1/v1"])
def test_what_has_no_weights_here_is_not_planned(model):
    with pytest.raises(ConfigError, match="holds no weights here"):
        plan_model(model)


@pytest.mark.parametrize("context", [None, 512])
def test_the_plan_of_a_gguf_is_its_own_type_and_its_line_loads(smollm2, monkeypatch, context):
    pytest.importorskip("llama_cpp", reason="the llamacpp extra is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    plan = plan_model("llamacpp:smollm2", context=context)
    (row,) = plan.rows
    assert plan.best is row
    assert (row.label, row.settings.scheme, row.weight_bytes) == ("q4_1", "q4_1", 98_362_432)
    # 30 layers of three heads for keys and three for values of 64 numbers, in two bytes; reserved for a whole context.
    assert row.kv_bytes == 30 * (3 + 3) * 64 * 2 * (context or 8192)
    assert row.peak_bytes == sum(share.peak_bytes for share in row.shares)
    engine = create_engine(parse_config(row.line))
    assert type(engine).__name__ == "LlamaCppEngine"
    assert engine.generation is not None


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"quantizations": (Quantization("int8"),)}, "--schemes was given for llamacpp:smollm2"),
        ({"dtype": "float16"}, "--dtype was given"),
        ({"max_memory": "cpu=1GiB"}, "--max-memory was given"),
    ],
)
def test_what_llama_cpp_cannot_be_told_is_not_planned(asked, said):
    with pytest.raises(ConfigError, match=rf"{said}(.|\n)*%engine plan smollm2"):
        plan_model("llamacpp:smollm2", **asked)


def test_a_gguf_of_the_hub_is_not_planned_before_it_is_here():
    with pytest.raises(ConfigError, match=r"is not known before it is here(.|\n)*%engine plan org/model"):
        plan_model("llamacpp:org/model:Q4_K_M")
