"""The sampling that ctransformers has, from transformers' names; what it has not is refused."""

from __future__ import annotations

from typing import Any

from kani_nb.errors import ConfigError
from kani_nb.generation_params import GenerationParams

_MISSING = ("min_p", "typical_p", "no_repeat_ngram_size", "min_new_tokens", "json_schema")
#: What transformers samples among where nobody says; and its 0, which is every token, as the package spells it.
_TOP_K, _EVERY_TOKEN = 50, 2**30


def sampling_of(params: GenerationParams) -> dict[str, Any]:
    """The arguments of its sampler; a `top_k` of 1 is greedy.

    Raises:
        ConfigError: a parameter that it does not have.
    """
    for name in (*_MISSING, "logprobs"):
        if getattr(params, name) or (name == "logprobs" and params.logprobs is not None):
            raise ConfigError(
                f"{name} is {getattr(params, name)!r}",
                why="ctransformers does not have it",
                fix="leave it out; LlamaCppEngine and HuggingEngine have it",
            )
    penalty = float(params.repetition_penalty or 1)
    asks = any(value is not None for value in (params.temperature, params.top_k, params.top_p))
    does = params.do_sample if params.do_sample is not None else asks
    if not does or params.temperature == 0:
        return {"top_k": 1, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": penalty}
    top_k = _TOP_K if params.top_k is None else params.top_k or _EVERY_TOKEN
    temperature = 1.0 if params.temperature is None else params.temperature
    top_p = 1.0 if params.top_p is None else params.top_p
    return {"top_k": top_k, "top_p": top_p, "temperature": temperature, "repetition_penalty": penalty}
