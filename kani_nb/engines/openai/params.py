"""Generation parameters as servers take them: common ones by OpenAI's names, the rest only where they are known.

What was asked for is sent or refused, never dropped in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from kani_nb.errors import ConfigError
from kani_nb.generation_params import GenerationParams


class ServerKind(StrEnum):
    """Whose server it is, as far as that can be told."""

    OPENAI = "OpenAI"
    VLLM = "vLLM"
    LLAMACPP = "llama.cpp"
    LLAMACPP_PYTHON = "llama-cpp-python"
    OLLAMA = "Ollama"
    OTHER = "OpenAI-compatible"


#: Servers that hold an answer to a JSON schema.
HOLDING_TO_SCHEMAS = frozenset(ServerKind) - {ServerKind.OTHER}
#: Fields of the chat API that are passed on as they are given.
CHAT_FIELDS = frozenset(
    {
        "frequency_penalty",
        "logit_bias",
        "metadata",
        "modalities",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "reasoning_effort",
        "response_format",
        "service_tier",
        "store",
        "tool_choice",
        "user",
        "verbosity",
        "extra_body",
    }
)
#: What the servers call what OpenAI's API does not have.
_FURTHER: dict[ServerKind, dict[str, str]] = {
    ServerKind.VLLM: {
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repetition_penalty",
        "min_new_tokens": "min_tokens",
        "eos_token_id": "stop_token_ids",
    },
    ServerKind.LLAMACPP: {
        "top_k": "top_k",
        "min_p": "min_p",
        "typical_p": "typical_p",
        "repetition_penalty": "repeat_penalty",
    },
    ServerKind.LLAMACPP_PYTHON: {
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repeat_penalty",
        "min_new_tokens": "min_tokens",
    },
}
#: Values that ask for nothing.
_IDLE = {
    "top_k": 0,
    "min_p": 0,
    "typical_p": 1,
    "repetition_penalty": 1,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
}
_SAID_OTHERWISE = {"max_completion_tokens": "max_new_tokens"}


def split_hyperparams(
    given: Mapping[str, Any], base: GenerationParams, fields: Mapping[str, Any]
) -> tuple[GenerationParams, dict[str, Any]]:
    """`base` and `fields` of the chat API with `given` over them.

    Raises:
        ConfigError: a name that is neither a generation parameter nor a field of the API, or a value out of range.
    """
    said = {_SAID_OTHERWISE.get(name, name): value for name, value in given.items()}
    passed = {name: value for name, value in said.items() if name in CHAT_FIELDS}
    rest = {name: value for name, value in said.items() if name not in CHAT_FIELDS}
    return GenerationParams.from_kwargs(rest, base, also=sorted(CHAT_FIELDS)), {**fields, **passed}


def request_fields(
    params: GenerationParams, kind: ServerKind, *, max_tokens_name: str = "max_tokens"
) -> dict[str, Any]:
    """The fields of a request that say how to generate.

    Raises:
        ConfigError: something is asked for that this server has no field for.
    """
    fields: dict[str, Any] = {max_tokens_name: params.max_new_tokens}
    if params.do_sample is False:
        fields["temperature"] = 0  # greedy, whatever else was said
    elif params.temperature is not None:
        fields["temperature"] = params.temperature
    fields |= {name: value for name in ("top_p", "seed") if (value := getattr(params, name)) is not None}
    if params.stop_strings:
        fields["stop"] = list(params.stop_strings)
    if params.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": params.logprobs}
    if params.json_schema is not None:
        fields["response_format"] = _response_format(json.loads(params.json_schema), kind)
    known = _FURTHER.get(kind, {})
    for name in (*_IDLE, "eos_token_id"):
        value = getattr(params, name)
        if value is None or (name not in known and value == _IDLE.get(name)):
            continue
        if name not in known:
            raise ConfigError(
                f"{name} is {value!r}",
                why=f"the {kind} server has no field for it",
                fix="leave it out, or pass what the server calls it in extra_body={...}",
            )
        fields[known[name]] = list(value) if isinstance(value, tuple) else value
    return fields


def _response_format(schema: dict[str, Any], kind: ServerKind) -> dict[str, Any]:
    """What holds an answer to a schema, as this server is told of it."""
    if kind is ServerKind.LLAMACPP_PYTHON:
        return {"type": "json_object", "schema": schema}
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
