"""How LlamaCppEngine answers: what it reuses, how it stops, what the parameters do."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from contextlib import aclosing

import pytest

from kani_nb import ChatMessage
from kani_nb.engines.base import PrefillProgress, TextDelta, ToolCallDelta
from kani_nb.engines.llamacpp import LlamaCppEngine
from kani_nb.engines.llamacpp.native import load_native
from kani_nb.errors import ConfigError, GenerationError, PromptTooLongError
from tests.engines.llamacpp.tiny_gguf import write_gguf

pytestmark = pytest.mark.llamacpp

FOX = [ChatMessage.user("the quick brown fox jumps over the lazy dog")]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


async def answer(engine, messages=FOX, **params):
    return await engine.predict(messages, **{**GREEDY, **params})


async def conversation(path, **options):
    """Texts and cached tokens of three turns, a retry, an edit of the first message, and the former branch again."""
    engine = LlamaCppEngine(model_path=path, threads=1, model_load_kwargs={"n_batch": 8, "n_ubatch": 8}, **options)
    told, history = [], []
    for text in ("the quick brown fox", "and more", "Hello, how are you today?"):
        history.append(ChatMessage.user(text))
        told.append(await answer(engine, history))
        history.append(told[-1].message)
    told.append(await answer(engine, history[:5]))
    told.append(await answer(engine, [ChatMessage.user("the quick brown dog"), *history[1:5]]))
    told.append(await answer(engine, history[:3]))
    await engine.close()
    return [each.message.text for each in told], [each.cached_tokens for each in told], told


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba"])
async def test_reuse_changes_no_text(kind, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", kind)
    reused, cached, _ = await conversation(path)
    fresh, none, _ = await conversation(path, cache_gib=0)
    assert reused == fresh
    assert none == [0] * 6
    if kind == "llama":
        assert all(cached[1:])
    if kind == "mamba":  # its states cannot be cut: only what goes on from their end reuses them
        assert cached[3] == cached[5] == 0


async def test_a_second_turn_computes_only_what_is_new(engine):
    first = await answer(engine)
    held = list(engine._native.ids)
    longer = [*FOX, first.message, ChatMessage.user("and more")]
    assert engine.prompt_ids(longer)[: len(held)] == held  # the answer in the tokens that it was generated in
    second = await answer(engine, longer)
    assert second.cached_tokens == len(held)
    assert second.prompt_tokens == engine.prompt_len(longer)


async def test_an_edit_reuses_what_stands_before_it(engine):
    await answer(engine, [*FOX, ChatMessage.assistant("one two three"), ChatMessage.user("four")])
    edited = await answer(engine, [*FOX, ChatMessage.assistant("one two three"), ChatMessage.user("five")])
    assert 0 < edited.cached_tokens < edited.prompt_tokens


async def test_a_prompt_comes_in_chunks_and_says_so(engine):
    events = [event async for event in engine.stream(FOX, **GREEDY)]
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    total = engine.prompt_len(FOX)
    assert [each.done_tokens for each in progress] == list(range(0, total, 8))
    assert {each.total_tokens for each in progress} == {total}
    assert [each.tokens for each in events if isinstance(each, TextDelta)][-1] == events[-1].completion_tokens


async def test_a_stop_is_seen_between_the_chunks_of_a_prompt(engine):
    long = [ChatMessage.user("brown fox " * 100)]
    async with aclosing(engine.stream(long, **GREEDY)) as events:
        async for event in events:
            if isinstance(event, PrefillProgress) and event.done_tokens:
                break
    alone = await answer(engine)
    assert alone.message.text
    assert alone.cached_tokens < 30  # only the template's beginning is shared


def test_a_stop_ends_a_computation_in_its_middle(tmp_path):
    native = load_native(
        write_gguf(tmp_path / "tiny.gguf", context=4096),
        settings={"n_batch": 4096, "n_ubatch": 4096},
        context_tokens=4096,
        threads=1,
        use_gpu=False,
        report=lambda _: None,
        cancelled=threading.Event(),
    )
    tokens = [20 + number % 300 for number in range(2000)]
    stop = threading.Event()
    with native.stoppable(stop):
        assert native.compute(tokens[:10])
        stop.set()
        while native.compute(tokens[10:]):  # until the other thread has seen it
            native.go_back(10)
    assert native.ids == tokens[:10]
    with native.stoppable(threading.Event()):
        assert native.compute(tokens[10:])
    assert native.ids == tokens
    native.close()
    native.close()
    with pytest.raises(GenerationError, match="closed"):
        native.compute(tokens[:1])


async def test_closing_ends_an_answer_and_frees(engine):
    long = {"max_new_tokens": 400, "eos_token_id": [0]}
    running = asyncio.ensure_future(engine.predict(FOX, **long))
    async with aclosing(engine.stream(FOX, **long)) as events:
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        await engine.close()
        assert engine.memory() is None
        assert (await running).finish_reason in ("cancelled", "length")
        with pytest.raises(GenerationError, match="unloaded meanwhile"):
            await waiting
    assert (await answer(engine)).message.text  # it loads again


# -- parameters --------------------------------------------------------------------------------------------------------


async def test_greedy_answers_repeat_and_have_no_seed(engine):
    first, again = await answer(engine), await answer(engine)
    assert first.message.text == again.message.text
    assert first.seed is None
    for same in ({"temperature": 0.0}, {"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        assert (await answer(engine, do_sample=None, **same)).message.text == first.message.text


async def test_sampled_answers_follow_their_seed(engine):
    hot = {"do_sample": True, "temperature": 3.0, "top_k": 0}
    texts = {seed: (await answer(engine, seed=seed, **hot)).message.text for seed in (1, 2, 2**62 + 1)}
    assert len(set(texts.values())) == 3
    for seed, text in texts.items():
        again = await answer(engine, seed=seed, **hot)
        assert (again.message.text, again.seed) == (text, seed)
    drawn = await answer(engine, **hot)
    assert (await answer(engine, seed=drawn.seed, **hot)).message.text == drawn.message.text


async def test_few_choices_sample_among_few_tokens(engine):
    one = {"max_new_tokens": 1, "do_sample": True, "temperature": 5.0}
    free = {(await answer(engine, seed=seed, top_k=0, **one)).message.text for seed in range(30)}
    for limited in ({"top_k": 2}, {"min_p": 0.9, "top_k": 0}, {"top_p": 0.02, "top_k": 0}, {"typical_p": 0.02}):
        texts = {(await answer(engine, seed=seed, **{**one, **limited})).message.text for seed in range(30)}
        assert len(texts) < len(free)


async def test_a_repetition_is_penalised_or_forbidden(engine):
    ids = engine.prompt_ids(FOX)
    await answer(engine, max_new_tokens=60, repetition_penalty=1e6)
    penalised = (engine._native.ids)[len(ids) :]
    assert len(set(penalised)) == len(penalised)
    assert not set(penalised) & set(ids)
    await answer(engine, max_new_tokens=60, no_repeat_ngram_size=2)
    whole = engine._native.ids
    pairs = list(zip(whole[len(ids) - 1 :], whole[len(ids) :], strict=False))
    assert len(set(pairs)) == len(pairs)


async def test_an_answer_ends_at_its_end_token_and_not_before_it_may(engine):
    await answer(engine, max_new_tokens=2)
    first = engine._native.ids[-1]
    ended = await answer(engine, eos_token_id=first)
    assert (ended.message.text, ended.completion_tokens, ended.finish_reason) == ("", 1, "stop")
    longer = await answer(engine, eos_token_id=first, min_new_tokens=5)
    assert longer.completion_tokens >= 5


async def test_stop_strings_end_the_answer_before_them(engine):
    text = (await answer(engine)).message.text
    stop = text[4:7]
    stopped = await answer(engine, stop=[stop])
    assert stopped.message.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"


async def test_characters_of_several_tokens_are_never_halved(spm_gguf):
    engine = LlamaCppEngine(model_path=spm_gguf, threads=1, prompt_pipeline=lambda messages, _: messages[-1].text)
    texts = []
    for seed in range(20):
        events = [event async for event in engine.stream(FOX, max_new_tokens=30, temperature=5.0, top_k=6, seed=seed)]
        pieces = [str(event) for event in events if isinstance(event, TextDelta)]
        assert "".join(pieces) == events[-1].message.text
        texts += pieces
    assert any("é" in text for text in texts)
    await engine.close()


async def test_the_file_may_recommend_how_to_sample(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", metadata={"general.sampling.temp": 2.0})
    engine = LlamaCppEngine(model_path=path, threads=1)
    params = {"max_new_tokens": 8}
    assert (await engine.predict(FOX, **params)).seed is not None
    assert (await engine.predict(FOX, do_sample=False, **params)).seed is None
    await engine.close()


async def test_defaults_and_names_of_others_are_taken(llama_gguf):
    engine = LlamaCppEngine(model_path=llama_gguf, threads=1, max_tokens=3, repeat_penalty=1.5)
    assert engine.generation.repetition_penalty == 1.5
    assert (await engine.predict(FOX)).completion_tokens == 3
    with pytest.raises(ConfigError, match="temperatur"):
        await engine.predict(FOX, temperatur=1)
    await engine.close()


# -- what an answer is -------------------------------------------------------------------------------------------------


def population(city: str) -> int:
    """How many people live in a city."""


CALL = {
    "type": "object",
    "properties": {
        "name": {"const": "population"},
        "arguments": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "arguments"],
    "additionalProperties": False,
}


async def test_an_answer_can_be_held_to_a_schema_and_a_call_is_read_out_of_it(engine):
    pytest.importorskip("llguidance")
    held = {"max_new_tokens": 200, "do_sample": False, "json_schema": json.dumps(CALL)}
    said = await engine.predict(FOX, **held)
    assert json.loads(said.message.text)["arguments"]["city"] in ("Paris", "Rome")
    assert said.finish_reason == "stop"
    events = [event async for event in engine.stream(FOX, [population], **held)]
    assert [event.name for event in events if isinstance(event, ToolCallDelta)] == ["population"]
    assert events[-1].finish_reason == "tool_calls"
    assert events[-1].message.tool_calls[0].function.kwargs == json.loads(said.message.text)["arguments"]
    with pytest.raises(ConfigError, match="schema"):
        await engine.predict(FOX, json_schema='{"type": "no such type"}')
    assert (await answer(engine)).message.text


@pytest.mark.parametrize(
    "further", [{"min_new_tokens": 150, "do_sample": True}, {"eos_token_id": [300]}], ids=["least", "own end"]
)
async def test_whole_json_ends_the_answer_whatever_else_is_asked(engine, further):
    pytest.importorskip("llguidance")
    held = {"max_new_tokens": 200, "do_sample": False, "json_schema": json.dumps(CALL)}
    said = await engine.predict(FOX, **held | further)
    assert json.loads(said.message.text)["name"] == "population"
    assert said.finish_reason == "stop"
    assert said.completion_tokens < 150


async def test_reasoning_is_kept_apart_where_the_template_shows_it(tmp_path):
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}<think>"
    engine = LlamaCppEngine(model_path=write_gguf(tmp_path / "tiny.gguf", template=template), threads=1)
    completion = await answer(engine)
    assert completion.message.text == ""
    assert completion.message.reasoning
    await engine.close()


async def test_each_token_can_be_given_with_its_probability_and_alternatives(engine):
    completion = await answer(engine, logprobs=3)
    assert len(completion.logprobs) == completion.completion_tokens
    assert "".join(each.text for each in completion.logprobs) == completion.message.text
    for each in completion.logprobs:
        assert each.alternatives[0] == (each.text, each.logprob)
        assert 0 < sum(math.exp(value) for _, value in each.alternatives) <= 1
    assert not (await answer(engine)).logprobs


# -- limits ------------------------------------------------------------------------------------------------------------


async def test_a_prompt_may_fill_the_context_to_the_last_token_but_one(llama_gguf):
    engine = LlamaCppEngine(model_path=llama_gguf, threads=1, max_context_size=64)
    words = 1
    while engine.prompt_len([ChatMessage.user("fox " * words)]) < 63:
        words += 1
    full = [ChatMessage.user("fox " * words)]
    if engine.prompt_len(full) == 63:
        last = await answer(engine, full)
        assert (last.completion_tokens, last.finish_reason) == (1, "length")
    with pytest.raises(PromptTooLongError, match="64 of prompt and answer"):
        await answer(engine, [ChatMessage.user("fox " * (words + 2))])
    assert (await answer(engine)).message.text
    await engine.close()


async def test_it_says_what_it_holds(engine):
    memory = engine.memory()
    # 2 layers, keys and values of 2 heads of 16 numbers in half precision, for 512 tokens
    assert memory.kv_bytes == 2 * 2 * 2 * 16 * 2 * 512
    assert memory.weight_bytes == engine.details()["parameters"] * 4
    assert memory.device == "cpu"
    assert engine.max_context_size == 512
    assert engine.details()["chunk_tokens"] == 8
