"""The engine contract: what every model backend gives, and what it may be asked.

`stream` is the primitive and `predict` is derived from it; an engine that defines only `predict` gets a `stream` that
wraps it. The verbs are kani's, so that engines written for kani run here, down to the 0.x style (`message_len`,
`token_reserve`). Nothing here generates, loads or counts: that is each engine's own.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Self

from kani_nb.errors import GenerationError
from kani_nb.messages import ChatMessage

if TYPE_CHECKING:
    from kani_nb.engines.kinds import EngineKind


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"


class TextDelta(str):
    """A piece of the answer's text. All pieces of one stream, joined, are the completion's text.

    Attributes:
        tokens: how many tokens the answer has so far, where the engine knows; so that a stopped answer can be counted.
    """

    __slots__ = ("tokens",)
    tokens: int | None

    def __new__(cls, text: str = "", tokens: int | None = None) -> Self:
        """A piece, with the answer's tokens so far."""
        piece = super().__new__(cls, text)
        piece.tokens = tokens
        return piece


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """A piece of the model's reasoning, kept apart from the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of a tool call: which one it belongs to, and what is new of its name and arguments."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """How many of the prompt's tokens have been computed; shown, never part of the answer.

    The first one is sent when the engine starts on the request, and says how long it waited for the device.
    """

    done_tokens: int
    total_tokens: int
    cached_tokens: int
    queued_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of an answer, and how sure the model was of it.

    Attributes:
        text: of the token by itself.
        logprob: natural logarithm of its probability, before temperature and other sampling.
        alternatives: the likeliest tokens in its place with theirs, itself among them if it is one.
    """

    text: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...] = ()

    @property
    def probability(self) -> float:
        """In [0, 1]."""
        return math.exp(self.logprob)


@dataclass(frozen=True, slots=True)
class EngineNotice:
    """What the person should know about this answer, in a sentence; never part of it."""

    text: str


class BaseCompletion:
    """The end of an answer: the whole message and what it took."""

    @property
    def message(self) -> ChatMessage:
        """The model's message."""
        raise AttributeError(f"{type(self).__name__} has no message")

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt, cached ones included."""
        return None

    @property
    def completion_tokens(self) -> int | None:
        """Tokens the model generated, the end-of-sequence token included."""
        return None

    @property
    def cached_tokens(self) -> int | None:
        """Tokens of the prompt that were not computed again."""
        return None

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ended."""
        return None


class Completion(BaseCompletion):
    """A `BaseCompletion` made of plain values."""

    def __init__(
        self,
        message: ChatMessage,
        prompt_tokens: int | None = None,
        completion_tokens: int | None = None,
        *,
        cached_tokens: int | None = None,
        finish_reason: FinishReason | None = None,
        seed: int | None = None,
        logprobs: Sequence[TokenLogprob] = (),
    ) -> None:
        self._message = message
        self._prompt_tokens = prompt_tokens
        self._completion_tokens = completion_tokens
        self._cached_tokens = cached_tokens
        self._finish_reason = finish_reason
        #: What the answer was sampled with, drawn or given; None where nothing was sampled.
        self.seed = seed
        #: One for each token of the answer, where they were asked for.
        self.logprobs = tuple(logprobs)

    message = property(lambda self: self._message, doc=BaseCompletion.message.__doc__)
    prompt_tokens = property(lambda self: self._prompt_tokens, doc=BaseCompletion.prompt_tokens.__doc__)
    completion_tokens = property(lambda self: self._completion_tokens, doc=BaseCompletion.completion_tokens.__doc__)
    cached_tokens = property(lambda self: self._cached_tokens, doc=BaseCompletion.cached_tokens.__doc__)
    finish_reason = property(lambda self: self._finish_reason, doc=BaseCompletion.finish_reason.__doc__)

    def __repr__(self) -> str:
        """The message and the counts."""
        return (
            f"Completion({self._message!r}, prompt_tokens={self._prompt_tokens}, "
            f"completion_tokens={self._completion_tokens}, cached_tokens={self._cached_tokens}, "
            f"finish_reason={self._finish_reason})"
        )


StreamEvent = TextDelta | str | ReasoningDelta | ToolCallDelta | PrefillProgress | EngineNotice | BaseCompletion


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """One step of loading, for people to read. `fraction` is in [0, 1], or None where it cannot be known."""

    stage: str
    detail: str = ""
    fraction: float | None = None


ProgressCallback = Callable[[LoadProgress], None]


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """What an engine holds, in bytes, and on which device (`cpu`, `cuda:0`).

    Attributes:
        shares: bytes of the weights by device (`disk` too), where they lie on several; empty where they do not.
    """

    weight_bytes: int
    kv_bytes: int
    device: str
    shares: Mapping[str, int] = field(default_factory=dict)

    @property
    def placement(self) -> dict[str, float]:
        """Share of the weights' bytes by device, the largest first; they sum to 1."""
        held = {name: count for name, count in self.shares.items() if count > 0} or {self.device: self.weight_bytes}
        total = sum(held.values())
        ordered = sorted(held.items(), key=lambda each: -each[1])
        return {name: count / total for name, count in ordered} if total > 0 else {}


class BaseEngine(ABC):  # noqa: B024 - which of stream and predict is defined is seen when it is called
    """A language model backend.

    A constructor only describes; `load` acts and `close` frees, and each is safe to call twice. The first use loads.
    Closing the iterator that `stream` returned ends the generation.
    """

    #: Tokens of prompt and answer together that the model can hold.
    max_context_size: int = 0
    #: What the engine is for, for people who choose one; None says nothing.
    kind: ClassVar[EngineKind | None] = None
    #: Whether `prompt_len` is exact, and not an estimate.
    counts_exactly: bool = True
    #: Whether an answer can be held to a JSON schema (`json_schema`); else it is asked for in words, and checked.
    holds_to_schemas: bool = False
    #: kani's name for what a call gets when the functions' budget is used up.
    disable_function_calling_kwargs: ClassVar[dict[str, Any]] = {"include_functions": False}

    @property
    def is_loaded(self) -> bool:
        """Whether the engine can answer without loading anything."""
        return True

    async def prepare(self, progress: ProgressCallback | None = None) -> None:  # noqa: B027 - optional
        """Do what `load` needs and can be done without taking memory: find files, download them, check them."""

    async def load(self, progress: ProgressCallback | None = None) -> None:  # noqa: B027 - optional
        """Make the engine ready. `progress` is called on any thread."""

    async def close(self) -> None:  # noqa: B027 - optional
        """Free what `load` took."""

    def memory(self) -> EngineMemory | None:
        """What the engine holds in this process, or None where that is not known. Safe from any thread."""
        return None

    def prompt_len(
        self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **kwargs: Any
    ) -> int | Awaitable[int]:
        """Tokens of the whole prompt made of `messages`; may be a coroutine in engines that must ask a server.

        The default is the 0.x sum: `message_len` of each, `token_reserve` and `function_token_reserve`.
        """
        if type(self).message_len is BaseEngine.message_len:
            raise TypeError(f"{type(self).__name__} must define prompt_len (or message_len)")
        reserve = self.token_reserve + (self.function_token_reserve(list(functions)) if functions else 0)
        return sum(self.message_len(message) for message in messages) + reserve

    async def predict(
        self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **hyperparams: Any
    ) -> BaseCompletion:
        """The whole answer to `messages`.

        Raises:
            GenerationError: the stream ended without a completion.
        """
        if type(self).stream is BaseEngine.stream:
            raise TypeError(f"{type(self).__name__} must define stream or predict")
        completion = None
        async with aclosing(self.stream(messages, functions, **hyperparams)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, BaseCompletion):
                    completion = event
        if completion is None:
            raise GenerationError(
                f"{type(self).__name__}.stream ended without a completion",
                fix="its last event must be a BaseCompletion",
            )
        return completion

    async def stream(
        self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **hyperparams: Any
    ) -> AsyncIterator[StreamEvent]:
        """The answer piece by piece: deltas, then exactly one `BaseCompletion`.

        Closing the iterator early stops the generation; the default wraps `predict`, which then is cancelled.
        """
        completion = await self.predict(messages, functions, **hyperparams)
        if completion.message.text:
            yield TextDelta(completion.message.text)
        yield completion

    # The 0.x style of kani; `prompt_len` is the truth where an engine defines it.

    #: Tokens that every prompt costs beyond its messages (0.x style).
    token_reserve: int = 0

    def message_len(self, message: ChatMessage) -> int:
        """Tokens of one message (0.x style); by default those of a prompt that holds only it.

        Raises:
            TypeError: `prompt_len` is a coroutine in this engine.
        """
        length = self.prompt_len([message])
        if inspect.isawaitable(length):
            if inspect.iscoroutine(length):
                length.close()
            raise TypeError(f"{type(self).__name__}.prompt_len is a coroutine: await it instead of message_len")
        return length

    def function_token_reserve(self, functions: list[Any]) -> int:
        """Tokens that `functions` cost in every prompt (0.x style)."""
        return 0

    def __repr__(self) -> str:
        """The class and the context; never a module tree or a secret."""
        return f"{type(self).__name__}(max_context_size={self.max_context_size})"


async def prompt_len(
    engine: BaseEngine, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None
) -> int:
    """`engine.prompt_len`, whichever of its two forms, counted off the event loop when it is the blocking one."""
    import asyncio

    length = await asyncio.to_thread(engine.prompt_len, messages, functions)
    return await length if inspect.isawaitable(length) else length


def details_of(engine: BaseEngine) -> dict[str, Any]:
    """What an engine says of itself, if it does."""
    details = getattr(engine, "details", None)
    return dict(details()) if callable(details) else {}
