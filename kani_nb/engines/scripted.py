"""ScriptedEngine: says what it was told to, in turn. For tutorials and tests of tools, where no model is to be trusted.

It has no model, and its repr says so. Which answer is given follows from the conversation alone, so that running a
notebook again gives the same one.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from kani_nb.engines.base import (
    BaseEngine,
    Completion,
    FinishReason,
    ReasoningDelta,
    StreamEvent,
    TextDelta,
    ToolCallDelta,
)
from kani_nb.errors import ConfigError
from kani_nb.generation_params import GenerationParams
from kani_nb.messages import ChatMessage, ChatRole, FunctionCall, ToolCall

_WORD = re.compile(r"\s*\S+|\s+$")

Answer = str | ChatMessage | FunctionCall | Sequence[FunctionCall] | Exception


class ScriptedEngine(BaseEngine):
    """Gives one answer after the other: the n-th to a conversation in which it has spoken n times, then its last.

    Args:
        answers: text; a `FunctionCall` or several; a whole `ChatMessage`; or an exception, which is raised.
        delay: seconds per word.
        max_context_size: tokens (words) of prompt and answer together.

    Raises:
        ConfigError: there is no answer.
    """

    def __init__(self, *answers: Answer, delay: float = 0.0, max_context_size: int = 8192) -> None:
        if not answers:
            raise ConfigError("a ScriptedEngine needs an answer", fix='ScriptedEngine("Hello!")')
        self.answers = answers
        self.delay = delay
        self.max_context_size = max_context_size

    def prompt_len(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **kwargs: Any) -> int:
        """Words of all messages, and one for each message's role."""
        return sum(1 + len(_WORD.findall(message.text)) for message in messages)

    async def stream(
        self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None, **hyperparams: Any
    ) -> AsyncIterator[StreamEvent]:
        """The answer that is due. Raises what the script says."""
        params = GenerationParams.from_kwargs(hyperparams)
        spoken = sum(message.role is ChatRole.ASSISTANT for message in messages)
        answer = self.answers[min(spoken, len(self.answers) - 1)]
        if isinstance(answer, Exception):
            raise answer
        message = _message(answer, spoken)
        if message.reasoning:
            yield ReasoningDelta(message.reasoning)
        words = _WORD.findall(message.text)
        for number, word in enumerate(words[: params.max_new_tokens], 1):
            await asyncio.sleep(self.delay)
            yield TextDelta(word, number)
        is_cut = len(words) > params.max_new_tokens
        if is_cut:
            message = message.copy_with(text="".join(words[: params.max_new_tokens]), tool_calls=None)
        for number, call in enumerate(message.tool_calls or ()):
            await asyncio.sleep(self.delay)
            yield ToolCallDelta(number, call.function.name, call.function.arguments)
        reason = FinishReason.TOOL_CALLS if message.tool_calls else FinishReason.STOP
        yield Completion(
            message,
            self.prompt_len(messages),
            min(len(words), params.max_new_tokens) + len(message.tool_calls or ()),
            finish_reason=FinishReason.LENGTH if is_cut else reason,
        )

    def __repr__(self) -> str:
        """That there is no model behind it."""
        return f"ScriptedEngine({len(self.answers)} answers, no model)"


def _message(answer: str | ChatMessage | FunctionCall | Sequence[FunctionCall], spoken: int) -> ChatMessage:
    if isinstance(answer, ChatMessage):
        return answer
    if isinstance(answer, str):
        return ChatMessage.assistant(answer)
    calls = [answer] if isinstance(answer, FunctionCall) else list(answer)
    named = tuple(ToolCall(f"call_{spoken}_{number}", call) for number, call in enumerate(calls))
    return ChatMessage.assistant("", tool_calls=named)
