"""Other kinds of models: whatever their caches can do, the text is that of `generate` without a cache."""

from dataclasses import replace

import pytest

from kani_nb import ChatMessage, HuggingEngine
from tests.conftest import make_tokenizer, save_model

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "pad_token_id": 0,
}
STATE_SPACE = {
    "num_hidden_layers": 4,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
    "use_mamba_kernels": False,
    "mamba_d_state": 8,
    "mamba_dt_rank": 8,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 128,
    "factor": 8.0,
}
HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
LINEAR = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
#: Configuration class, model class, its arguments, and what the cache is trusted with.
KINDS = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "reuse"),
    "longrope": (
        "Phi3Config",
        "Phi3ForCausalLM",
        COMMON | {"original_max_position_embeddings": 128, "rope_parameters": LONG_ROPE},
        "reuse",
    ),
    "linear": ("Qwen3NextConfig", "Qwen3NextForCausalLM", COMMON | LINEAR, "reuse"),
    "hybrid": ("BambaConfig", "BambaForCausalLM", COMMON | HYBRID | {"attn_layer_indices": [1]}, "reuse"),
    "state space": ("JambaConfig", "JambaForCausalLM", COMMON | STATE_SPACE, "steps"),
    "no cache of ours": (
        "MiniMaxConfig",
        "MiniMaxForCausalLM",
        COMMON | {"head_dim": 16, "layer_types": LINEAR["layer_types"], "num_local_experts": 2, "block_size": 16},
        "none",
    ),
}
QUESTIONS = ["What is the capital of France?", "the quick brown fox jumps over " * 8, "a b c d e f " * 16, "and?"]


@pytest.fixture(params=[pytest.param(each, marks=pytest.mark.slow if each == "state space" else ()) for each in KINDS])
def kind(request, tmp_path):
    import torch
    import transformers

    config_name, model_name, arguments, mode = KINDS[request.param]
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(
        **arguments, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id
    )
    model = getattr(transformers, model_name)(config).float()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.3)
    return save_model(tmp_path, model, tokenizer), mode


async def test_turns_retries_and_edits_give_the_text_of_generate_without_a_cache(kind):
    import torch

    folder, mode = kind
    engine = HuggingEngine(str(folder), 1024, dtype="float32", threads=1, cache_gib=0.05)
    await engine.load()
    assert engine.details()["cache_mode"] == mode

    async def check(messages):
        completion = await engine.predict(messages, do_sample=False, max_new_tokens=12)
        ids = torch.tensor([engine.prompt_ids(messages)])
        # Without a cache: with one, transformers 5.15 itself errs where longrope changes its factors.
        options = {"do_sample": False, "max_new_tokens": 12, "use_cache": False}
        theirs = engine.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        expected = engine.tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
        assert completion.message.text == expected
        return completion

    history, cached = [], []
    for question in QUESTIONS:
        history.append(ChatMessage.user(question))
        completion = await check(history)
        history.append(completion.message)
        cached.append(completion.cached_tokens)
    await check(history[:3])
    await check([*history[:4], ChatMessage.user("something else")])
    assert any(cached) is (mode == "reuse")
    # A text is read in chunks, too, where that gives what the whole gives.
    engine._loaded = replace(engine._loaded, chunk_tokens=64)
    text = [5 + number % 200 for number in range(150)]
    with torch.inference_mode():
        whole = engine.model(torch.tensor([text]), use_cache=False).logits[0].float().log_softmax(-1)
    assert torch.allclose(await engine.log_probs(text), whole, atol=2e-2)
    await engine.close()
