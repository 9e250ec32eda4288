"""What is refused before a byte is loaded, with the numbers; and what is decided, where nothing is refused."""

import logging
import re

import pytest
import torch

from kani_nb import ChatMessage, HuggingEngine
from kani_nb.engines.huggingface.placing import choose_placing
from kani_nb.errors import ConfigError, DoesNotFitError, KaniNbError, MissingDependencyError
from kani_nb.hardware.plans import Budget
from tests.conftest import make_model
from tests.engines.asking import answer, engine_of


def placing_of(folder, **arguments):
    engine = HuggingEngine(str(folder), **arguments)
    return choose_placing(engine._prepared.request(), engine._prepared.config())


def with_devices(monkeypatch, *devices):
    import kani_nb.hardware.budgets as budgets

    monkeypatch.setattr(budgets, "budgets_here", lambda *_, **__: devices)


def card(gib=16, capability=(8, 0), name="cuda:0"):
    size = int(gib * 2**30)
    return Budget(name=name, description="a card", total_bytes=size, usable_bytes=size, compute_capability=capability)


CPU = Budget(name="cpu", description="a CPU", total_bytes=2**34, usable_bytes=2**34)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"quantization": "nf44"}, "there is no quantization scheme 'nf44'\n→ did you mean nf4"),
        ({"quantization": "int8", "double_quant": True}, "double_quant=True was given with the scheme int8"),
        ({"quantization": "q4_k_m"}, "q4_k_m is a type of GGUF files"),
        ({"dtype": "bfloat17"}, "dtype is 'bfloat17': it must be one of auto, float32"),
        ({"quantization": "nf4", "compute_dtype": "fp8"}, "compute_dtype is 'fp8'"),
        ({"device": "cuda:7"}, "there is no device 'cuda:7' here: torch sees"),
        ({"device": "cpu", "device_map": "auto"}, "device='cpu' and device_map='auto' exclude each other"),
        ({"device_map": {"": "cuda:3"}}, "cuda:3"),
        ({"device_map": {"model.layer": "cpu"}}, "the device map names 'model.layer'"),
        ({"device_map": {"model": "cpu"}}, "the device map has no place for lm_head"),
        ({"max_memory": "cpu=10XB"}, "10XB"),
        ({"max_memory": {"cuda:5": "1GiB"}}, "max_memory names cuda:5"),
        (
            {"quantization": "int8", "llm_int8_skip_modules": ["mlp"]},
            "llm_int8_skip_modules names 'mlp': no module",
        ),
        ({"quantization": "nf4", "temprature": 1}, "unknown generation parameter 'temprature'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_short_error(tiny_model, arguments, said):
    with pytest.raises(ConfigError) as caught:
        placing_of(tiny_model, **arguments)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3


def test_what_does_not_fit_is_refused_with_the_numbers_and_two_remedies(smollm2):
    with pytest.raises(DoesNotFitError) as caught:
        placing_of(smollm2, max_memory={"cpu": "250MB"}, dtype="bfloat16")
    text = str(caught.value)
    assert re.search(r"in bfloat16 does not fit: it needs \d+ MiB, and cpu has 238 MiB", text), text
    assert "257 MiB of weights, 45 MiB of KV cache at 2,048 tokens" in text
    assert "--quant" in text
    assert "--allow-offload" in text


@pytest.mark.slow
async def test_a_model_that_does_not_fit_runs_from_the_disk_when_asked_to_and_says_so(smollm2, caplog):
    whole = engine_of(smollm2)
    asked = [ChatMessage.user("What is the capital of France?")]
    expected = (await answer(whole, asked, max_new_tokens=4)).message.text
    await whole.close()
    engine = engine_of(smollm2, max_memory={"cpu": "400MB"}, max_context_size=256, allow_offload=True)
    assert (await answer(engine, asked, max_new_tokens=4)).message.text == expected
    shares = engine.memory().shares
    assert shares["disk"] + shares["cpu"] == engine.memory().weight_bytes
    assert 0 < engine.memory().placement["disk"] < 1
    assert "meta device" not in caplog.text
    await engine.close()


@pytest.mark.parametrize(
    "device_map",
    [{"": "disk", "model.embed_tokens": "cpu"}, {"model.layers": "disk", "": "cpu"}, {"": "cpu", "lm_head": "disk"}],
)
async def test_what_a_map_puts_on_the_disk_answers_from_there(tmp_path, device_map):
    asked = [ChatMessage.user("the quick brown fox")]
    folder = make_model(tmp_path, tie_word_embeddings=True)
    plain, engine = engine_of(folder), engine_of(folder, device_map=device_map)
    assert (await answer(engine, asked)).message.text == (await answer(plain, asked)).message.text
    assert engine.memory().weight_bytes == engine.details()["planned_weight_bytes"] == plain.memory().weight_bytes
    for each in (plain, engine):
        await each.close()


def test_a_map_that_keeps_nothing_in_memory_is_refused_with_one_that_does(tiny_model):
    with pytest.raises(ConfigError, match=r"""as a whole.*\n→ .*'\{"": "disk", "model.embed_tokens": "cpu"\}'"""):
        placing_of(tiny_model, device_map={"": "disk"})


def test_an_offload_folder_that_cannot_be_written_to_or_is_too_small_is_refused(smollm2, tmp_path, monkeypatch):
    import shutil

    few = {"max_memory": {"cpu": "400MB"}, "allow_offload": True, "dtype": "float32"}
    with pytest.raises(ConfigError, match=r"the offload folder /proc/offload cannot be written to"):
        placing_of(smollm2, offload_folder="/proc/offload", **few)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=10**6))
    with pytest.raises(ConfigError, match=r"has 977 KiB free: \d+ MiB of weights would be kept there"):
        placing_of(smollm2, offload_folder=str(tmp_path), **few)


def test_a_card_without_bfloat16_takes_float16_and_says_so(smollm2, monkeypatch):
    with_devices(monkeypatch, card(capability=(7, 5)), CPU)
    placing = placing_of(smollm2, quantization="nf4", compute_dtype="bfloat16")
    assert (placing.device, placing.dtype, placing.quantization.compute_dtype) == ("cuda:0", "float16", "float16")
    assert any("7.5 has no bfloat16" in note and "float16 is taken" in note for note in placing.notes)
    assert placing.quantization_config.bnb_4bit_compute_dtype == torch.float16
    with_devices(monkeypatch, card(capability=(8, 0)), CPU)
    assert placing_of(smollm2, quantization="nf4").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("scheme", "devices", "arguments", "said"),
    [
        ("int8", (card(capability=(6, 1)), CPU), {}, r"int8 needs compute capability 7\.5, and a card has 6\.1"),
        ("cpu-int8", (card(), CPU), {"device": "cuda:0"}, r"cpu-int8 runs on .*only, and cuda:0 is"),
    ],
)
def test_a_scheme_that_the_device_cannot_run_names_one_that_it_can(
    tiny_model, monkeypatch, scheme, devices, arguments, said
):
    with_devices(monkeypatch, *devices)
    with pytest.raises(ConfigError, match=said) as caught:
        placing_of(tiny_model, quantization=scheme, **arguments)
    assert "--quant" in caught.value.fix


def test_a_cpu_scheme_goes_to_the_cpu_where_there_is_a_card(tiny_model, monkeypatch):
    with_devices(monkeypatch, card(), CPU)
    assert placing_of(tiny_model, quantization="cpu-int8").device == "cpu"
    assert placing_of(tiny_model).device == "cuda:0"


def test_two_cards_share_what_one_cannot_hold(smollm2, monkeypatch):
    with_devices(monkeypatch, card(0.2), card(0.2, name="cuda:1"), CPU)
    placing = placing_of(smollm2, dtype="bfloat16")
    assert set(placing.device_map.values()) == {"cuda:0", "cuda:1"}
    with_devices(monkeypatch, card(0.2), CPU)
    with pytest.raises(DoesNotFitError):
        placing_of(smollm2, dtype="bfloat16")


async def test_a_quantized_checkpoint_is_never_quantized_again(tmp_path, tiny_model):
    engine = engine_of(tiny_model, quantization="int8", dtype="bfloat16")
    await engine.load()
    folder = await engine.save(tmp_path / "int8")
    await engine.close()
    for again in ("nf4", "cpu-int8"):
        with pytest.raises(ConfigError, match=rf"is quantized already, with int8: it cannot .* with {again}"):
            placing_of(folder, quantization=again)
    for same in ({}, {"quantization": "int8"}, {"load_in_8bit": True}):
        placing = placing_of(folder, **same)
        assert placing.is_prequantized
        assert (placing.quantization.scheme, placing.quantization_config) == ("int8", None)


def test_a_quantized_folder_whose_package_is_missing_names_it(tmp_path):
    import json

    folder = make_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "aqlm", "in_group_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MissingDependencyError, match=r"quantized with aqlm: aqlm is not installed\n→ %pip install"):
        placing_of(folder)


def test_an_unknown_architecture_is_named_with_what_to_do(tmp_path):
    import json

    folder = make_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llama9", "architectures": ["Llama9ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(KaniNbError, match=r"(?s)llama9.*→ %pip install -U transformers"):
        placing_of(folder)


async def test_layers_of_odd_shapes_run_in_four_bits_by_the_general_product(tmp_path):
    """bitsandbytes' packed product asserts on such shapes, in the middle of the first answer."""
    folder = make_model(tmp_path, hidden_size=48, intermediate_size=100, head_dim=12)
    for scheme in ("nf4", "fp4"):
        engine = engine_of(folder, quantization=scheme, double_quant=True, dtype="bfloat16")
        assert (await answer(engine, [ChatMessage.user("the quick brown fox")])).completion_tokens
        notes = engine.details()["notes"]
        assert "layers have shapes that" in notes
        assert notes.count("general") == 1
        await engine.close()


async def test_eight_bits_do_not_fill_the_log(tiny_model, caplog):
    engine = engine_of(tiny_model, quantization="int8", dtype="bfloat16")
    with caplog.at_level(logging.WARNING):
        assert (await answer(engine, [ChatMessage.user("Hello")])).completion_tokens
    assert not [each for each in caplog.records if each.name.startswith("bitsandbytes")]
    await engine.close()


async def test_the_engine_says_what_it_holds_its_weights_in(tiny_model):
    engine = engine_of(tiny_model, quantization="nf4", double_quant=True, dtype="bfloat16")
    await engine.load()
    details = engine.details()
    assert details["quantization"] == "nf4 + double quant"
    assert details["planned_weight_bytes"] == engine.memory().weight_bytes
    assert "nf4 + double quant on cpu" in repr(engine)
    await engine.close()


async def test_a_quantized_copy_is_made_once_and_then_taken(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = [ChatMessage.user("the quick brown fox")]
    said = []
    for cache_quantized in (False, True, True):
        engine = engine_of(tiny_model, quantization="nf4", dtype="bfloat16", cache_quantized=cache_quantized)
        said.append((await answer(engine, asked)).message.text)
        notes = engine.details()["notes"]
        await engine.close()
        said.append(notes.partition(" in ")[0])
    assert said[0] == said[2] == said[4]
    assert said[3::2] == ["a quantized copy is kept", "from the quantized copy"]
