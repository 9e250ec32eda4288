"""Models in `cpu-int8` and `cpu-int4`, through plain transformers: loaded, saved, loaded again, and what they say."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kani_nb.errors import ConfigError
from kani_nb.hardware import packed_quantizer
from kani_nb.hardware.devices import choose_threads
from kani_nb.hardware.packed_quantizer import PackedConfig, is_packed, register
from kani_nb.hardware.schemes import find_scheme
from kani_nb.metrics.divergence import QualityTotals
from kani_nb.quantization import Quantization
from tests.conftest import make_model

pytestmark = pytest.mark.quant

SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
#: A kind of model -> its class, its sizes, and how many of its layers are packed at 8 and at 4 bits.
MODELS = {
    "llama, tied head": ("Llama", GROUPED | {"tie_word_embeddings": True}, (15, 15)),
    "llama, own head": ("Llama", GROUPED | {"tie_word_embeddings": False}, (15, 15)),
    "qwen2, biases": ("Qwen2", GROUPED, (15, 15)),
    "gemma3, sliding window": ("Gemma3", GROUPED | {"head_dim": 16, "sliding_window": 16}, (15, 15)),
    "gpt-neox, renamed head": ("GPTNeoX", SIZES, (9, 9)),
    # Fused experts stay; the gate of the shared expert has one output, which 4 bits cannot hold.
    "qwen2-moe": ("Qwen2Moe", GROUPED | {"num_experts": 4, "moe_intermediate_size": 32}, (17, 15)),
    "gpt2, convolutions": ("GPT2", {"vocab_size": 400, "n_embd": 64, "n_layer": 2, "n_head": 4}, (1, 1)),
    # It casts what enters the head to the dtype of the head's weight. The time steps' layers have 4 inputs.
    "mamba": ("Mamba", {"vocab_size": 400, "hidden_size": 64, "num_hidden_layers": 2}, (7, 5)),
}


def make(kind, folder):
    import transformers

    name, sizes, _ = MODELS[kind]
    config = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    model = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    torch.manual_seed(0)
    # No special tokens: those of a real vocabulary are not in this small one.
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes | tokens, initializer_range=0.2))
    made.to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder, bits=None, report=False, dtype="bfloat16", **settings):
    from transformers import AutoModelForCausalLM

    options = {} if bits is None else {"quantization_config": PackedConfig(bits, **settings), "dtype": dtype}
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(found.values()), found
    return model


def logits(model, length=24):
    ids = torch.arange(3, 3 + length)[None]
    with torch.inference_mode():
        return model(ids).logits.float()


def storage_bytes(model):
    tensors = (*model.parameters(), *model.buffers())
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def kinds_of(model):
    return {name: type(module).__name__ for name, module in model.named_modules() if is_packed(module)}


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("llama, tied head", 8),
        ("llama, tied head", 4),
        ("llama, own head", 8),
        ("qwen2, biases", 4),
        ("gemma3, sliding window", 4),
        ("gpt-neox, renamed head", 8),
        ("qwen2-moe", 8),
        ("qwen2-moe", 4),
        ("gpt2, convolutions", 8),
        ("mamba", 4),
    ],
)
def test_a_model_is_quantized_saved_and_loaded_again_bit_for_bit(kind, bits, tmp_path):
    source = make(kind, tmp_path / "source")
    original, model = logits(load(source)), load(source, bits)
    assert len(kinds_of(model)) == MODELS[kind][2][bits == 4]
    assert 0 < (logits(model) - original).norm() / original.norm() < (0.1 if bits == 8 else 0.8)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert kinds_of(again) == kinds_of(model)
    assert torch.equal(logits(again), logits(model))
    assert storage_bytes(again) == storage_bytes(model)


def test_a_reloaded_model_is_what_a_fresh_one_is_and_can_be_saved_again(tmp_path):
    source = make("llama, tied head", tmp_path / "source")
    load(source, 4).save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(load(source, 4)))
    again.save_pretrained(tmp_path / "copy")
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "copy"))
    assert first == second


def test_the_configuration_says_everything(tmp_path):
    source = make("llama, tied head", tmp_path / "source")
    model = load(source, 4, group_size=64, skip_modules=("down_proj",))
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert saved["quantization_config"] == {
        "quant_method": "kani_nb_packed",
        "bits": 4,
        "group_size": 64,
        "head_bits": 8,
        "skip_modules": ["down_proj"],
    }
    assert saved["tie_word_embeddings"] is False  # the head has codes of its own now
    assert load(tmp_path / "saved").config.quantization_config == PackedConfig(4, 64, ("down_proj",))
    assert not any("down_proj" in name for name in kinds_of(model))
    assert kinds_of(model)["lm_head"] == "PackedInt8Linear"
    assert kinds_of(model)["model.layers.0.mlp.up_proj"] == "PackedInt4Linear"


def test_an_embedding_tied_to_the_head_stays_as_it_was(tmp_path):
    source = make("llama, tied head", tmp_path / "source")
    plain, model = load(source), load(source, 8)
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert not model.all_tied_weights_keys
    before = logits(model)
    model.tie_weights()  # changes nothing any more
    assert torch.equal(logits(model), before)
    untouched = load(source, 8, skip_modules=["lm_head"])
    assert untouched.lm_head.weight is untouched.get_input_embeddings().weight


@pytest.mark.parametrize(("scheme", "group"), [("cpu-int8", None), ("cpu-int4", None), ("cpu-int4", 64)])
def test_a_model_holds_what_the_scheme_says_to_the_byte(tmp_path, scheme, group):
    source = make("llama, tied head", tmp_path / "source")
    chosen, settings, size = find_scheme(scheme), Quantization(scheme, group_size=group), 2
    head = find_scheme(chosen.head_scheme or scheme)
    plain = load(source)
    expected = storage_bytes(plain)
    for name, module in plain.named_modules():
        if type(module) is torch.nn.Linear:
            counted = head if name == "lm_head" else chosen
            assert module.in_features % counted.in_multiple == module.out_features % counted.out_multiple == 0
            expected += counted.linear_bytes(module.out_features, module.in_features, settings, size)
            expected -= 0 if name == "lm_head" else module.weight.nbytes  # the tied embedding stays
    assert storage_bytes(load(source, int(scheme[-1]), group_size=group)) == expected


def test_layers_that_merge_several_of_the_checkpoint_are_saved_as_they_are(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if "hrm_text" not in CONFIG_MAPPING:
        pytest.skip("this transformers has no small model of that kind")
    config = AutoConfig.for_model("hrm_text", **GROUPED)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    model = load(tmp_path / "source", 8)
    assert all(each.codes.dtype == torch.int8 for each in model.modules() if is_packed(each))
    assert "model.H_module.layers.0.self_attn.q_proj" in kinds_of(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_a_saved_model_can_be_loaded_in_another_dtype(tmp_path):
    load(make("qwen2, biases", tmp_path / "source"), 4).save_pretrained(tmp_path / "saved")
    from transformers import AutoModelForCausalLM

    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32")
    assert wide.model.layers[0].self_attn.q_proj.scale_and_zero.dtype == torch.float32
    narrow = logits(load(tmp_path / "saved"))
    assert (logits(wide) - narrow).norm() < 0.05 * narrow.norm()


def test_importing_loads_no_library_and_registering_twice_is_harmless():
    code = "import sys, kani_nb.hardware.packed_quantizer; print({'torch', 'transformers'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    register()
    first = AUTO_QUANTIZER_MAPPING["kani_nb_packed"]
    register()
    assert AUTO_QUANTIZER_MAPPING["kani_nb_packed"] is first


def test_a_reloaded_module_takes_over(tmp_path):
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    source = make("llama, own head", tmp_path / "source")
    config = PackedConfig(8)
    old = AUTO_QUANTIZER_MAPPING["kani_nb_packed"]
    fresh = importlib.reload(packed_quantizer)
    fresh.register()
    try:
        assert AUTO_QUANTIZER_MAPPING["kani_nb_packed"] is not old
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="bfloat16")
        assert len([each for each in model.modules() if fresh.is_packed(each)]) == 15
    finally:
        register()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, r"5 bits .*must be 8 or 4"),
        ({"bits": 4, "group_size": 48}, r"group_size is 48: it must be one of \(32, 64, 128, 256\)"),
        ({"bits": 8, "group_size": 64}, r"group_size is 64: 8-bit weights have one scale for each output"),
        ({"bits": 8, "zero_point": True}, r"the packed quantization has no zero_point"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        PackedConfig(**options)


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"": "cuda:0"}, "cannot be put on cuda:0"),
        ({"": 0}, "cannot be put on cuda:0"),
        ("mps", "cannot be put on mps"),
        ({"model": "cpu", "lm_head": "disk"}, "cannot be put on disk"),
    ],
)
def test_other_places_than_main_memory_are_refused(tiny_model, device_map, words):
    from transformers import AutoModelForCausalLM

    with pytest.raises(ConfigError, match=words):
        AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=PackedConfig(8), device_map=device_map)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_an_automatic_map_is_the_cpu(tiny_model, device_map):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        tiny_model, quantization_config=PackedConfig(8), device_map=device_map, dtype="bfloat16"
    )
    assert {each.device.type for each in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert len(kinds_of(model)) == 15


def test_modules_to_skip_that_are_not_there_are_refused(tiny_model):
    with pytest.raises(ConfigError, match=r"(?s)names 'mlpp', and no module is called so.*model\.layers\.0"):
        load(tiny_model, 8, skip_modules=("mlpp",))


def test_a_model_without_a_layer_that_fits_is_refused(tmp_path):
    folder = make_model(tmp_path, hidden_size=40, intermediate_size=72)
    with pytest.raises(ConfigError, match=r"no linear layer of LlamaForCausalLM can be held in 8 bits: .*shape"):
        load(folder, 8)


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TEXTS = (
    "Photosynthesis is the process by which green plants use sunlight to make food from carbon dioxide and water.",
    "In the middle of the night, the old man walked home through the snow, thinking about his wife and the long years.",
    "def softmax(x):\n    e = np.exp(x - np.max(x))\n    return e / e.sum()\n\nprint(softmax(np.array([1.0, 2.0])))\n",
)


@pytest.fixture(scope="module")
def predictions(smollm2):
    """Token ids of some texts, and what float32 predicts after each of them (log-probabilities)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = load(smollm2).float()
    asked = tokenizer.apply_chat_template(QUESTION, tokenize=False) + "The capital of France is Paris."
    return [(ids, predict(model, ids)) for ids in (tokenizer(text)["input_ids"] for text in (*TEXTS, asked))]


@torch.inference_mode()
def predict(model, ids):
    return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def quality_of(model, predictions):
    totals = QualityTotals()
    for ids, reference in predictions:
        totals.add(ids, predict(model, ids), reference)
    return totals.quality


def answer(model, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        said = model.generate(**asked, max_new_tokens=10, do_sample=False)
    return tokenizer.decode(said[0][asked["input_ids"].shape[1] :])


@pytest.mark.parametrize(("bits", "most_kl", "least_top1"), [(8, 0.01, 0.9), (4, 0.01, 0.9)])
def test_smollm2_answers_and_stays_near_float32(smollm2, predictions, bits, most_kl, least_top1):
    model = load(smollm2, bits)
    assert {each.product for each in model.modules() if is_packed(each)} == {"packed"}
    assert "Paris" in answer(model, smollm2)
    quality = quality_of(model, predictions)
    assert 0 < quality.kl_nats < most_kl
    assert quality.top1_agreement > least_top1


@pytest.mark.quant
@pytest.mark.parametrize("settings", [{"bits": 8}, {"bits": 4}, {"bits": 4, "group_size": 64}], ids=str)
def test_smollm2_comes_back_from_its_folder_as_it_was(smollm2, predictions, settings, tmp_path):
    model = load(smollm2, **settings)
    before = [predict(model, ids) for ids, _ in predictions]
    assert "Paris" in answer(model, smollm2)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert storage_bytes(again) == storage_bytes(model)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 0 < size - storage_bytes(model) < 100_000  # names and shapes
    for (ids, _), expected in zip(predictions, before, strict=True):
        assert torch.equal(predict(again, ids), expected)
    # Other groups than those its checkpoint was once rounded to cost more: .21 was measured on longer texts.
    assert quality_of(again, predictions).kl_nats < (0.35 if "group_size" in settings else 0.01)


@pytest.mark.quant
def test_fitted_lines_and_an_eight_bit_head_pay_on_smollm2(smollm2, predictions, monkeypatch):
    from kani_nb.hardware import packed_codes

    fitted = quality_of(load(smollm2, 4, group_size=64), predictions).kl_nats
    four_bit_head = quality_of(load(smollm2, 4, group_size=64, head_bits=4), predictions).kl_nats
    monkeypatch.setattr(packed_codes, "_fit_lines", rounded_to_the_range)
    rounded = quality_of(load(smollm2, 4, group_size=64), predictions).kl_nats
    print(f"\nKL: fitted {fitted:.3f}, head in 4 bits {four_bit_head:.3f}, rounded to the range {rounded:.3f}")
    assert fitted < rounded
    assert fitted < four_bit_head


def rounded_to_the_range(groups, dtype):
    low, high = groups.amin(0), groups.amax(0)
    scale = ((high - low) / 15).to(dtype).float().clamp_min(1e-9)
    return scale, (low + 8 * scale).to(dtype).float()


PEAK = """
import json, pathlib, sys, torch
from transformers import AutoModelForCausalLM
from kani_nb.hardware.packed import kernel_support
from kani_nb.hardware.packed_quantizer import PackedConfig
import transformers.models.llama.modeling_llama
torch.set_num_threads(1)
config = PackedConfig(int(sys.argv[2])) if sys.argv[2] != "0" else None
kernel_support(8), kernel_support(4)
def peak():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype="bfloat16")
print(json.dumps(peak() - before))
"""


@pytest.mark.quant
@pytest.mark.skipif(sys.platform != "linux", reason="the highest memory of a process is read from Linux")
@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_takes_at_its_highest_little_more_than_the_files_and_the_model(smollm2, bits):
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(smollm2), str(bits)], capture_output=True, text=True, check=True
    )
    taken = json.loads(ran.stdout.splitlines()[-1])
    # The file is mapped into memory, and what was read of it counts until the system wants it back.
    files, held = (Path(smollm2) / "model.safetensors").stat().st_size, storage_bytes(load(smollm2, bits))
    print(f"\n{bits} bits: {taken / 2**20:.0f} MiB at most; files {files / 2**20:.0f}, model {held / 2**20:.0f}")
    assert held < taken < files + held + 100 * 2**20


@pytest.mark.timing
@pytest.mark.timeout(900)
@pytest.mark.parametrize("all_idle", [False, True])
def test_decoding_in_each_scheme_interleaved(smollm2, all_idle):
    import logging

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")
    threads = choose_threads().threads if all_idle else 1
    configs = {"bf16": None, "cpu-int8": PackedConfig(8), "cpu-int4": PackedConfig(4), "nf4": nf4}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        models = {
            name: AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=each, dtype="bfloat16")
            for name, each in configs.items()
        }
        runs = [{name: time_tokens(model) for name, model in models.items()} for _ in range(8)][1:]
    finally:
        torch.set_num_threads(before)
    figures = {}
    for name in configs:
        prompt, token = (statistics.median(run[name][kind] for run in runs) for kind in (0, 1))
        ratio = statistics.median(run["bf16"][1] / run[name][1] for run in runs)
        prefill = statistics.median(run["bf16"][0] / run[name][0] for run in runs)
        figures[name] = {
            "tokens_per_s": round(1 / token, 1),
            "times_bf16": round(ratio, 2),
            "prompt_of_128_ms": round(prompt * 1e3),
            "prompt_times_bf16": round(prefill, 2),
        }
    load_now = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    print("\n" + json.dumps({"measured": "decoding", "threads": threads, **figures, "load": load_now}))
    assert figures["cpu-int8"]["times_bf16"] > 1
    assert figures["cpu-int4"]["times_bf16"] > 1


@torch.inference_mode()
def time_tokens(model, count=16):
    """Seconds for a prompt of 128 tokens, and for each of the tokens after it."""
    started = time.perf_counter()
    out = model(torch.arange(1000, 1128)[None], use_cache=True, logits_to_keep=1)
    begun = time.perf_counter()
    for _ in range(count):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return begun - started, (time.perf_counter() - begun) / count
