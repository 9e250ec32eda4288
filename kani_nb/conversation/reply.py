"""What is asked in a round and what it gives: the prompt, the notices, and the reply.

Plain records; nothing here generates or commits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kani_nb.conversation.structured import AnswerRejected
from kani_nb.conversation.tools import ToolStep
from kani_nb.conversation.tree import Turn
from kani_nb.engines.base import StreamEvent, TokenLogprob
from kani_nb.errors import PromptError
from kani_nb.messages import ChatMessage, MediaPart, MessagePart
from kani_nb.metrics.recorder import GenerationMetrics

Prompt = str | tuple[MessagePart | str, ...]


class Notice(str):
    """A line for the person about this answer, for example what was dropped to fit the context. No part of its text."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, repr=False)
class ChatReply:
    """One answer.

    Attributes:
        text: the answer's text.
        message: the model's whole message.
        metrics: what it took.
        turn: the round as it was committed. Where nothing was (stopped before any text), it is in no conversation.
        number: the turn's number along its branch, from 1; where nothing was committed, that of the head (or 0).
        notices: what the person should know about this answer.
        value: the answer as an object, where a type was asked for.
        logprobs: how sure the model was of each token of its last message, where that was asked for.
    """

    text: str
    message: ChatMessage
    metrics: GenerationMetrics
    turn: Turn
    number: int
    notices: tuple[str, ...] = ()
    value: Any = None
    logprobs: tuple[TokenLogprob, ...] = ()

    def __repr__(self) -> str:
        """The text."""
        return f"ChatReply({self.text!r})"

    def __str__(self) -> str:
        """The text."""
        return self.text


SessionEvent = StreamEvent | Notice | ToolStep | AnswerRejected | ChatReply


def user_message(prompt: Prompt) -> ChatMessage:
    """The user's message; nothing of `prompt` is changed.

    Raises:
        PromptError: it is empty, only spaces, or neither text nor parts.
    """
    if not isinstance(prompt, str | tuple | list):
        raise PromptError(f"a prompt cannot be a {type(prompt).__name__}", why="it is text, or a tuple of parts")
    message = ChatMessage.user(prompt if isinstance(prompt, str) else tuple(prompt))
    if not message.text.strip() and not any(isinstance(part, MediaPart) for part in message.parts):
        raise PromptError("the prompt is empty", fix="write what you want to ask")
    return message
