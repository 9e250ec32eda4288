"""Working memory as planned, beside every allocation that torch counts while a prompt is really computed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kani_nb.engines.huggingface import kv_layers
from kani_nb.hardware.arithmetic import kv_bytes, working_bytes
from kani_nb.hardware.schemes import find_scheme
from kani_nb.hardware.shape_reading import shape_of
from kani_nb.quantization import Quantization
from tests.hardware.published import published

pytestmark = pytest.mark.quant

CHUNK, CONTEXT = 32, 256
#: What a fused attention kernel takes inside, for each thread; the plan does not see it.
KERNEL = 128 * 1024
SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "a Llama": ("LlamaConfig", {"num_key_value_heads": 4}),
    "grouped queries": ("LlamaConfig", {}),
    "scores that are materialised": ("LlamaConfig", {"attn_implementation": "eager"}),
    "experts": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "a sliding window": (
        "Gemma3TextConfig",
        {"head_dim": 64, "sliding_window": 64, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
    "latent attention": (
        "DeepseekV3Config",
        {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
        | {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    ),
}


def config_for(kind: str) -> Any:
    import transformers

    name, own = KINDS[kind]
    return getattr(transformers, name)(**(SIZES | own))


def peak_bytes(compute: Callable[[], Any]) -> int:
    """The most bytes that torch had allocated at once, above what it had before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compute()
    events = profiler.profiler.kineto_results.events()
    steps = sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]")
    held = peak = 0
    for _, count in steps:
        held += count
        peak = max(peak, held)
    return peak


def prompt_peak(model: Any, chunk: int = CHUNK, context: int = CONTEXT) -> int:
    """What a prompt of `context` tokens takes at most, cache included, computed in chunks as the engine does."""
    import torch

    cache = kv_layers.new_cache(model.config, context)

    def compute() -> None:
        for _ in range(context // chunk):
            model(input_ids=torch.full((1, chunk), 7), past_key_values=cache, use_cache=True, logits_to_keep=1)

    with torch.inference_mode():
        return peak_bytes(compute)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_takes_the_cache_and_the_working_memory_of_the_plan(kind, dtype):
    from transformers import AutoModelForCausalLM

    config = config_for(kind)
    found = shape_of(config, kind)
    assert found.moments
    peak = prompt_peak(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())
    planned = working_bytes(found, Quantization(), dtype, CHUNK, CONTEXT)
    measured = peak - kv_bytes(found, CONTEXT, dtype)
    assert 0.95 * (measured - KERNEL) <= planned <= 1.25 * measured


@pytest.mark.parametrize(("scheme", "most"), [("int8", 1.6), ("nf4", 8.0), ("cpu-int8", 2.0), ("cpu-int4", 4.0)])
def test_a_quantized_prompt_takes_no_more_than_planned(scheme, most, tmp_path):
    from transformers import AutoModelForCausalLM

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    config = config_for("a Llama")
    AutoModelForCausalLM.from_config(config, dtype="bfloat16").save_pretrained(tmp_path)
    settings = Quantization(scheme)
    wanted = find_scheme(scheme).transformers_config(settings, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16", quantization_config=wanted).eval()
    prompt_peak(model)  # the first repacks the weights
    found = shape_of(config)
    measured = prompt_peak(model) - kv_bytes(found, CONTEXT, "bfloat16")
    planned = working_bytes(found, settings, "bfloat16", CHUNK, CONTEXT)
    assert 0.95 * measured <= planned <= most * measured


def test_working_memory_grows_with_the_chunk_and_the_context():
    found = published("llama-7B")

    def planned(chunk: int, context: int, dtype: str = "float16", scheme: str = "none") -> int:
        return working_bytes(found, Quantization(scheme), dtype, chunk, context, "cuda")

    assert planned(128, 2048) < planned(256, 2048) < planned(256, 8192)
    assert planned(256, 2048) < planned(256, 2048, "float32") < 2.1 * planned(256, 2048)
    assert planned(4096, 512) == planned(512, 512), "a chunk is no longer than the context"
    assert planned(2048, 2048, scheme="nf4") - planned(2048, 2048) == 4096 * 11008 * 2
    assert planned(1, 1) == 32000 * (2 + 32), "sampling among the whole vocabulary"
    assert planned(256, 2048) < 0.01 * 2 * found.parameters


def test_a_window_keeps_the_states_of_the_whole_chunk_for_a_while():
    found = shape_of(config_for("a sliding window"))
    plain = replace(found, cache_layers=tuple(replace(each, window=None) for each in found.cache_layers))
    more = working_bytes(found, Quantization(), "float32", CHUNK, 512) - working_bytes(
        plain, Quantization(), "float32", CHUNK, 512
    )
    per_token = 2 * 2 * 64 * 4
    assert more == 2 * CHUNK * per_token


def test_what_could_not_be_watched_has_a_rule_of_thumb():
    found = shape_of(config_for("a Llama"))
    watched = working_bytes(found, Quantization(), "bfloat16", 256, 512)
    guessed = working_bytes(replace(found, moments=()), Quantization(), "bfloat16", 256, 512)
    assert 0.5 * watched < guessed < 2 * watched
    eager = replace(found, moments=(), attention="eager")
    assert working_bytes(eager, Quantization(), "bfloat16", 256, 512) - guessed == 256 * 4 * 512 * (2 + 4)
