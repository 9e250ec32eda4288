"""Memory that really runs out, in a load and in an answer: one short error, and all of it comes back."""

import pytest

from kani_nb import ChatMessage
from kani_nb.errors import OutOfMemoryError
from tests.engines.asking import answer, engine_of
from tests.memory import MIB, SLACK_BYTES, WIDE_KV_BYTES, held_bytes, only_more

pytestmark = [pytest.mark.memory, pytest.mark.usefixtures("exact_allocator")]

PROMPT = [ChatMessage.user("the quick brown fox")]


@pytest.mark.parametrize("scheme", [None, "int8", "nf4"])
async def test_a_load_without_enough_memory_is_one_short_error_and_frees_everything(
    wide_model, baseline, scheme, caplog
):
    engine = engine_of(wide_model, quantization=scheme)
    await engine.prepare()
    with only_more(40 * MIB), pytest.raises(OutOfMemoryError, match="out of memory while loading"):
        await engine.load()
    assert held_bytes() - baseline < SLACK_BYTES
    assert not [each for each in caplog.records if "LOAD REPORT" in str(each.msg)]
    assert (await answer(engine, PROMPT, max_new_tokens=4)).completion_tokens == 4
    await engine.close()


@pytest.mark.parametrize("scheme", [None, "int8", "nf4"])
@pytest.mark.parametrize("when", ["reading the prompt", "answering"])
async def test_an_answer_without_enough_memory_frees_what_it_held_and_the_engine_goes_on(wide_model, scheme, when):
    engine = engine_of(wide_model, quantization=scheme)
    expected = (await answer(engine, PROMPT, max_new_tokens=4)).message.text
    is_long = when == "reading the prompt"
    tokens = 400 if is_long else 1000
    assert tokens * WIDE_KV_BYTES >= 200 * MIB
    messages = [ChatMessage.user("the lazy dog " * 140)] if is_long else PROMPT
    assert not is_long or engine.prompt_len(messages) >= tokens
    before = held_bytes()
    pieces = []
    said = r"out of memory while .* answering(.|\n)*the engine still works"
    with only_more(90 * MIB), pytest.raises(OutOfMemoryError, match=said):
        async for event in engine.stream(messages, do_sample=False, max_new_tokens=tokens):
            if isinstance(event, str):
                pieces.append(event)
    assert held_bytes() - before < SLACK_BYTES
    assert (await answer(engine, PROMPT, max_new_tokens=4)).message.text == expected
    assert bool(pieces) is not is_long
    assert engine.memory().kv_bytes < 60 * MIB
    assert (await answer(engine, messages, max_new_tokens=4)).completion_tokens == 4, "with the memory that it needs"
    await engine.close()
