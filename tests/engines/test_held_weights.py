"""What a checkpoint is held in already is read from its configuration, mended where it would mislead, and said."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from dataclasses import replace

import pytest
import torch

from kani_nb import ChatMessage, HuggingEngine
from kani_nb.engines.huggingface.placing import choose_placing
from kani_nb.errors import ConfigError, DoesNotFitError, EngineError
from kani_nb.hardware.plans import Budget
from tests.conftest import make_model
from tests.engines.asking import answer, engine_of
from tests.engines.test_placing import CPU, card, placing_of, with_devices


@pytest.fixture(scope="module")
def int8_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")

    async def save():
        engine = engine_of(make_model(folder / "plain"), dtype="bfloat16", quantization="int8")
        await engine.load()
        await engine.save(folder / "int8")
        await engine.close()

    asyncio.run(save())
    return folder / "int8"


def with_config(folder, target, **changes):
    """A copy of a folder whose `quantization_config` is changed; None takes a key away."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    config = json.loads(path.read_text())
    kept = config["quantization_config"] | changes
    config["quantization_config"] = {name: value for name, value in kept.items() if value is not None}
    path.write_text(json.dumps(config))
    return target


@pytest.mark.quant
@pytest.mark.parametrize("changes", [{"llm_int8_enable_fp32_cpu_offload": True}, {"quant_method": None}])
async def test_a_checkpoint_that_would_load_wrong_or_not_at_all_answers_like_the_plain_one(
    int8_folder, tmp_path, changes
):
    asked = [ChatMessage.user("the quick brown fox")]
    plain = HuggingEngine(str(int8_folder), threads=1)
    expected = (await answer(plain, asked)).message.text
    engine = HuggingEngine(str(with_config(int8_folder, tmp_path / "changed", **changes)), threads=1)
    assert (await answer(engine, asked)).message.text == expected
    assert type(engine.model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    assert engine.details()["quantization"] == "int8"
    assert engine.details()["planned_weight_bytes"] == engine.memory().weight_bytes
    await plain.close()
    await engine.close()


@pytest.mark.quant
def test_saying_what_the_checkpoint_has_anyway_is_no_contradiction(int8_folder):
    for said in ({}, {"llm_int8_threshold": 6.0}):
        assert placing_of(int8_folder, quantization="int8", **said).quantization.scheme == "int8"
    with pytest.raises(ConfigError, match=r"is quantized already, with int8: it cannot be quantized again, with int8"):
        placing_of(int8_folder, quantization="int8", llm_int8_threshold=3.0)


@pytest.mark.quant
def test_a_bitsandbytes_checkpoint_is_not_put_on_a_card_and_the_cpu_together(int8_folder, monkeypatch):
    monkeypatch.setattr("kani_nb.hardware.bitsandbytes_check.check_bitsandbytes", lambda _="": None)
    with_devices(monkeypatch, card(), CPU)
    split = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ConfigError, match=r"is quantized already, and cannot be put on cpu and cuda:0"):
        placing_of(int8_folder, device_map=split)
    with_devices(monkeypatch, replace(card(), usable_bytes=2**17), CPU)
    with pytest.raises(DoesNotFitError) as refused:
        placing_of(int8_folder)
    assert "--allow-offload" not in str(refused.value)


@pytest.mark.parametrize(
    ("own", "label"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "none"),  # a CPU expands it
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "none"),
    ],
)
def test_what_another_method_is_held_in_is_said(tiny_model, monkeypatch, own, label):
    from kani_nb.engines.huggingface import held_weights
    from kani_nb.hardware import plan_rows

    for each in (held_weights, plan_rows):
        monkeypatch.setattr(each, "check_checkpoint_packages", lambda *_: None)
    engine = HuggingEngine(str(tiny_model))
    config = engine._prepared.config()
    config.quantization_config = own
    placing = choose_placing(engine._prepared.request(), config)
    assert placing.is_prequantized
    assert placing.label == label
    assert placing.quantization_config is None


def test_a_quantization_that_stands_in_the_text_configuration_counts(tiny_model):
    engine = HuggingEngine(str(tiny_model), quantization="nf4")
    text = engine._prepared.config()
    text.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}

    class Outer(type(text)):
        def get_text_config(self, **_):
            return text

    with pytest.raises(ConfigError, match="is quantized already, with int8"):
        choose_placing(engine._prepared.request(), Outer(vocab_size=text.vocab_size))


def test_a_class_of_ones_own_changes_nothing_of_what_is_refused(tiny_model):
    from transformers import LlamaForCausalLM

    with pytest.raises(DoesNotFitError):
        placing_of(tiny_model, model_cls=LlamaForCausalLM, max_memory="cpu=100KB")
    with pytest.raises(ConfigError, match=r"names 'model.nope', which is no module"):
        placing_of(tiny_model, model_cls=LlamaForCausalLM, device_map={"model.nope": "cpu"})

    class Unbuildable(LlamaForCausalLM):
        def __init__(self, *args, **options):
            raise RuntimeError("only with weights")

    assert placing_of(tiny_model, model_cls=Unbuildable).row is None
    with pytest.raises(ConfigError, match=r"max_memory and device maps cannot be kept with .*its parts are not known"):
        placing_of(tiny_model, model_cls=Unbuildable, max_memory="cpu=5GiB")


def test_a_checkpoint_that_does_not_name_its_dtype_is_quantized_all_the_same(tmp_path):
    from safetensors.torch import load_file

    folder = make_model(tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    placing = placing_of(folder, quantization="nf4", allow_pickle=True)
    assert placing.dtype == "bfloat16"
    assert any("does not say in what dtype it is" in note for note in placing.notes)


def test_cards_of_different_kinds_compute_in_what_all_of_them_have(tiny_model, monkeypatch):
    monkeypatch.setattr("kani_nb.hardware.bitsandbytes_check.check_bitsandbytes", lambda _="": None)
    a100, t4 = card(), card(capability=(7, 5), name="cuda:1")
    with_devices(monkeypatch, a100, t4, CPU)
    told = {"model.embed_tokens": 0, "model.layers.0": 0, "model": 1, "lm_head": 1}
    for device_map in ("balanced", told):
        placing = placing_of(
            tiny_model, device_map=device_map, dtype="bfloat16", quantization="nf4", compute_dtype="bfloat16"
        )
        assert placing.dtype == placing.row.dtype == placing.quantization.compute_dtype == "float16"
    volta = Budget(name="cuda:1", description="old", total_bytes=2**34, usable_bytes=2**34, compute_capability=(3, 5))
    with_devices(monkeypatch, a100, volta, CPU)
    with pytest.raises(ConfigError, match=r"cannot run here in nf4: nf4 needs compute capability 6.0"):
        placing_of(tiny_model, device_map="balanced", quantization="nf4")


def test_the_input_goes_where_the_embedding_is_in_whatever_order_a_map_is_written(tiny_model, monkeypatch):
    with_devices(monkeypatch, card(), CPU)
    for device_map in ({"lm_head": "cpu", "model": 0}, {"model": 0, "lm_head": "cpu"}):
        assert placing_of(tiny_model, device_map=device_map).device == "cuda:0"


def test_parts_that_stay_unquantized_are_neither_saved_nor_kept_as_a_copy(tiny_model, monkeypatch):
    from kani_nb.engines.huggingface.loading import _why_no_copy
    from kani_nb.engines.huggingface.saving_checks import check_savable

    monkeypatch.setattr("kani_nb.hardware.bitsandbytes_check.check_bitsandbytes", lambda _="": None)
    with_devices(monkeypatch, card(), CPU)
    engine = HuggingEngine(
        str(tiny_model), quantization="nf4", cache_quantized=True, device_map={"model": 0, "lm_head": "cpu"}
    )
    placing = choose_placing(engine._prepared.request(), engine._prepared.config())
    assert placing.quantization_config.llm_int8_enable_fp32_cpu_offload
    assert "no quantized copy is kept" in _why_no_copy(engine._prepared.request(), placing)

    class Split:
        class config:  # noqa: N801 - as transformers has it
            quantization_config = placing.quantization_config

        hf_quantizer = type("Quantizer", (), {"pre_quantized": False, "is_serializable": lambda _: True})()
        hf_device_map = placing.device_map

        def modules(self):
            return []

    with pytest.raises(EngineError, match=r"nf4 weights with parts on cpu: those parts are not quantized"):
        check_savable(Split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"max_context_size": -5}, "max_context_size is -5"),
        ({"max_context_size": "2048"}, "max_context_size is '2048'"),
        ({"threads": 0}, "threads is 0"),
        ({"quantisation": "int8"}, "'quantisation'\n→ did you mean quantization or"),
        ({"threads": -2}, "threads is -2"),
        ({"cache_gib": float("nan")}, "cache_gib is nan"),
        ({"quantization": "nf4", "double_quant": "no"}, "double_quant is 'no': it must be true or false"),
        ({"quantization": "int4"}, "no quantization scheme 'int4'\n→ nf4 (bitsandbytes), or cpu-int4 on a CPU"),
        ({"model_load_kwargs": {"cache_dir": "/x"}}, "cache_dir in model_load_kwargs cannot be used"),
        ({"revision": "a", "model_load_kwargs": {"revision": "b"}}, "revision is given twice"),
        (
            {"quantization": "int8", "llm_int8_has_fp16_weight": True, "cache_quantized": True},
            "cache_quantized and llm_int8_has_fp16_weight exclude each other",
        ),
    ],
)
def test_an_argument_that_nothing_could_keep_is_refused_before_anything_is_looked_for(arguments, said):
    with pytest.raises(ConfigError) as caught:
        HuggingEngine("org/model", **arguments)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"quantization": "nf4", "load_in_4bit": True},
        {"quantization": "nf4+dq"},
        {"torch_dtype": "float16", "model_load_kwargs": {"torch_dtype": torch.float16}},
        {"model_load_kwargs": {"revision": "v1", "local_files_only": True, "trust_remote_code": True}},
    ],
)
def test_what_agrees_is_taken_in_whatever_words(arguments):
    asked = HuggingEngine("org/model", **arguments)._asked
    if "quantization" in arguments:
        assert asked.quantization.scheme == "nf4"
        assert bool(asked.quantization.double_quant) == ("dq" in arguments["quantization"])
    elif "torch_dtype" in arguments:
        assert asked.dtype == "float16"
    else:
        assert (asked.revision, asked.local_only, asked.trust_remote_code) == ("v1", True, True)
        assert not asked.model_load_kwargs


def test_a_remedy_keeps_what_else_was_asked_for(smollm2):
    with pytest.raises(DoesNotFitError) as caught:
        placing_of(smollm2, max_memory="cpu=250MiB", threads=1, local_only=True)
    line = re.search(r"%load_engine .*? takes", str(caught.value))[0]
    assert "--max-memory=cpu=250MiB" in line
    assert "--local-only" in line
    assert "--threads=1" in line
    assert "--quant=" in line
    assert "--dtype" not in line


@pytest.mark.parametrize("asked", [{}, {"quantization": "none"}])
def test_a_copy_that_would_hold_nothing_quantized_is_not_kept_and_that_is_said(tiny_model, asked):
    from kani_nb.engines.huggingface.loading import _why_no_copy

    engine = HuggingEngine(str(tiny_model), cache_quantized=True, **asked)
    placing = choose_placing(engine._prepared.request(), engine._prepared.config())
    assert _why_no_copy(engine._prepared.request(), placing).endswith("nothing is quantized while it is loaded")


def test_what_a_checkpoint_of_another_method_lacks_is_named_with_its_line(monkeypatch):
    from kani_nb.errors import MissingDependencyError
    from kani_nb.hardware import checkpoint_packages
    from kani_nb.hardware.gptq_check import needs_of

    lacking = MissingDependencyError("gptq needs gptqmodel 7 or newer", why="it is not installed", fix="pip install it")
    monkeypatch.setattr(checkpoint_packages, "needs_of", lambda _: lacking)
    with pytest.raises(MissingDependencyError) as caught:
        checkpoint_packages.check_checkpoint_packages("m", "awq")
    assert str(caught.value).startswith(
        "m is quantized with awq, which needs gptqmodel 7 or newer: it is not installed"
    )
    if (real := needs_of("gptq")) is not None:
        assert " needs " in real.what
