"""How one answer is generated, as a frozen record under transformers' names, checked once."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from kani_nb.errors import ConfigError, did_you_mean

#: New tokens per answer unless asked otherwise: visible in every stat line, and never the whole window.
DEFAULT_MAX_NEW_TOKENS = 512
#: Alternatives of a token that can be asked for; what OpenAI's API gives at most.
MAX_ALTERNATIVES = 20


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How one answer is generated, under transformers' names. None leaves the choice to the model's generation config.

    Attributes:
        logprobs: give each token's probability, and so many alternatives; engines that cannot refuse it.
        json_schema: hold the answer to this schema, as JSON; for engines that say so (`BaseEngine.holds_to_schemas`).

    Raises:
        ConfigError: a value outside its range.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    seed: int | None = None
    stop_strings: tuple[str, ...] = ()
    eos_token_id: tuple[int, ...] | None = None
    logprobs: int | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        """Check each value once, here."""
        if self.max_new_tokens is None:
            object.__setattr__(self, "max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
        object.__setattr__(self, "stop_strings", _tuple_of(str, "stop_strings", self.stop_strings or ()))
        if self.eos_token_id is not None:
            object.__setattr__(self, "eos_token_id", _tuple_of(int, "eos_token_id", self.eos_token_id))
        for name, (is_valid, expected) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            try:
                good = not isinstance(value, bool) and is_valid(value)
            except TypeError:
                good = False
            if not good:
                raise ConfigError(f"{name} is {value!r}", why=f"it must be {expected}")
        if any(not text for text in self.stop_strings):
            raise ConfigError("stop_strings holds an empty string", why="it would stop every answer at once")

    @classmethod
    def from_kwargs(
        cls, given: Mapping[str, Any], base: GenerationParams | None = None, also: Collection[str] = ()
    ) -> GenerationParams:
        """`base` with `given` over it; names are transformers' (also `stop`, `max_tokens`, `generator_seed`).

        What else the caller takes, `also`, is offered for a name that is not known.

        Raises:
            ConfigError: a name that is not known, with the near misses; or a value outside its range.
        """
        renamed = {_SYNONYMS.get(name, name): value for name, value in given.items()}
        known = [each.name for each in fields(cls)]
        for name in renamed:
            if name not in known:
                hint = did_you_mean(name, [*known, *also]) or f"known are {', '.join(known)}"
                raise ConfigError(f"unknown generation parameter {name!r}", fix=hint)
        return replace(base or cls(), **renamed)


def _tuple_of(kind: type, name: str, value: Any) -> tuple[Any, ...]:
    """One value of that kind, or several, as a tuple."""
    values = (value,) if isinstance(value, str | numbers.Integral) else tuple(value)
    wanted = numbers.Integral if kind is int else kind
    for each in values:
        if not isinstance(each, wanted):
            raise ConfigError(f"{name} holds {each!r}", why=f"it must be {'a token id' if kind is int else 'text'}")
    return tuple(kind(each) for each in values)


_SYNONYMS = {"stop": "stop_strings", "max_tokens": "max_new_tokens", "generator_seed": "seed"}


def _whole(lowest: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, numbers.Integral) and int(value) >= lowest


def _real(test: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, numbers.Real) and math.isfinite(value) and test(float(value))


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_whole(1), "a whole number of at least 1"),
    "min_new_tokens": (_whole(0), "a whole number of at least 0"),
    "temperature": (_real(lambda value: value >= 0), "a number of at least 0 (0 is greedy)"),
    "top_k": (_whole(0), "a whole number of at least 0 (0 is off)"),
    "top_p": (_real(lambda value: 0 < value <= 1), "in (0, 1]"),
    "min_p": (_real(lambda value: 0 <= value <= 1), "in [0, 1]"),
    "typical_p": (_real(lambda value: 0 < value <= 1), "in (0, 1]"),
    "repetition_penalty": (_real(lambda value: value > 0), "a number above 0 (1 is off)"),
    "no_repeat_ngram_size": (_whole(0), "a whole number of at least 0 (0 is off)"),
    "logprobs": (
        lambda value: isinstance(value, numbers.Integral) and 0 <= int(value) <= MAX_ALTERNATIVES,
        f"a whole number from 0 to {MAX_ALTERNATIVES}: so many alternatives for each token",
    ),
    "seed": (
        lambda value: isinstance(value, numbers.Integral) and 0 <= int(value) < 2**63,
        "a whole number from 0 below 2**63",
    ),
}
