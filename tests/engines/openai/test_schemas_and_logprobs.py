"""Answers held to a schema, and the probabilities of tokens, as each server is asked for them."""

import json

import pytest

from kani_nb.engines.base import TokenLogprob
from kani_nb.engines.httpclient.sse import ServerEvent
from kani_nb.engines.openai.params import ServerKind, request_fields
from kani_nb.engines.openai.stream import AnswerBuilder
from kani_nb.generation_params import GenerationParams

SCHEMA = {"type": "integer"}


@pytest.mark.parametrize("kind", list(ServerKind))
def test_a_schema_is_asked_for_in_the_servers_own_form(kind):
    fields = request_fields(GenerationParams(json_schema=json.dumps(SCHEMA)), kind)
    asked = fields["response_format"]
    if kind is ServerKind.LLAMACPP_PYTHON:
        assert asked == {"type": "json_object", "schema": SCHEMA}
    else:
        assert asked == {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    assert "response_format" not in request_fields(GenerationParams(), kind)


def test_probabilities_are_asked_for():
    assert request_fields(GenerationParams(logprobs=3), ServerKind.VLLM) | {"logprobs": True, "top_logprobs": 3} == (
        request_fields(GenerationParams(logprobs=3), ServerKind.VLLM)
    )


def read(*logprobs):
    answer = AnswerBuilder(10, str)
    for number, each in enumerate(logprobs):
        choice = {"index": 0, "delta": {"content": f"w{number} "}, "logprobs": each}
        answer.read(ServerEvent(json.dumps({"choices": [choice]})))
    return answer.completion().logprobs


def test_probabilities_are_read_from_each_chunk():
    others = [{"token": "w0 ", "logprob": -0.5}, {"token": "x", "logprob": -1.5}]
    found = read({"content": [{"token": "w0 ", "logprob": -0.5, "top_logprobs": others}]}, {"content": None}, None)
    assert found == (TokenLogprob("w0 ", -0.5, (("w0 ", -0.5), ("x", -1.5))),)


@pytest.mark.parametrize(
    "given", [{"content": [{"token": "a"}]}, {"content": ["a"]}, {"tokens": [1]}, [1], "x", {"content": [None]}]
)
def test_another_form_of_probabilities_is_left_out(given):
    assert read(given) == ()
