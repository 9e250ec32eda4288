"""What a model is made of, read from its configuration: tensors, ties, blocks, caches; and what cannot be read."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kani_nb.errors import ConfigError, ModelFilesError
from kani_nb.hardware.shape_reading import shape_of

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


def shape(config: str, **sizes: Any) -> Any:
    import transformers

    return shape_of(getattr(transformers, config)(**(SIZES | sizes)), "it")


def without_groups(**sizes: Any) -> dict[str, Any]:
    return {name: value for name, value in (SIZES | sizes).items() if name != "num_key_value_heads"}


def test_a_llama_is_read_tensor_by_tensor():
    found = shape("LlamaConfig", dtype="bfloat16", attention_bias=True)
    assert (found.architecture, found.checkpoint_dtype, found.context_tokens) == ("LlamaForCausalLM", "bfloat16", 256)
    assert (found.vocab_size, found.hidden_size, found.intermediate_size, found.attention_heads) == (512, 64, 128, 4)
    tensors = {each.name: each for each in found.tensors}
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    assert (up.kind, up.elements, up.out_features, up.in_features) == ("linear", 64 * 128, 128, 64)
    assert (up.module, up.block) == ("model.layers.1.mlp.up_proj", "model.layers.1")
    assert tensors["model.layers.1.self_attn.k_proj.bias"].kind == "other"
    assert tensors["model.embed_tokens.weight"].kind == "embedding"
    assert tensors["model.embed_tokens.weight"].active == 0
    assert (tensors["lm_head.weight"].kind, found.head, found.has_tied_head) == ("head", "lm_head", False)
    frequencies = tensors["model.rotary_emb.inv_freq"]
    assert (frequencies.is_computed, frequencies.own_bytes, frequencies.elements) == (True, 4, 8)
    assert found.parameters == sum(each.elements for each in found.tensors) - sum(
        each.elements for each in found.tensors if each.is_computed
    )
    layers = [f"model.layers.{number}" for number in range(4)]
    assert found.blocks == ("model.embed_tokens", "model.rotary_emb", *layers, "model.norm", "lm_head")
    assert found.default_skips == ("lm_head",)


def test_a_tied_head_is_listed_once_and_is_read_by_every_token():
    found = shape("LlamaConfig", tie_word_embeddings=True)
    assert found.has_tied_head
    assert [each.name for each in found.tensors if each.elements == 512 * 64] == ["model.embed_tokens.weight"]
    assert next(each for each in found.tensors if each.kind == "embedding").active == 1
    assert set(found.default_skips) == {"lm_head", "model.embed_tokens", "model.norm"}
    assert found.blocks[-1] == "lm_head"


def test_65_billion_parameters_are_read_in_well_under_two_seconds_of_computing():
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=8192,
        num_hidden_layers=80,
        num_attention_heads=64,
        intermediate_size=22016,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    shape("LlamaConfig")  # what is imported, is imported
    started = time.process_time()
    found = shape_of(config, "65B")
    assert time.process_time() - started < 1.5
    assert found.parameters == 65_285_660_672


def test_blocks_stand_in_the_order_in_which_they_run():
    found = shape("OPTConfig", **without_groups(word_embed_proj_dim=64, ffn_dim=128))
    names = [block.rpartition("decoder.")[2] for block in found.blocks]
    assert names[:3] == ["embed_tokens", "embed_positions", "layers.0"]
    assert names[-2:] == ["final_layer_norm", "lm_head"], "OPT names its last norm before its layers"


@pytest.mark.parametrize(
    ("config", "sizes", "active"),
    [
        ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}, 0.25),
        ("Qwen3MoeConfig", {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}, 0.25),
        ("GptOssConfig", {"num_local_experts": 8, "num_experts_per_tok": 1, "head_dim": 16}, 0.125),
        ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}, 0.5),
    ],
)
def test_experts_are_several_matrices_of_which_a_token_reads_some(config, sizes, active):
    found = shape(config, **sizes)
    experts = [each for each in found.tensors if each.kind == "experts"]
    assert len(experts) == 2 * 4, "one for what goes in and one for what comes out, in each layer"
    for each in experts:
        assert each.active == active
        assert each.matrices * each.out_features * each.in_features == each.elements
        assert each.matrices == found.experts
    assert found.experts_per_token == active * found.experts
    routers = [each for each in found.tensors if each.name.endswith(("gate.weight", "router.weight"))]
    assert routers
    assert all(each.active == 1 for each in routers)


def test_a_window_a_shared_cache_and_grouped_queries_show_in_the_cache():
    types = ["sliding_attention"] * 3 + ["full_attention"]
    gemma = shape("Gemma3TextConfig", head_dim=16, sliding_window=32, layer_types=types)
    assert [layer.window for layer in gemma.cache_layers] == [32, 32, 32, None]
    assert {layer.elements_per_token for layer in gemma.cache_layers} == {2 * 2 * 16}
    assert [layer.block for layer in gemma.cache_layers] == [f"model.layers.{number}" for number in range(4)]
    sharing = shape(
        "Gemma3nTextConfig",
        num_hidden_layers=6,
        head_dim=16,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=512,
        hidden_size_per_layer_input=64,
        laurel_rank=64,
    )
    kept = [layer.block for layer in sharing.cache_layers if layer.elements_per_token]
    assert kept == [f"model.layers.{number}" for number in range(4)], "the last two use what the others keep"
    chunked = shape("Llama4TextConfig", head_dim=16, attention_chunk_size=32, num_local_experts=2)
    assert [layer.window for layer in chunked.cache_layers] == [32, 32, 32, None]


def test_latent_attention_keeps_what_transformers_keeps_of_it():
    found = shape(
        "DeepseekV3Config",
        **without_groups(n_routed_experts=8, n_group=2, topk_group=1, moe_intermediate_size=32, kv_lora_rank=24)
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 32},
    )
    kept = {layer.elements_per_token for layer in found.cache_layers}
    assert kept in ({24 + 8}, {4 * (16 + 8 + 16)}), "the latents, or, in older versions, keys and values made of them"


def test_recurrent_layers_keep_a_state_that_does_not_grow():
    found = shape("MambaConfig", state_size=8)
    assert len(found.cache_layers) == 4
    for layer in found.cache_layers:
        assert layer.elements_per_token == 0
        assert layer.fixed_elements + layer.fixed_float32_elements > 0
    mixed = shape("JambaConfig", num_experts=2, attn_layer_period=2, attn_layer_offset=1)
    assert [bool(layer.elements_per_token) for layer in mixed.cache_layers] == [False, True, False, True]
    assert not mixed.cache_layers[0].can_quantize
    assert mixed.cache_layers[1].can_quantize


def test_tensors_that_stay_in_float32_are_known():
    found = shape("Mamba2Config", num_heads=8, head_dim=16, n_groups=1)
    assert found.constant_skips == ()
    kept = shape("GptOssConfig", head_dim=16, num_local_experts=4)
    assert {each.name for each in kept.tensors if each.is_kept_from_float16} >= {"model.norm.weight"}
    assert "norm" in kept.constant_skips


def test_a_gpt2_has_linear_layers_whose_weight_lies_the_other_way():
    found = shape("GPT2Config", **without_groups(tie_word_embeddings=True))
    tensors = {each.name: each for each in found.tensors}
    weight = tensors["transformer.h.0.mlp.c_fc.weight"]
    assert (weight.kind, weight.out_features, weight.in_features, weight.is_conv1d) == ("linear", 256, 64, True)
    assert tensors["transformer.wpe.weight"].active == 0


def test_a_model_of_images_and_text_is_read_whole():
    import transformers

    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=32, patch_size=8),
        text_config=transformers.LlamaConfig(**SIZES),
    )
    found = shape_of(config, "llava")
    assert found.architecture == "LlavaForConditionalGeneration"
    assert any("vision" in each.block for each in found.tensors)
    assert (found.vocab_size, len(found.cache_layers)) == (512, 4)
    assert found.parameters > shape("LlamaConfig").parameters


def test_what_the_configuration_says_of_its_own_quantization_is_kept():
    own = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    assert shape("LlamaConfig", quantization_config=own).prequantized == own
    assert shape("LlamaConfig").prequantized is None


def test_a_configuration_is_not_changed_by_reading_it():
    import transformers

    config = transformers.LlamaConfig(**SIZES)
    before = config.to_dict()
    shape_of(config)
    assert config.to_dict() == before


def test_what_cannot_be_read_says_why_and_what_to_do():
    import transformers

    class MartianConfig(transformers.PretrainedConfig):
        model_type = "martian"

    with pytest.raises(ModelFilesError, match=r"(?s)red-1b is of the architecture 'martian'.*pip install -U transform"):
        shape_of(MartianConfig(), "red-1b")
    remote = MartianConfig(auto_map={"AutoModelForCausalLM": "modeling_martian.MartianForCausalLM"})
    with pytest.raises(ConfigError, match=r"(?s)red-1b brings code of its own.*--trust-remote-code"):
        shape_of(remote, "red-1b")
    with pytest.raises(ConfigError, match="is an encoder-decoder model"):
        shape_of(transformers.T5Config(), "t5")
    with pytest.raises(
        ModelFilesError, match=r"(?s)odd \(llama\) cannot be built from its configuration: .*config\.json"
    ):
        shape_of(transformers.LlamaConfig(**SIZES, hidden_act="unheard-of"), "odd")


def test_a_model_that_cannot_run_without_values_has_the_cache_its_configuration_describes():
    import torch
    from transformers import DynamicCache, JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=512,
        hidden_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=128,
        num_local_experts=4,
    )
    found = shape_of(config, "jetmoe")
    assert found.moments == (), "it asks which experts its tokens chose, and could not be watched"
    cache = DynamicCache(config=config)
    with torch.inference_mode():
        JetMoeForCausalLM(config)(input_ids=torch.arange(8)[None], past_key_values=cache)
    kept = [(layer.keys.numel() + layer.values.numel()) // 8 for layer in cache.layers]
    assert [layer.elements_per_token for layer in found.cache_layers] == kept
    assert [layer.block for layer in found.cache_layers] == ["model.layers.0", "model.layers.1"]
