"""Answers held to a JSON schema by the engine, and each token's probability, on real models."""

import json
import math

import pydantic
import pytest

from kani_nb import ChatMessage
from kani_nb.conversation.structured import Structure
from kani_nb.errors import ConfigError
from tests.conftest import CHAT_TEMPLATE, make_model
from tests.engines.asking import answer, engine_of
from tests.engines.speaking import speak

ASK = [ChatMessage.user("a city, please")]


class City(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=5)
    size: int = pydantic.Field(ge=0, le=99)


@pytest.mark.parametrize(
    "sampling", [{}, {"do_sample": True, "temperature": 2.0, "seed": 3}], ids=["greedy", "sampled"]
)
async def test_a_model_of_random_weights_can_say_nothing_but_json_that_fits(engine, sampling):
    params = {"max_new_tokens": 200, "json_schema": Structure(City).schema_text, **sampling}
    completion = await answer(engine, ASK, **params)
    assert City.model_validate_json(completion.message.text)
    assert completion.finish_reason == "stop"
    # The next answer is free again, and what it was is not changed by the schema of another.
    free = await answer(engine, ASK)
    assert free.message.text == (await answer(engine, ASK)).message.text


async def test_a_schema_that_no_answer_can_be_held_to_is_refused_before_anything_is_computed(engine):
    with pytest.raises(ConfigError, match="cannot be held to this schema"):
        await answer(engine, ASK, json_schema='{"type": "nonsense"}')
    assert (await answer(engine, ASK)).completion_tokens


async def test_reasoning_that_the_prompt_opens_is_free_and_only_the_answer_is_held(tmp_path):
    template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}{# </think> #}")
    engine = engine_of(make_model(tmp_path / "m", chat_template=template))
    await engine.load()
    # What it thinks is scripted up to the end of its thoughts; after that no token of the script would be allowed.
    opening = "<think>\n"
    speak(engine, f"{opening}Hm.</think>")
    completion = await answer(
        engine, ASK, json_schema='{"type": "integer", "minimum": 0, "maximum": 9}', max_new_tokens=40
    )
    assert "Hm." in completion.message.reasoning
    assert completion.message.text in set("0123456789")
    await engine.close()


async def test_each_token_has_its_probability_and_others_beside_it(engine):
    import torch

    completion = await answer(engine, ASK, logprobs=3, max_new_tokens=6)
    assert len(completion.logprobs) == completion.completion_tokens == 6
    assert "".join(each.text for each in completion.logprobs) == completion.message.text
    ids = engine.prompt_ids(ASK)
    said = engine.tokenizer.encode(completion.message.text, add_special_tokens=False)
    expected = await engine.log_probs([*ids, *said])
    for number, token in enumerate(completion.logprobs):
        row = expected[len(ids) - 1 + number]
        assert token.logprob == pytest.approx(float(row.max()), abs=1e-3)
        assert token.probability == pytest.approx(math.exp(token.logprob))
        assert len(token.alternatives) == 3
        assert token.alternatives[0] == (token.text, pytest.approx(token.logprob))
        best = torch.topk(row, 3).values.tolist()
        assert [value for _, value in token.alternatives] == pytest.approx(best, abs=1e-3)
    assert (await answer(engine, ASK, max_new_tokens=3)).logprobs == ()
    sampled = await answer(engine, ASK, logprobs=0, do_sample=True, seed=1, max_new_tokens=3)
    assert [each.alternatives for each in sampled.logprobs] == [(), (), ()]


async def test_the_callers_end_of_sequence_ends_a_held_answer_too(engine):
    other = engine.tokenizer.encode("z")[0]
    completion = await answer(engine, ASK, json_schema='{"type": "boolean"}', eos_token_id=other, max_new_tokens=60)
    assert isinstance(json.loads(completion.message.text), bool)
    assert completion.finish_reason == "stop"


async def test_more_tokens_than_the_schema_has_room_for_cannot_be_had(engine):
    held = {"json_schema": '{"type": "boolean"}', "do_sample": True, "seed": 1, "min_new_tokens": 40}
    assert isinstance(json.loads((await answer(engine, ASK, max_new_tokens=60, **held)).message.text), bool)


def test_a_schema_that_cannot_be_held_is_known_before():
    assert not Structure(set[int]).can_be_held_to
    assert Structure(list[int]).can_be_held_to


async def test_logprobs_and_a_schema_go_together(engine):
    completion = await answer(engine, ASK, logprobs=1, json_schema='{"type": "boolean"}', max_new_tokens=20)
    assert isinstance(json.loads(completion.message.text), bool)
    assert len(completion.logprobs) == completion.completion_tokens


@pytest.mark.parametrize("value", [-1, 21, True, "3"])
async def test_a_number_of_alternatives_that_cannot_be_is_refused(engine, value):
    with pytest.raises(ConfigError, match="logprobs is"):
        await answer(engine, ASK, logprobs=value)
