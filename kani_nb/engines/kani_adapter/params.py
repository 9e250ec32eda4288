"""Which generation parameters an engine of the kani package takes, and what it calls them.

kani passes hyperparameters on to each provider under the provider's own names. Here ours, transformers', are translated
for the families that kani has; an engine that is of none of them is given ours as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kani_nb.errors import ConfigError
from kani_nb.generation_params import GenerationParams
from kani_nb.messages import ChatMessage

_OURS = tuple(each.name for each in fields(GenerationParams))
#: What engines of this package can, and none of kani's, with one of ours that can.
_OURS_ALONE = {
    "logprobs": "%load_engine MODEL, llamacpp:FILE.gguf or openai:MODEL can give them",
    "json_schema": "%load_engine MODEL or llamacpp:FILE.gguf can be held to one",
}


@dataclass(frozen=True, slots=True)
class Family:
    """Engines that take the same parameters.

    Attributes:
        names: our name to theirs; what is not in it cannot be said to them.
        strips: whether they take the whitespace around an answer off its message, but not off its stream.
        generates_here: whether they compute in this process, where an answer without a limit fills the context.
    """

    name: str
    names: Mapping[str, str]
    strips: bool = False
    generates_here: bool = False

    def translated(self, given: Mapping[str, Any], engine: str) -> dict[str, Any]:
        """`given`, of our names, as the engine takes it.

        Raises:
            ConfigError: a parameter that the family has not.
        """
        made: dict[str, Any] = {}
        for name, value in given.items():
            if name == "do_sample" and name not in self.names:
                continue
            if name not in self.names:
                raise ConfigError(
                    f"{engine} has no {name}",
                    why=f"what it takes of an answer's parameters: {', '.join(self.names)}",
                    fix=_OURS_ALONE.get(
                        name, "leave it out, or give it to the engine's constructor under the provider's own name"
                    ),
                )
            made[self.names[name]] = list(value) if isinstance(value, tuple) else value
        if given.get("do_sample") is False and "do_sample" not in self.names:
            made[self.names["temperature"]] = 0.0  # how providers say it
        return made


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_SAMPLING = _same("temperature", "top_p")
_HUGGINGFACE = Family(
    "huggingface",
    _same(*(name for name in _OURS if name not in ("seed", *_OURS_ALONE))),
    strips=True,
    generates_here=True,
)
_LLAMACPP = Family(
    "llamacpp",
    _same("temperature", "top_k", "top_p", "min_p", "typical_p", "seed")
    | {"max_new_tokens": "max_tokens", "repetition_penalty": "repeat_penalty", "stop_strings": "stop"},
    strips=True,
    generates_here=True,
)
_OPENAI = Family("openai", _SAMPLING | {"max_new_tokens": "max_tokens", "seed": "seed", "stop_strings": "stop"})
_OPENAI_RESPONSES = Family("openai", _SAMPLING | {"max_new_tokens": "max_output_tokens"})
_ANTHROPIC = Family(
    "anthropic", _SAMPLING | _same("top_k") | {"max_new_tokens": "max_tokens", "stop_strings": "stop_sequences"}
)
_GOOGLE = Family(
    "google",
    _SAMPLING | _same("top_k", "seed") | {"max_new_tokens": "max_output_tokens", "stop_strings": "stop_sequences"},
)
_VLLM = Family(
    "vllm",
    _same("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    | {"max_new_tokens": "max_tokens", "stop_strings": "stop"},
    generates_here=True,
)
_OTHER = Family("other", _same(*_OURS))
_BY_MODULE = {
    "kani.engines.huggingface": _HUGGINGFACE,
    "kani.engines.llamacpp": _LLAMACPP,
    "kani.engines.openai": _OPENAI,
    "kani.engines.anthropic": _ANTHROPIC,
    "kani.engines.google": _GOOGLE,
    "kani.ext.vllm": _VLLM,
}


def innermost(engine: Any) -> Any:
    """The engine inside kani's wrappers (parsers of tool calls and reasoning, for example)."""
    from kani_nb.engines.kani_adapter.messages import kani_module

    wrapper = kani_module("kani.engines.base").WrapperEngine
    while isinstance(engine, wrapper):
        engine = engine.engine
    return engine


def family_of(engine: Any) -> Family:
    """The family of an engine of kani, by the module of its class or of one it derives from."""
    inner = innermost(engine)
    family = _family_of_class(type(inner))
    is_responses = family is _OPENAI and getattr(inner, "openai_api_type", None) == "responses"
    return _OPENAI_RESPONSES if is_responses else family


def is_of_a_service(engine_class: type) -> bool:
    """Whether engines of this class ask a service, and so take no memory here worth the name."""
    return _family_of_class(engine_class) in (_OPENAI, _ANTHROPIC, _GOOGLE)


def _family_of_class(engine_class: type) -> Family:
    for kind in engine_class.__mro__:
        for module, family in _BY_MODULE.items():
            if f"{kind.__module__}.".startswith(f"{module}."):
                return family
    return _OTHER


@dataclass(frozen=True, slots=True)
class Asked:
    """What a caller asked of an answer, checked: the values, and whether the limit was a choice of somebody's."""

    params: GenerationParams
    has_limit: bool

    @classmethod
    def of(cls, given: Mapping[str, Any], base: GenerationParams | None) -> Asked:
        """Of a call's hyperparameters over the engine's defaults.

        Raises:
            ConfigError: a name that is not known, or a value outside its range.
        """
        has_limit = base is not None or bool({"max_new_tokens", "max_tokens"} & given.keys())
        return cls(GenerationParams.from_kwargs(given, base), has_limit)

    def hyperparams(self, engine: Any, family: Family, room: int) -> dict[str, Any]:
        """What `engine` is called with, for an answer of at most `room` tokens.

        Raises:
            ConfigError: a parameter that the engine's family has not.
        """
        values = {name: getattr(self.params, name) for name in _OURS}
        given = {name: value for name, value in values.items() if value is not None and value != ()}
        if self.has_limit or (family.generates_here and not _has_own_limit(engine, family)):
            given["max_new_tokens"] = min(self.params.max_new_tokens, room)
        else:
            del given["max_new_tokens"]
        if family is _HUGGINGFACE:
            if given.get("temperature") == 0:
                del given["temperature"]
                given["do_sample"] = False
            if "stop_strings" in given:  # transformers finds them in the text
                return family.translated(given, type(engine).__name__) | {"tokenizer": innermost(engine).tokenizer}
        return family.translated(given, type(engine).__name__)

    def limit(self, hyperparams: Mapping[str, Any], family: Family) -> int | None:
        """The most tokens of the answer, where one was set."""
        limit = hyperparams.get(family.names["max_new_tokens"])
        return limit if isinstance(limit, int) else None


def _has_own_limit(engine: Any, family: Family) -> bool:
    own = getattr(innermost(engine), "hyperparams", None)
    return isinstance(own, Mapping) and family.names["max_new_tokens"] in own


@contextlib.contextmanager
def limit_held(engine: Any, family: Family, hyperparams: dict[str, Any]) -> Iterator[None]:
    """Give a limit to kani's engine for Anthropic, which fails on one among a call's hyperparameters.

    It has its limit as an attribute, which is the call's for so long: calls take turns.
    """
    inner = innermost(engine)
    if family is not _ANTHROPIC or "max_tokens" not in hyperparams or not hasattr(inner, "max_tokens"):
        yield
        return
    before, inner.max_tokens = inner.max_tokens, hyperparams.pop("max_tokens")
    try:
        yield
    finally:
        inner.max_tokens = before


class StreamedText:
    """The pieces of a stream, so that joined they are the text of the answer's message."""

    def __init__(self, *, strips: bool) -> None:
        self._strips = strips
        self._held = ""
        self.said = ""

    def piece(self, text: str) -> str:
        """What of `text` can be shown now: whitespace that may turn out to be the last is held back."""
        if not self._strips:
            self.said += text
            return text
        text = self._held + text
        if not self.said:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self.said += shown
        return shown

    def rest(self, text: str) -> str:
        """What the message has beyond the stream, if it goes on from there; that is said then, too."""
        rest = text[len(self.said) :] if text.startswith(self.said) else ""
        self.said += rest
        return rest

    def reconciled(self, message: ChatMessage) -> ChatMessage:
        """The message with the stream's text, where they differ in the whitespace around it alone."""
        is_text = isinstance(message.content, str)
        if is_text and message.text != self.said and message.text.strip() == self.said.strip():
            return message.copy_with(content=self.said)
        return message
