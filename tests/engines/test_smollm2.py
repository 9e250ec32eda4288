"""The embedded model, for real: sensible answers, and nothing computed twice."""

import pytest

from kani_nb import BaseCompletion, ChatMessage, HuggingEngine

TURNS = ["Write a short story about a dragon.", "Who was the bravest in it?", "What is the moral?"]


async def converse(folder, **options):
    """Texts, and how many tokens of each prompt the model's own forward really got."""
    engine = HuggingEngine(str(folder), dtype="float32", threads=1, **options)
    await engine.load()
    lengths, history, texts, computed = [], [], [], []
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for question in TURNS:
        history.append(ChatMessage.user(question))
        lengths.clear()
        completion = await engine.predict(history, max_new_tokens=20, do_sample=False)
        history.append(completion.message)
        texts.append(completion.message.text)
        computed.append(sum(lengths) - (completion.completion_tokens - 1))
    await engine.close()
    return texts, computed


async def test_the_capital_of_france_and_where_the_weights_came_from(smollm2):
    engine = HuggingEngine("smollm2")
    prompt = [ChatMessage.user("What is the capital of France?")]
    completion = await engine.predict(prompt, do_sample=False, max_new_tokens=32)
    assert isinstance(completion, BaseCompletion)
    assert "Paris" in completion.message.text
    assert completion.finish_reason == "stop"
    assert "Q4_1" in engine.origin
    assert engine.max_context_size == 8192
    assert engine.memory().weight_bytes == pytest.approx(269e6, rel=0.01)
    await engine.close()


@pytest.mark.slow
async def test_reuse_changes_no_text_and_saves_the_history(smollm2):
    reused, computed = await converse(smollm2)
    fresh, everything = await converse(smollm2, cache_gib=0)
    assert reused == fresh
    assert max(computed[1:]) <= 1.5 * computed[1]
    assert everything[2] > 3 * computed[2]
