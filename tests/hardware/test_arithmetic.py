"""Bytes from shapes: weights under each scheme, caches, checkpoints that are quantized already, what a token reads."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as running
from hypothesis import strategies as st

from kani_nb.hardware.arithmetic import (
    bytes_read_per_token,
    can_quantize_kv,
    disk_bytes,
    dtype_bytes,
    host_bytes,
    kv_bytes,
    kv_bytes_by_block,
    kv_bytes_per_token,
    odd_shapes,
    quantized_tensors,
    settings_of_checkpoint,
    sparing_tied_head,
    unmatched,
    weight_bytes,
)
from kani_nb.hardware.checkpoint_schemes import checkpoint_of
from kani_nb.hardware.schemes import find_scheme, gguf_schemes, our_schemes
from kani_nb.hardware.shape_reading import shape_of
from kani_nb.hardware.shapes import CacheLayer
from kani_nb.quantization import Quantization
from tests.hardware.published import published

NF4, INT8, NONE = Quantization("nf4"), Quantization("int8"), Quantization()
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


@cache
def shape(config: str = "LlamaConfig", **sizes: Any) -> Any:
    import transformers

    return shape_of(getattr(transformers, config)(**(SIZES | sizes)), "it")


def weights(found: Any, settings: Quantization = NONE, dtype: str = "bfloat16") -> Any:
    return weight_bytes(found, settings, find_scheme(settings.scheme), dtype)


#: GB (1e9) of float16, int8, nf4, nf4 with double quantization, and of a KV cache of 2,048 tokens: measured with a
#: counter of its own before this one was written.
LLAMA = {
    "7B": (13.48, 7.01, 4.17, 3.87, 1.07),
    "13B": (26.03, 13.35, 7.79, 7.20, 1.68),
    "30B": (65.06, 32.97, 18.91, 17.41, 3.27),
    "65B": (130.57, 65.84, 37.48, 34.46, 5.37),
}


@pytest.mark.parametrize("size", LLAMA)
def test_llama_takes_what_was_counted_before(size):
    found = published(f"llama-{size}")
    schemes = (NONE, INT8, NF4, Quantization("nf4", double_quant=True))
    planned = [weights(found, settings, "float16").total for settings in schemes]
    planned.append(kv_bytes(found, 2048, "float16"))
    assert tuple(round(count / 1e9, 2) for count in planned) == LLAMA[size]


@pytest.mark.parametrize("scheme", [each.name for each in (*our_schemes(), *gguf_schemes())])
@pytest.mark.parametrize("config", ["LlamaConfig", "MixtralConfig"])
def test_the_parts_sum_to_the_whole_and_blocks_too(scheme, config):
    found = shape(config)
    for dtype in ("float32", "bfloat16", "float16", "auto"):
        held = weights(found, Quantization(scheme), dtype)
        kinds = (held.codes, held.scales, held.linear, held.experts, held.embeddings, held.head, held.other)
        assert sum(kinds) == held.total == sum(held.by_block.values())
        assert set(held.by_block) == set(found.blocks)
        assert (held.codes > 0) == (scheme != "none")


def test_what_is_quantized_stays_out_of_the_rest():
    found = shape()
    held = weights(found, NF4)
    linear = sum(each.elements for each in found.tensors if each.kind == "linear")
    assert held.codes == linear / 2
    assert held.scales == linear / 64 * 4 + 64 * len(quantized_tensors(found, NF4, find_scheme("nf4")))
    assert (held.linear, held.head, held.embeddings) == (0, 512 * 256 * 2, 512 * 256 * 2)
    assert weights(found).linear == linear * 2


def test_the_experts_of_a_mixture_stay_as_they_are_under_bitsandbytes():
    found = shape("MixtralConfig")
    experts = sum(each.elements for each in found.tensors if each.kind == "experts")
    assert weights(found, NF4).experts == weights(found, INT8).experts == experts * 2
    assert weights(found, NF4).total > experts * 2


def test_a_tied_head_becomes_a_weight_of_its_own_where_the_scheme_quantizes_heads():
    tied, own = shape(tie_word_embeddings=True), shape()
    for settings in (Quantization("cpu-int8"), Quantization("cpu-int4")):
        assert weights(tied, settings).total == weights(own, settings).total
        kept = replace(settings, llm_int8_skip_modules=("lm_head",))
        assert weights(tied, kept).total < weights(own, kept).total, "then it stays the embedding"
    assert weights(tied, NF4).total == weights(own, NF4).total - 512 * 256 * 2
    # In GGUF files a tied head is no second tensor.
    q4 = Quantization("q4_0")
    assert weights(tied, q4).total < weights(own, q4).total


def test_a_gguf_of_the_embedded_model_is_as_large_as_the_file_that_is_published():
    from transformers import AutoConfig

    from kani_nb.engines.sources_aliases import shipped_config
    from kani_nb.engines.wheel_recipe import SMOLLM2_WHEEL

    config = dict(shipped_config("smollm2") or {})
    found = shape_of(AutoConfig.for_model(config.pop("model_type"), **config))
    planned = weights(found, Quantization("q4_1")).total
    # The rest is the vocabulary.
    assert planned == pytest.approx(SMOLLM2_WHEEL.gguf_bytes, rel=0.02)
    assert planned < SMOLLM2_WHEEL.gguf_bytes


def test_skip_patterns_follow_transformers_own_rule():
    found = shape()
    nf4 = find_scheme("nf4")

    def modules(*patterns: str) -> set[str]:
        chosen = quantized_tensors(found, Quantization("nf4", llm_int8_skip_modules=patterns), nf4)
        return {each.module for each in found.tensors if each.kind in ("linear", "head")} - {
            each.module for each in chosen
        }

    assert modules("lm_head") == {"lm_head"}
    assert modules() == set(), "an empty list skips nothing, the head neither"
    assert modules("down_proj", "lm_head") == {"lm_head", *(f"model.layers.{n}.mlp.down_proj" for n in range(2))}
    assert len(modules("model.layers.1")) == 7
    assert modules(r"model\.layers\.\d\.mlp.up_proj") == {f"model.layers.{n}.mlp.up_proj" for n in range(2)}
    assert unmatched(found, ["mlp", "lm_head", "model.layers.7", "(", r".*\.mlp"]) == ["mlp", "model.layers.7", "("]
    assert unmatched(shape(tie_word_embeddings=True), ["lm_head", "head"]) == []


def test_a_tied_head_is_spared_though_a_list_replaces_the_default(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    tied, nf4 = shape(tie_word_embeddings=True), find_scheme("nf4")
    asked = Quantization("nf4", llm_int8_skip_modules=("down_proj",))
    spared = sparing_tied_head(tied, asked, nf4)
    assert spared.llm_int8_skip_modules == ("down_proj", "lm_head")
    assert weights(tied, spared) == weights(tied, asked)
    for same in (NF4, spared, Quantization("nf4", llm_int8_skip_modules=(".*head",))):
        assert sparing_tied_head(tied, same, nf4) is same
    assert sparing_tied_head(shape(), asked, nf4) is asked
    packed = Quantization("cpu-int8", llm_int8_skip_modules=("down_proj",))
    assert sparing_tied_head(tied, packed, find_scheme("cpu-int8")) is packed
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | {"tie_word_embeddings": True})).save_pretrained(tmp_path)
    for settings, answers in ((asked, False), (spared, True)):
        wanted = nf4.transformers_config(settings, "bfloat16")
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", quantization_config=wanted)
        with torch.inference_mode():
            if answers:
                assert model(torch.arange(8)[None]).logits.isfinite().all()
            else:
                with pytest.raises((AssertionError, AttributeError, RuntimeError)):
                    model(torch.arange(8)[None])


def test_shapes_that_a_kernel_cannot_take_are_named_or_left_alone():
    found = shape(hidden_size=96, intermediate_size=200, num_attention_heads=2, head_dim=48)
    odd = {each.module.rpartition(".")[2] for each in odd_shapes(found, NF4, find_scheme("nf4"))}
    assert odd == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    packed = Quantization("cpu-int8")
    assert not odd_shapes(found, packed, find_scheme("cpu-int8"))
    left = weights(found, packed).linear
    assert left == 2 * (96 * 200) * 2, "down_proj: 200 inputs are no multiple of 16"
    assert not odd_shapes(shape(), NF4, find_scheme("nf4"))


def test_a_dtype_that_was_not_said_is_the_checkpoints():
    assert weights(shape(dtype="bfloat16"), dtype="auto").total == weights(shape(), dtype="bfloat16").total
    assert weights(shape(), dtype="auto").total == weights(shape(), dtype="float32").total
    assert (dtype_bytes("float32"), dtype_bytes("auto", shape(dtype="float16"))) == (4, 2)


def test_a_cache_grows_by_each_layers_keys_and_values():
    found = shape()
    assert kv_bytes_per_token(found, "bfloat16") == 2 * (2 * 2 * 64) * 2
    assert kv_bytes(found, 100, "bfloat16") == 100 * kv_bytes_per_token(found, "bfloat16")
    assert kv_bytes_by_block(found, 10, "float32") == {f"model.layers.{n}": 10 * 2 * 2 * 64 * 4 for n in range(2)}


LAYERS = st.builds(
    CacheLayer,
    block=st.sampled_from(["a", "b"]),
    elements_per_token=st.integers(0, 1024),
    window=st.none() | st.integers(1, 500),
    fixed_elements=st.integers(0, 100),
    fixed_float32_elements=st.integers(0, 100),
    can_quantize=st.booleans(),
)


@running(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(LAYERS, max_size=5), st.integers(0, 1000), st.sampled_from(["float32", "bfloat16"]))
def test_a_longer_context_never_takes_less_and_at_most_a_tokens_bytes_more(layers, tokens, dtype):
    found = replace(shape(), cache_layers=tuple(layers))
    for bits in (None, 8, 4):
        here, next_one = kv_bytes(found, tokens, dtype, bits), kv_bytes(found, tokens + 1, dtype, bits)
        assert here <= next_one
        assert next_one - here <= kv_bytes_per_token(found, dtype)
        assert here == sum(kv_bytes_by_block(found, tokens, dtype, bits).values())
        assert kv_bytes_per_token(found, dtype, bits) <= kv_bytes_per_token(found, dtype)
    full = max([layer.window or 0 for layer in layers], default=0)
    if all(layer.window for layer in layers):
        assert kv_bytes(found, full, dtype) == kv_bytes(found, 10**6, dtype), "a full window grows no more"


@pytest.mark.filterwarnings("ignore")  # of those packages' own
@pytest.mark.parametrize(
    ("backend", "package", "bits"), [("quanto", "optimum.quanto", 4), ("hqq", "hqq", 4), ("hqq", "hqq", 8)]
)
def test_a_quantized_cache_takes_what_transformers_own_takes(backend, package, bits):
    pytest.importorskip(package, reason=f"{package} makes transformers' quantized cache, and is not installed")
    import torch
    from transformers import LlamaConfig, QuantizedCache

    found = shape()
    assert can_quantize_kv(found)
    for dtype in (torch.float32, torch.bfloat16):
        cache = QuantizedCache(backend=backend, config=LlamaConfig(**SIZES), nbits=bits)
        for tokens in (64, 136, *[1] * 127):  # the first and what fills the 128 of the rest are quantized
            states = torch.randn(1, 2, tokens, 64, dtype=dtype)
            for layer in range(2):
                cache.update(states, states.clone(), layer)
        name = str(dtype).removeprefix("torch.")
        held = [getattr(layer, field) for layer in cache.layers for field in ("keys", "values")]
        codes = [getattr(layer, field) for layer in cache.layers for field in ("_quantized_keys", "_quantized_values")]
        measured = sum(_storages([*held, *codes]).values())
        assert kv_bytes(found, 64 + 136 + 127, name, bits) == pytest.approx(measured, rel=0.02)


def _storages(value: Any) -> dict[int, int]:
    import torch

    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__") and type(value) is not torch.Tensor:
        value = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    if isinstance(value, torch.Tensor):
        return {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()}
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return {key: size for each in value for key, size in _storages(each).items()}
    return {}


def test_a_cache_with_windows_cannot_be_quantized_and_is_counted_so():
    found = shape("Gemma3TextConfig", sliding_window=32, head_dim=64)
    assert not can_quantize_kv(found)
    assert kv_bytes(found, 200, "bfloat16", 4) == kv_bytes(found, 200, "bfloat16")
    with pytest.raises(ValueError, match="only full attention"):
        from transformers import Gemma3TextConfig, QuantizedCache

        QuantizedCache(backend="quanto", config=Gemma3TextConfig(**SIZES, sliding_window=32, head_dim=64))


CHECKPOINTS = [
    ({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}, INT8, 8.0),
    ({"load_in_8bit": True, "llm_int8_threshold": 3.0}, Quantization("int8", llm_int8_threshold=3.0), 8.0),
    (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        | {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8"},
        Quantization("nf4", double_quant=True, compute_dtype="bfloat16"),
        4.127,
    ),
    ({"quant_method": "gptq", "bits": 4, "group_size": 128}, Quantization("gptq", group_size=128), 4.16),
    ({"quant_method": "gptq", "bits": 8, "group_size": 128}, None, 8.2),
    ({"quant_method": "awq", "bits": 4, "group_size": 128}, None, 4.156),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, None, 8.002),
    ({"quant_method": "mxfp4"}, None, 4.25),
    ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, None, 4.0),
    (
        {"quant_method": "kani_nb_packed", "bits": 4, "group_size": 64, "skip_modules": ["lm_head"], "head_bits": 8},
        Quantization("cpu-int4", group_size=64, llm_int8_skip_modules=("lm_head",)),
        4.5,
    ),
    ({"quant_method": "kani_nb_packed", "bits": 8, "group_size": None}, Quantization("cpu-int8"), 8.0),
    ({"quant_method": "something-new", "nbits": 3}, None, 3.0),
    ({"quant_method": "something-else"}, None, 16.0),
]


@pytest.mark.parametrize(("own", "settings", "bits"), CHECKPOINTS)
def test_a_checkpoints_own_configuration_says_its_scheme_and_bits(own, settings, bits):
    found, effective = settings_of_checkpoint(own)
    if settings is None:
        assert found is None
    else:
        assert found is not None
        given = {name: value for name, value in found.given.items() if value is not False and name != "compute_dtype"}
        assert (found.scheme, given) == (
            settings.scheme,
            {name: value for name, value in settings.given.items() if name != "compute_dtype"},
        )
        if settings.compute_dtype != "auto":
            assert found.compute_dtype == settings.compute_dtype
    assert effective == pytest.approx(bits, abs=0.06)


@pytest.mark.parametrize("settings", [INT8, NF4, Quantization("nf4", double_quant=True), Quantization("cpu-int4")])
def test_a_checkpoint_of_ours_is_counted_as_what_it_was_made_with(settings):
    scheme = find_scheme(settings.scheme)
    own = scheme.transformers_config(settings, "bfloat16").to_dict()
    held, its_scheme = checkpoint_of(own).held("cpu")
    found = replace(shape(), prequantized=own, checkpoint_dtype="bfloat16")
    assert its_scheme is scheme
    assert weight_bytes(found, held, its_scheme, "bfloat16") == weights(found, settings)
    assert disk_bytes(found) == weights(found, settings).total
    assert host_bytes(found, held, its_scheme, "bfloat16") == weights(found, settings).total, "nothing is quantized"


def test_fp8_is_counted_as_transformers_builds_it():
    import torch
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Qwen3MoeConfig
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128)
    quantization = FineGrainedFP8Config(weight_block_size=(128, 128))
    config.quantization_config = quantization.to_dict()
    found = shape_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    skipped = get_keys_to_not_convert(model)
    replace_with_fp8_linear(model, skipped, quantization_config=quantization, pre_quantized=True)
    checkpoint = checkpoint_of(found.prequantized or {})
    measured = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert weight_bytes(found, *checkpoint.held("cuda", (9, 0)), "bfloat16").total == measured
    plain = weights(found).total
    for device in (("cuda", (8, 0)), ("cpu", None)):
        assert not checkpoint.stays_quantized(*device)
        assert weight_bytes(found, *checkpoint.held(*device), "bfloat16").total == plain
    assert "expand" in checkpoint.note
    read = bytes_read_per_token(found, *checkpoint.held("cuda", (9, 0))[:1], "bfloat16", 0, checkpoint.scheme)
    assert read < measured


def test_mxfp4_quantizes_the_experts_alone():
    found = shape("GptOssConfig", num_local_experts=4, num_experts_per_tok=2, head_dim=64)
    experts = sum(each.elements for each in found.tensors if each.kind == "experts")
    checkpoint = checkpoint_of({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]})
    held = weight_bytes(found, *checkpoint.held("cuda", (9, 0)), "bfloat16")
    assert (held.codes, held.scales) == (experts / 2, experts / 32)
    assert held.total == weights(found).total - experts * 2 + experts * 17 / 32


def test_a_token_reads_the_weights_it_needs_and_the_whole_cache():
    dense, mixed = shape(), shape("MixtralConfig", num_local_experts=8, num_experts_per_tok=2)
    embedding = 512 * 256 * 2
    read = bytes_read_per_token(dense, NONE, "bfloat16", 0)
    assert read == weights(dense).total - embedding, "the embedding is only looked up in"
    assert bytes_read_per_token(dense, NONE, "bfloat16", 50) == read + kv_bytes(dense, 50, "bfloat16")
    held = weights(mixed)
    assert bytes_read_per_token(mixed, NONE, "bfloat16", 0) == held.total - embedding - held.experts * 3 / 4
    tied, packed = shape(tie_word_embeddings=True), Quantization("cpu-int8")
    assert bytes_read_per_token(tied, NONE, "bfloat16", 0) == weights(tied).total
    assert bytes_read_per_token(tied, packed, "bfloat16", 0) == weights(tied, packed).total - embedding


def test_the_disk_holds_the_checkpoint_as_it_is():
    assert disk_bytes(shape(dtype="bfloat16")) == 2 * shape().parameters
    assert disk_bytes(shape(), 12345) == 12345
    awq = {"quant_method": "awq", "bits": 4, "group_size": 128}
    found = replace(shape(dtype="float16"), prequantized=awq)
    assert disk_bytes(found) == pytest.approx(weights(found, NF4).total, rel=0.05)
    unknown = replace(found, prequantized={"quant_method": "something-new", "bits": 4})
    assert disk_bytes(unknown) == pytest.approx(disk_bytes(found), rel=0.1)


def test_loading_takes_the_weights_and_what_quantizing_leaves_behind():
    found = published("llama-7B")
    none, nf4 = find_scheme("none"), find_scheme("nf4")
    assert host_bytes(found, NONE, none, "float16") == weights(found, NONE, "float16").total
    quantizing = host_bytes(found, NF4, nf4, "float16") - weights(found, NF4, "float16").total
    assert quantizing == 4 * 4 * 4096 * 11008, "four float32 copies of the largest weight"
    assert host_bytes(found, NF4, nf4, "float16", "cuda") == 4 * 32000 * 4096 * 2, "four of the largest at a time"
