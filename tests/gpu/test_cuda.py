"""The engine on a CUDA device: `python -m pytest -m gpu`."""

import pytest

from kani_nb import ChatMessage, HuggingEngine
from kani_nb.metrics.sampler import MemorySampler

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def cuda():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    return torch


async def converse(engine):
    history, cached = [], []
    for question in ("What is the capital of France?", "the quick brown fox", "and?"):
        history.append(ChatMessage.user(question))
        completion = await engine.predict(history, do_sample=False, max_new_tokens=24)
        history.append(completion.message)
        cached.append(completion.cached_tokens)
    return [message.text for message in history], cached


async def test_reuse_changes_no_text_and_closing_frees_the_memory(cuda, tiny_model):
    texts = []
    before = cuda.cuda.memory_allocated()
    for cache_gib in (None, 0):
        engine = HuggingEngine(str(tiny_model), dtype="float32", device="cuda", cache_gib=cache_gib)
        await engine.load()
        assert engine.memory().device == "cuda:0"
        text, cached = await converse(engine)
        texts.append(text)
        assert any(cached) is (cache_gib is None)
        await engine.close()
        assert cuda.cuda.memory_allocated() == before
    assert texts[0] == texts[1]


async def test_the_peak_is_the_allocators_own(cuda, smollm2):
    engine = HuggingEngine(str(smollm2), device="cuda")
    await engine.load()
    with MemorySampler(engine.memory().device) as sampler:
        await converse(engine)
    assert sampler.peak_source == "cuda"
    assert sampler.peak_bytes == pytest.approx(cuda.cuda.max_memory_allocated(), rel=0.01)
    assert sampler.peak_bytes > engine.memory().weight_bytes
    await engine.close()
