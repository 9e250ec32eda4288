"""What is reused changes no text, costs no memory beyond its budget, and saves what it can."""

import itertools

import pytest

from kani_nb import ChatMessage
from kani_nb.engines.base import FinishReason
from tests.engines.asking import QUESTIONS, answer, converse, engine_of, forward_lengths


@pytest.mark.parametrize("model", ["tiny_model", "sliding_model"])
async def test_text_is_identical_with_reuse_and_without(model, request):
    folder, texts = request.getfixturevalue(model), []
    for cache_gib in (None, 0):
        engine = engine_of(folder, cache_gib=cache_gib)
        await engine.load()
        _, completions = await converse(engine)
        texts.append([each.message.text for each in completions])
        assert all((each.cached_tokens > 0) is (cache_gib is None) for each in completions[1:])
        assert engine.memory().kv_bytes == 0 or cache_gib is None
        await engine.close()
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == len(QUESTIONS), "answers that are all alike would prove nothing"


async def test_a_turn_computes_only_what_is_new(engine):
    lengths = forward_lengths(engine)
    _, completions = await converse(engine)
    decoded = sum(each.completion_tokens for each in completions)
    computed = sum(each.prompt_tokens - each.cached_tokens for each in completions)
    stopped_short = sum(each.finish_reason is FinishReason.LENGTH for each in completions)
    assert sum(lengths) == computed + decoded - len(completions)
    assert stopped_short, "answers of the full length are what later prompts must find again"
    for before, after in itertools.pairwise(completions):
        assert after.cached_tokens >= before.prompt_tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_a_retry_gives_the_same_text_bit_for_bit(tiny_model, dtype):
    engine = engine_of(tiny_model, dtype=dtype)
    await engine.load()
    history, completions = await converse(engine)
    for turn in (3, 0, 2, 1, 3):
        again = await answer(engine, history[: 2 * turn + 1])
        assert again.message.text == completions[turn].message.text
    assert again.cached_tokens > 0
    await engine.close()


async def test_an_edited_turn_reuses_what_stands_before_it(tiny_model):
    engine = engine_of(tiny_model, cache_gib=0.01)
    fresh = engine_of(engine.model_id, cache_gib=0)
    history, _ = await converse(engine)
    edited = [*history[:4], ChatMessage.user("something quite different")]
    reused, expected = await answer(engine, edited), await answer(fresh, edited)
    assert reused.message.text == expected.message.text
    assert reused.cached_tokens >= engine.prompt_len(history[:3])
    back = await answer(engine, [*history, ChatMessage.user("more")])
    assert back.cached_tokens >= engine.prompt_len(history[:-1]), "the old branch kept its states"
    await engine.close()
    await fresh.close()


async def test_two_conversations_do_not_cost_each_other_their_states(tiny_model):
    engine = engine_of(tiny_model, cache_gib=0.01)
    system = ChatMessage.system("Hello, how are you today? I am fine, thank you. " * 3)
    histories = [[system], [system]]
    for round_number, history in itertools.product(range(3), histories):
        history.append(ChatMessage.user(f"{QUESTIONS[round_number]} {histories.index(history)}"))
        completion = await answer(engine, history)
        if round_number:
            assert completion.cached_tokens >= engine.prompt_len(history[:-2]), "all but the newest turn"
        history.append(completion.message)
    await engine.close()


async def test_a_full_sliding_window_is_never_cropped_to_a_wrong_answer(sliding_model):
    engine, fresh = engine_of(sliding_model), engine_of(sliding_model, cache_gib=0)
    await engine.load()
    history, _ = await converse(engine)
    for prompt in (history[:5], [*history[:4], ChatMessage.user("other")], [*history, ChatMessage.user("on")]):
        assert (await answer(engine, prompt)).message.text == (await answer(fresh, prompt)).message.text
    await engine.close()
    await fresh.close()


async def test_the_states_never_take_more_than_the_budget(tiny_model):
    engine = engine_of(tiny_model, cache_gib=300 * 1024 / 2**30)
    await engine.load()
    for number in range(12):
        await converse(engine, [f"{number} {question}" for question in QUESTIONS[:2]])
        assert engine.memory().kv_bytes <= 300 * 1024
    assert engine.memory().kv_bytes > 0
    await engine.close()
