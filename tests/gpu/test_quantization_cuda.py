"""Every scheme on a CUDA device: what it holds against the plan, offloading, running out of memory, giving it all back.

`python -m tests.gpu.run_all` runs these and writes what they measured as JSON.
"""

import gc
import math

import pytest

from kani_nb import ChatMessage, HuggingEngine
from kani_nb.errors import DoesNotFitError, OutOfMemoryError
from tests.conftest import make_model
from tests.gpu.measured import record

pytestmark = pytest.mark.gpu
QUESTION = [ChatMessage.user("What is the capital of France?")]
SCHEMES = [
    {"dtype": "float16"},
    {"dtype": "bfloat16"},
    {"quantization": "int8"},
    {"quantization": "fp4"},
    {"quantization": "nf4"},
    {"quantization": "nf4", "double_quant": True},
]


@pytest.fixture(autouse=True)
def cuda():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda


@pytest.fixture(scope="session")
def large(tmp_path_factory):
    """A random Llama of 0.5 billion parameters: large enough that allocators' granularity does not count."""
    return make_model(
        tmp_path_factory.mktemp("large"),
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=10,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.02,
    )


def label(options):
    return " ".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize("options", SCHEMES, ids=label)
async def test_every_scheme_answers_and_holds_what_was_planned(smollm2, cuda, options):
    before = cuda.memory_allocated()
    engine = HuggingEngine(str(smollm2), device="cuda", **options)
    await engine.load()
    weights = engine.memory().weight_bytes
    planned = engine.details()["planned_weight_bytes"]
    completion = await engine.predict(QUESTION, do_sample=False, max_new_tokens=16)
    record("smollm2", label(options), weight_bytes=weights, planned_bytes=planned, answer=completion.message.text)
    assert "Paris" in completion.message.text
    assert weights == pytest.approx(planned, rel=0.01)
    await engine.close()
    del engine
    gc.collect()
    assert cuda.memory_allocated() == before


@pytest.mark.parametrize("options", SCHEMES, ids=label)
async def test_the_plan_is_the_allocators_peak(large, cuda, options):
    """Weights, the cache of a full context and the working memory of its prefill, within 5 %."""
    before = cuda.memory_allocated()
    cuda.reset_peak_memory_stats()
    engine = HuggingEngine(str(large), device="cuda", max_context_size=2048, **({"dtype": "bfloat16"} | options))
    await engine.load()
    cuda.reset_peak_memory_stats()
    text = "the quick brown fox jumps over the lazy dog " * 2000
    tokenizer = engine.tokenizer
    ids = tokenizer(text)["input_ids"][: 2048 - 80]
    message = ChatMessage.user(tokenizer.decode(ids))
    while engine.prompt_len([message]) > 2048 - 33:
        message = ChatMessage.user(message.text[:-64])
    await engine.predict([message], do_sample=False, max_new_tokens=32)
    peak = cuda.max_memory_allocated() - before
    row = engine._loaded.placing.row
    record("0.5B llama", label(options), peak_bytes=peak, planned_bytes=row.peak_bytes, weight_bytes=row.weight_bytes)
    assert peak == pytest.approx(row.peak_bytes, rel=0.05)
    await engine.close()


async def test_a_map_of_card_and_cpu_keeps_the_cpus_part_unquantized(large, cuda):
    device_map = {"model.embed_tokens": 0, "model.layers": 0, "model.norm": 0, "model.rotary_emb": 0, "lm_head": "cpu"}
    engine = HuggingEngine(
        str(large),
        device_map=device_map,
        quantization={"load_in_8bit": True, "llm_int8_enable_fp32_cpu_offload": True},
        max_context_size=512,
    )
    completion = await engine.predict(QUESTION, do_sample=False, max_new_tokens=8)
    assert completion.completion_tokens
    assert type(engine.model.lm_head).__name__ == "Linear"
    shares = engine.memory().shares
    record("0.5B llama", "int8, head on the cpu", **{f"{name}_bytes": count for name, count in shares.items()})
    assert set(shares) == {"cuda:0", "cpu"}
    await engine.close()


async def test_what_does_not_fit_is_refused_and_runs_offloaded_when_asked(large, cuda):
    few = {"max_memory": {0: "600MiB", "cpu": "8GiB"}, "dtype": "bfloat16", "max_context_size": 512}
    with pytest.raises(DoesNotFitError, match="--allow-offload"):
        await HuggingEngine(str(large), **few).load()
    engine = HuggingEngine(str(large), allow_offload=True, **few)
    completion = await engine.predict(QUESTION, do_sample=False, max_new_tokens=4)
    assert completion.completion_tokens
    shares = engine.memory().shares
    record("0.5B llama", "offloaded", **{f"{name}_bytes": count for name, count in shares.items()})
    assert shares["cpu"] > 0
    assert shares["cuda:0"] <= 600 * 2**20
    await engine.close()


async def test_running_out_of_memory_leaves_an_engine_that_works(smollm2, cuda):
    engine = HuggingEngine(str(smollm2), device="cuda", max_context_size=8192)
    await engine.load()
    held = cuda.memory_allocated()
    free, total = cuda.mem_get_info()
    cuda.set_per_process_memory_fraction((cuda.memory_reserved() + 48 * 2**20) / total)
    try:
        with pytest.raises(OutOfMemoryError, match="out of memory"):
            await engine.predict([ChatMessage.user("a word " * 7000)], do_sample=False, max_new_tokens=512)
    finally:
        cuda.set_per_process_memory_fraction(1.0)
    completion = await engine.predict(QUESTION, do_sample=False, max_new_tokens=16)
    assert "Paris" in completion.message.text
    record(
        "smollm2", "after out of memory", allocated_bytes=cuda.memory_allocated(), before_bytes=held, free_bytes=free
    )
    await engine.close()


async def test_unloading_gives_everything_back_three_times_over(smollm2, cuda):
    reserved = []
    for _ in range(3):
        engine = HuggingEngine(str(smollm2), device="cuda", quantization="nf4")
        await engine.predict(QUESTION, do_sample=False, max_new_tokens=4)
        await engine.close()
        del engine
        gc.collect()
        reserved.append(cuda.memory_reserved())
    record("smollm2", "reserved after unloading", reserved_bytes=reserved)
    assert reserved[0] == reserved[1] == reserved[2]


async def test_a_saved_model_answers_with_the_same_logits(smollm2, cuda, tmp_path):
    import torch

    for options in SCHEMES[2:]:
        engine = HuggingEngine(str(smollm2), device="cuda", **options)
        await engine.predict(QUESTION, do_sample=False, max_new_tokens=4)
        folder = await engine.save(tmp_path / label(options).replace("=", "-").replace(" ", "-"))
        expected = await engine.log_probs(list(range(40, 104)))
        await engine.close()
        again = HuggingEngine(str(folder), device="cuda")
        assert torch.equal(await again.log_probs(list(range(40, 104))), expected)
        assert math.isfinite(float(expected.sum()))
        await again.close()
