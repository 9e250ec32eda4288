"""Saving gives back exactly what was loaded, or refuses: every scheme, before and after an answer; what goes wrong."""

from __future__ import annotations

import json
import resource
import warnings
from pathlib import Path

import pytest

from kani_nb import ChatMessage
from kani_nb.engines.huggingface import saving
from kani_nb.engines.sources import resolve
from kani_nb.errors import ConfigError, EngineError
from tests.conftest import make_tokenizer
from tests.engines.asking import answer, engine_of
from tests.engines.quantized import (
    OURS,
    SCHEMES,
    assert_same_tensors,
    file_of,
    four_bit,
    load,
    logits,
    make_bfloat16,
    pack,
)
from tests.sources.tiny import write_gguf

pytestmark = pytest.mark.quant


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_bfloat16(tmp_path_factory.mktemp("bfloat16"))


@pytest.mark.parametrize("scheme", [*SCHEMES, *OURS])
def test_what_is_saved_is_what_was_loaded(scheme, source, tokenizer, tmp_path):
    import torch

    fresh = load(source, scheme)
    expected_file = file_of(fresh, tmp_path / "theirs")
    expected = logits(fresh)
    for has_answered in (False, True):
        model = load(source, scheme)
        if has_answered:
            assert torch.equal(logits(model), expected)
        folder = tmp_path / f"ours-{has_answered}"
        saving.save_model(model, tokenizer, folder, source=source, reload=lambda: load(source, scheme))
        assert_same_tensors(folder, expected_file)
        assert torch.equal(logits(model), expected), "the running model answers differently now"
        again = load(folder)
        assert again.dtype == model.dtype
        if has_answered:
            assert torch.equal(logits(again), expected)
        # and once more, of a model that was loaded quantized
        saving.save_model(again, tokenizer, folder.with_suffix(".2"), source=folder, reload=lambda at=folder: load(at))
        assert_same_tensors(folder.with_suffix(".2"), expected_file)
        assert torch.equal(logits(load(folder.with_suffix(".2"))), expected)
        assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("options", [{"storage": "bfloat16"}, {"storage": "float32"}, {"compute": "float32"}])
def test_storage_and_compute_dtypes_are_given_back(options, source, tokenizer, tmp_path):
    import torch

    config = four_bit(**options)
    expected_file = file_of(load(source, "nf4", quantization_config=config), tmp_path / "theirs")
    model = load(source, "nf4", quantization_config=config)
    before = logits(model)
    saving.save_model(model, tokenizer, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", expected_file)
    assert torch.equal(logits(load(tmp_path / "ours")), before)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_scales_that_were_rounded_are_taken_from_a_fresh_copy(dtype, source, tokenizer, tmp_path):
    def fresh():
        return load(source, "nf4", dtype=dtype)

    expected = file_of(fresh(), tmp_path / "theirs")
    model, loads = pack(fresh()), []
    saving.save_model(model, tokenizer, tmp_path / "ours", reload=lambda: (loads.append(1), fresh())[1])
    assert loads
    assert_same_tensors(tmp_path / "ours", expected)


def failing():
    raise OSError("the disk was pulled out")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({}, "no source to load them from again"),
        ({"reload": failing}, "loading them again failed .OSError: the disk was pulled out"),
        ({"weights_changed": True}, "they were changed since"),
    ],
)
def test_double_quantized_scales_that_are_gone_are_refused_and_nothing_is_written(
    options, why, source, tokenizer, tmp_path
):
    model = pack(load(source, "nf4 + double quant"))
    with pytest.raises(EngineError, match=why) as caught:
        saving.save_model(model, tokenizer, tmp_path / "deep" / "ours", **options)
    assert "model.layers.0.self_attn.q_proj.weight" in str(caught.value)
    assert "expanded and rounded" in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_a_fresh_copy_that_is_another_model_is_refused(source, tokenizer, tmp_path):
    model = pack(load(source, "nf4 + double quant"))
    for other in (lambda: load(source, "fp4 + double quant"), lambda: pack(load(source, "nf4 + double quant"))):
        with pytest.raises(EngineError, match="what was loaded again is not the same"):
            saving.save_model(model, tokenizer, tmp_path / "ours", reload=other)


def test_changed_weights_are_saved_as_they_are_now(source, tokenizer, tmp_path):
    import torch

    for scheme in ("bfloat16", "int8", "nf4"):
        model = load(source, scheme)
        logits(model)
        model.model.norm.weight.data.mul_(1.5)
        changed = logits(model)
        folder = tmp_path / scheme
        saving.save_model(model, tokenizer, folder, source=source, reload=failing, weights_changed=True)
        assert torch.equal(logits(load(folder)), changed)


def test_adapters_are_refused_with_the_way_to_save_them(source, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(source, "nf4")
    with warnings.catch_warnings(action="ignore"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(EngineError, match=r"(?s)adapters .*merge_and_unload"):
        saving.save_model(model, tokenizer, tmp_path / "ours", source=source, weights_changed=True)


def test_half_precision_weights_under_int8_are_refused(source, tokenizer, tmp_path):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_has_fp16_weight=True)
    model = load(source, "int8", quantization_config=config)
    with pytest.raises(EngineError, match="llm_int8_has_fp16_weight"):
        saving.save_model(model, tokenizer, tmp_path / "ours")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_mixture_of_experts_keeps_the_names_of_its_checkpoint(kind, tokenizer, tmp_path):
    import torch
    from safetensors import safe_open
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
    config = MixtralConfig(hidden_size=64, intermediate_size=128, num_local_experts=4, initializer_range=0.3, **sizes)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source", kind)
    expected = logits(model)
    saving.save_model(model, tokenizer, tmp_path / "first")
    saving.save_model(load(tmp_path / "first"), tokenizer, tmp_path / "second")
    for folder in (tmp_path / "first", tmp_path / "second"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in file.keys()  # noqa: SIM118 - no mapping
        assert torch.equal(logits(load(folder)), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_weights_of_another_library_are_copied_from_their_files(source, tokenizer, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        weights[name] = tensor
        if name.endswith("proj.weight"):  # four ternary weights in a byte: 0 is -1, 85 is 0
            weights[name] = torch.full((tensor.shape[0] // 4, tensor.shape[1]), 85, dtype=torch.uint8)
            weights[f"{name}_scale"] = torch.ones(1)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file(weights, theirs / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitnet", "quantization_mode": "offline"}
    (theirs / "config.json").write_text(json.dumps(config))
    model = load(theirs)
    with pytest.raises(EngineError, match=r"bitnet are saved by copying .*where it came from is not known"):
        saving.save_model(model, tokenizer, tmp_path / "ours")
    saving.save_model(model, tokenizer, tmp_path / "ours", source=theirs)
    assert_same_tensors(tmp_path / "ours", weights)
    assert load(tmp_path / "ours").config.quantization_config.quant_method == "bitnet"


def test_a_model_partly_on_the_disk_is_saved_whole(source, tokenizer, tmp_path):
    expected = file_of(load(source, "bfloat16"), tmp_path / "theirs")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load(source, "bfloat16", device_map=places, offload_folder=tmp_path / "offload")
    before = logits(model)
    saving.save_model(model, tokenizer, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", expected)
    assert bool((logits(model) == before).all())


async def test_a_gguf_file_becomes_a_folder_that_can_be_quantized(tmp_path):
    import torch
    import transformers

    if not hasattr(transformers, "GgufConfig"):
        pytest.skip(f"transformers {transformers.__version__} cannot read the tokenizer of the test's GGUF")
    engine = engine_of(write_gguf(tmp_path / "model.gguf"), dtype="bfloat16")
    await engine.load()
    folder = await engine.save(tmp_path / "ours")
    assert torch.equal(logits(load(folder)), logits(engine.model))
    await engine.close()
    assert logits(load(folder, "nf4")).isfinite().all()


def test_settings_that_contradict_each_other_are_kept(source, tokenizer, tmp_path):
    model = load(source)
    model.generation_config.temperature = 0.6  # without sampling: transformers refuses to write that
    model.generation_config.do_sample = False
    kept = model.generation_config
    saving.save_model(model, tokenizer, tmp_path / "ours")
    assert model.generation_config is kept
    written = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert (written["temperature"], written["do_sample"]) == (0.6, False)
    with warnings.catch_warnings(action="ignore"):
        assert load(tmp_path / "ours").generation_config.temperature == 0.6


def test_the_running_model_keeps_its_configuration(source, tokenizer, tmp_path):
    model = load(source, "nf4")
    before = {name: repr(value) for name, value in vars(model.config).items()}
    attributes = set(vars(model)) | {name for module in model.modules() for name in vars(module)}
    saving.save_model(model, tokenizer, tmp_path / "ours")
    assert {name: repr(value) for name, value in vars(model.config).items()} == before
    assert set(vars(model)) | {name for module in model.modules() for name in vars(module)} == attributes


def test_the_folder_says_what_it_was_made_from(source, tokenizer, tmp_path):
    folder = saving.save_model(load(source, "nf4"), tokenizer, tmp_path / "ours", source=source)
    stamp = json.loads((folder / "kani_nb.json").read_text())
    assert stamp["origin"] == f"{source}, quantized to nf4"
    assert (stamp["scheme"], stamp["dtype"]) == ("nf4", "bfloat16")
    assert stamp["versions"]["bitsandbytes"]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= stamp["files"].keys()
    assert resolve(str(folder)).origin == f"folder {folder}, from {source}, quantized to nf4"
    again = saving.save_model(load(folder), tokenizer, tmp_path / "again", source=folder)
    assert json.loads((again / "kani_nb.json").read_text())["origin"] == stamp["origin"]


@pytest.mark.parametrize("kind", ["folder", "file", "unwritable"])
def test_a_place_that_is_taken_is_refused_with_what_is_there(kind, source, tokenizer, tmp_path):
    place, says = tmp_path / "place", ""
    if kind == "folder":
        (place / "deep").mkdir(parents=True)
        (place / "notes.txt").write_text("mine")
        says = rf"is not empty: it holds deep/, notes.txt, and nothing is overwritten\n→ .*{place}-2"
    elif kind == "file":
        place.write_text("mine")
        says = "is a file"
    else:
        place = Path("/proc/kani_nb")
        says = "cannot be written"
    with pytest.raises(ConfigError, match=says):
        saving.save_model(load(source), tokenizer, place)
    assert kind != "folder" or (place / "notes.txt").read_text() == "mine"
    assert kind != "file" or place.read_text() == "mine"


@pytest.fixture
def small_files():
    """Files may not grow past 100 kB: what a full disk says, without one."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_full_disk_leaves_nothing(is_there, source, tokenizer, tmp_path, small_files):
    folder = tmp_path / "deep" / "ours"
    if is_there:
        folder.mkdir(parents=True)
    with pytest.raises(EngineError, match=r"(?s)the disk of .*ours is full.*free are now|free now"):
        saving.save_model(load(source), tokenizer, folder)
    assert list(tmp_path.rglob("*")) == ([tmp_path / "deep", folder] if is_there else [])


def test_too_little_space_is_said_before_anything_is_written(source, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("kani_nb.engines.staging.free_bytes", lambda folder: 1000)
    with pytest.raises(EngineError, match=r"needs .* kB: 1.0 kB are free"):
        saving.save_model(load(source), tokenizer, tmp_path / "ours")
    assert not any(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_and_the_model_answers_on(source, tokenizer, tmp_path, monkeypatch):
    import torch

    model = load(source, "nf4")
    before = logits(model)

    def interrupted(folder):
        assert (Path(folder) / "model.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saving.save_model(model, tokenizer, tmp_path / "ours")
    assert not any(tmp_path.iterdir())
    assert torch.equal(logits(model), before)


async def test_an_engine_saves_and_the_folder_loads_without_any_argument(source, tmp_path):
    prompt = [ChatMessage.user("the quick brown fox")]
    engine = engine_of(source, dtype="bfloat16", quantization="nf4", double_quant=True)
    expected = (await answer(engine, prompt)).message.text
    folder = await engine.save(tmp_path / "ours")
    assert (await answer(engine, prompt)).message.text == expected
    await engine.close()
    again = engine_of(folder, dtype="auto")
    assert (await answer(again, prompt)).message.text == expected
    await again.close()


@pytest.mark.quant
@pytest.mark.timeout(600)
@pytest.mark.parametrize("scheme", [*SCHEMES, *OURS])
async def test_a_real_model_answers_from_its_folder_as_before(scheme, smollm2, tmp_path):
    import torch

    prompt = [ChatMessage.user("What is the capital of France?")]
    name, _, nested = scheme.partition(" ")
    options = {"dtype": name} if name in ("float32", "bfloat16") else {"dtype": "bfloat16", "quantization": name}
    engine = engine_of(smollm2, **options, **({"double_quant": True} if nested else {}))
    text = (await answer(engine, prompt)).message.text
    assert "Paris" in text
    expected = logits(engine.model)
    folder = await engine.save(tmp_path / "ours")
    assert torch.equal(logits(engine.model), expected)
    await engine.close()
    again = engine_of(folder, dtype="auto")
    await again.load()
    assert torch.equal(logits(again.model), expected)
    assert (await answer(again, prompt)).message.text == text
    await again.close()


async def test_a_model_that_is_tried_at_its_load_is_saved_as_its_files_have_it(tmp_path):
    """One that is not plain attention is run when it is loaded; the copy that is saved of it is not."""
    import torch
    from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Lfm2Config(
        **sizes,
        vocab_size=400,
        num_key_value_heads=2,
        max_position_embeddings=256,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Lfm2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "hybrid")
    make_tokenizer().save_pretrained(tmp_path / "hybrid")
    engine = engine_of(tmp_path / "hybrid", dtype="bfloat16", quantization="nf4", double_quant=True)
    await engine.load()
    folder = await engine.save(tmp_path / "ours")
    fresh = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hybrid", quantization_config=four_bit(double_quant=True), dtype="bfloat16"
    )
    assert_same_tensors(folder, file_of(fresh, tmp_path / "theirs"))
    await engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_a_gpu_what_is_saved_is_what_was_loaded(scheme, source, tokenizer, tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    expected_file = file_of(load(source, scheme, device_map="cuda:0"), tmp_path / "theirs")
    model = load(source, scheme, device_map="cuda:0")
    before = logits(model)
    saving.save_model(model, tokenizer, tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", expected_file)
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(load(tmp_path / "ours", device_map="cuda:0")), before)
