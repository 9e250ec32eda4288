"""What is planned from a configuration alone is what a loaded model holds: its storages, and its cache when full."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kani_nb import ChatMessage
from kani_nb.engines.huggingface import kv_layers
from kani_nb.engines.huggingface.footprint import storage_bytes
from kani_nb.hardware.arithmetic import kv_bytes, weight_bytes
from kani_nb.hardware.schemes import find_scheme
from kani_nb.hardware.shape_reading import shape_of
from kani_nb.quantization import Quantization
from tests.engines.asking import answer, engine_of

pytestmark = pytest.mark.quant

CONTEXT_TOKENS = 128
SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
#: A model by the name of transformers' class, and what is its own.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped queries": ("LlamaConfig", {}),
    "experts": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "a sliding window": (
        "Gemma3TextConfig",
        {"head_dim": 16, "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "Conv1D and a tied head": ("GPT2Config", {"tie_word_embeddings": True, "num_key_value_heads": None}),
    "latent attention": (
        "DeepseekV3Config",
        {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        | {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "kv_lora_rank": 64, "q_lora_rank": 64},
    ),
    "recurrent states": (
        "JambaConfig",
        {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "shared caches": (
        "Gemma3nTextConfig",
        {"num_hidden_layers": 6, "head_dim": 16, "sliding_window": 16, "num_kv_shared_layers": 3}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}
        | {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 64, "laurel_rank": 64}
        | {"activation_sparsity_pattern": None},
    ),
    "biased experts": (
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
}
EVERY_DAY = ("grouped queries", "experts", "a sliding window")
SETTINGS = {
    "float32": (Quantization(), "float32"),
    "bfloat16": (Quantization(), "bfloat16"),
    "float16": (Quantization(), "float16"),
    "int8": (Quantization("int8"), "bfloat16"),
    "fp4": (Quantization("fp4"), "bfloat16"),
    "nf4": (Quantization("nf4"), "bfloat16"),
    "nf4 + double quant": (Quantization("nf4", double_quant=True), "bfloat16"),
    "cpu-int8": (Quantization("cpu-int8"), "bfloat16"),
    "cpu-int4": (Quantization("cpu-int4"), "bfloat16"),
}


def config_for(kind: str) -> Any:
    import transformers

    name, own = KINDS[kind]
    sizes = {key: value for key, value in (SIZES | own).items() if value is not None or key == "pad_token_id"}
    return getattr(transformers, name)(**sizes)


@pytest.fixture(scope="module", autouse=True)
def quiet_matmuls() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From a kind to the folder of a random model of it, made when first asked for."""
    import torch
    from transformers import AutoModelForCausalLM

    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            made[kind] = tmp_path_factory.mktemp("random")
            AutoModelForCausalLM.from_config(config_for(kind), dtype=torch.bfloat16).save_pretrained(made[kind])
        return made[kind]

    return get


def load(folder: Path, settings: Quantization, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    scheme = find_scheme(settings.scheme)
    options = {}
    if scheme.transformers_config is not None:
        options["quantization_config"] = scheme.transformers_config(settings, dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@cache
def shape_in(folder: Path) -> Any:
    from transformers import AutoConfig

    return shape_of(AutoConfig.from_pretrained(folder), folder.name)


def assert_planned(folder: Path, settings: Quantization, dtype: str) -> Any:
    """The model, whose storages before its first forward pass are those of the plan."""
    planned = weight_bytes(shape_in(folder), settings, find_scheme(settings.scheme), dtype)
    model = load(folder, settings, dtype)
    measured = storage_bytes(model)
    assert set(measured) == {"cpu"}
    assert planned.total == pytest.approx(measured["cpu"], rel=0.001)
    named = planned.codes + planned.scales + planned.linear + planned.experts + planned.embeddings
    assert planned.total == named + planned.head + planned.other == sum(planned.by_block.values())
    return model


def assert_full_cache_is_planned(model: Any, shape: Any, tokens: int, piece: int) -> None:
    """A cache that was filled as the engine fills it takes what was planned for that many tokens."""
    import torch

    cache = kv_layers.new_cache(model.config, tokens)
    starts = [*range(0, tokens - piece, piece), *range(tokens - piece, tokens)]
    with torch.inference_mode():
        for start, end in zip(starts, [*starts[1:], tokens], strict=True):
            ids = torch.full((1, end - start), 7)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    dtype = str(model.dtype).removeprefix("torch.")
    assert kv_layers.length_of(cache) == tokens
    assert kv_bytes(shape, tokens, dtype) == pytest.approx(kv_layers.nbytes(cache), rel=0.02)


@pytest.mark.parametrize("label", [label for label in SETTINGS if label != "float16"])
@pytest.mark.parametrize("kind", EVERY_DAY)
def test_weights_are_planned_as_they_are_held(kind, label, folder_of):
    assert_planned(folder_of(kind), *SETTINGS[label])


@pytest.mark.quant
@pytest.mark.parametrize("label", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_every_kind_are_planned_as_they_are_held(kind, label, folder_of):
    assert_planned(folder_of(kind), *SETTINGS[label])


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_cache_takes_what_was_planned(kind):
    import torch
    from transformers import AutoModelForCausalLM

    config = config_for(kind)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    assert_full_cache_is_planned(model, shape_of(config, kind), CONTEXT_TOKENS, piece=32)


@pytest.mark.parametrize("label", ["bfloat16", "int8"])
def test_the_embedded_model_is_planned_as_it_is_held(label, smollm2):
    model = assert_planned(smollm2, *SETTINGS[label])
    if label == "bfloat16":
        assert_full_cache_is_planned(model, shape_in(smollm2), 40, piece=36)


@pytest.mark.quant
@pytest.mark.parametrize("label", [label for label in SETTINGS if label not in ("bfloat16", "int8")])
def test_the_embedded_model_is_planned_as_it_is_held_in_every_other_scheme(label, smollm2):
    assert_planned(smollm2, *SETTINGS[label])


@pytest.mark.parametrize(
    ("kind", "scheme", "skipped"),
    [
        ("grouped queries", "int8", ("lm_head", "down_proj")),
        ("grouped queries", "nf4", (r".*\.mlp",)),
        ("grouped queries", "cpu-int8", ("model.layers.1", "lm_head")),
        ("Conv1D and a tied head", "nf4", ("lm_head", "c_fc")),
    ],
)
def test_skipped_modules_are_planned_as_transformers_skips_them(kind, scheme, skipped, folder_of):
    assert_planned(folder_of(kind), Quantization(scheme, llm_int8_skip_modules=skipped), "bfloat16")


def test_an_int8_model_that_keeps_its_weights_for_training_is_planned_so(folder_of):
    for dtype in ("float32", "bfloat16"):
        assert_planned(folder_of("grouped queries"), Quantization("int8", llm_int8_has_fp16_weight=True), dtype)


def test_what_lies_in_files_is_counted_where_it_is(folder_of):
    from transformers import AutoModelForCausalLM

    folder = folder_of("grouped queries")
    planned = weight_bytes(shape_in(folder), Quantization(), find_scheme("none"), "bfloat16").by_block
    places = dict.fromkeys(planned, "cpu") | {"model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", device_map=places)
    on_disk = planned["model.layers.1"]
    assert storage_bytes(model) == {"disk": on_disk, "cpu": sum(planned.values()) - on_disk}


def test_scales_are_counted_that_transformers_leaves_out(folder_of):
    folder = folder_of("grouped queries")
    for settings in (Quantization("nf4"), Quantization("nf4", double_quant=True), Quantization("int8")):
        planned = weight_bytes(shape_in(folder), settings, find_scheme(settings.scheme), "bfloat16")
        model = load(folder, settings, "bfloat16")
        assert storage_bytes(model)["cpu"] - model.get_memory_footprint() == planned.scales


async def test_an_engines_cache_takes_the_plan_when_its_context_is_full(tiny_model):
    engine = engine_of(tiny_model, max_context_size=96)
    await engine.load()
    shape = shape_in(tiny_model)
    try:
        planned = weight_bytes(shape, Quantization(), find_scheme("none"), "float32").total
        assert engine.memory().weight_bytes == planned
        prompt = [ChatMessage.user("the quick brown fox")]
        completion = await answer(engine, prompt, max_new_tokens=400, min_new_tokens=400)
        assert completion.prompt_tokens + completion.completion_tokens == 96
        assert engine.memory().kv_bytes == kv_bytes(shape, 96, "float32")
    finally:
        await engine.close()


def test_a_cache_has_room_to_spare_but_none_beyond_its_limit():
    import torch

    config = config_for("grouped queries")
    per_token = kv_bytes(shape_of(config), 1, "float32")
    for limit in (None, 100, 10):
        cache = kv_layers.new_cache(config, limit)
        held = []
        for _ in range(10):
            for layer in range(config.num_hidden_layers):
                states = torch.zeros(1, 2, 10, 16)
                cache.update(states, states, layer)
            held.append(kv_layers.nbytes(cache) // per_token)
        assert held[0] == (74 if limit is None else min(74, limit))
        assert held[-1] >= 100
        if limit is not None:
            assert held[-1] == 100, "also where more is asked of it than the limit: then it grows with each token"
            assert max(held[:9]) <= max(limit, 90)
        twin = kv_layers.fork(cache, 40)
        assert kv_layers.length_of(twin) == 40
        assert kv_layers.nbytes(twin) // per_token == (104 if limit is None else max(40, min(104, limit)))


def test_a_cache_of_recurrent_states_is_counted():
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config_for("recurrent states"), dtype=torch.float32).eval()
    cache = kv_layers.new_cache(model.config)
    with torch.inference_mode():
        model(input_ids=torch.arange(8)[None], past_key_values=cache)
    recurrent = cache.layers[0]
    states = [*recurrent.conv_states.values(), *recurrent.recurrent_states.values()]
    assert sum(state.nbytes for state in states) > 0
    assert kv_layers.nbytes(cache) >= sum(state.nbytes for state in states) + cache.layers[1].nbytes()
