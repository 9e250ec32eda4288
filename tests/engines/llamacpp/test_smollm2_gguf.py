"""The embedded model's own GGUF, for real: sensible answers, and nothing computed twice."""

import pytest

from kani_nb import ChatMessage
from kani_nb.config import EngineConfig
from kani_nb.engines.llamacpp import LlamaCppEngine
from kani_nb.errors import ModelUnavailableError

pytestmark = pytest.mark.llamacpp


@pytest.fixture
async def smollm2_gguf():
    engine = LlamaCppEngine.from_config(EngineConfig("llamacpp:smollm2", threads=1, max_context_size=2048))
    try:
        await engine.load()
    except ModelUnavailableError as error:
        pytest.skip(f"the embedded model cannot be had: {error}")
    yield engine
    await engine.close()


async def test_it_knows_the_capital_and_a_second_turn_computes_only_what_is_new(smollm2_gguf):
    engine = smollm2_gguf
    # Without the last three words two first tokens are so near to each other that rounding decides.
    history = [ChatMessage.user("What is the capital of France? Answer in English.")]
    first = await engine.predict(history, do_sample=False, max_new_tokens=32)
    assert first.message.text == "The capital of France is Paris."
    assert first.finish_reason == "stop"
    held = first.prompt_tokens + first.completion_tokens - 1
    history += [first.message, ChatMessage.user("And of Italy?")]
    second = await engine.predict(history, do_sample=False, max_new_tokens=32)
    assert second.cached_tokens == held
    assert second.prompt_tokens == engine.prompt_len(history)
    assert "Q4_1" in engine.origin
    assert engine.memory().weight_bytes == pytest.approx(96.6e6, rel=0.01)
    assert engine.memory().kv_bytes == 30 * 2 * 3 * 64 * 2 * 2048


async def test_its_prompts_are_those_of_transformers(smollm2_gguf, smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    history = [
        ChatMessage.user("Grüße aus Köln! 你好 👩‍👩‍👧‍👦\n\n  def f(x):\n\treturn x ** 2  # 12345"),
        ChatMessage.assistant("It is a function."),
        ChatMessage.user(""),
    ]
    records = [{"role": each.role.value, "content": each.content} for each in history]
    expected = tokenizer.apply_chat_template(records, add_generation_prompt=True, return_dict=False)
    assert smollm2_gguf.prompt_ids(history) == expected
