"""One answer asked of a chat server, and asked again in another way where the server refuses how it was asked.

Servers differ in what they know: usage in a stream, the name of the limit, streaming at all. What one refuses is
remembered in its `ServerHabits`, so that it is refused once.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from kani_nb.engines.base import StreamEvent
from kani_nb.engines.httpclient.client import ServerError
from kani_nb.engines.httpclient.errors import BROKEN_OFF
from kani_nb.engines.openai.client import OpenAIClient
from kani_nb.engines.openai.params import ServerKind, request_fields
from kani_nb.engines.openai.stream import AnswerBuilder
from kani_nb.errors import EngineError, GenerationError, PromptTooLongError
from kani_nb.generation_params import GenerationParams

_OTHER_NAME = {"max_tokens": "max_completion_tokens", "max_completion_tokens": "max_tokens"}


@dataclass(slots=True)
class ServerHabits:
    """What was learnt of a server by asking it.

    Attributes:
        max_tokens_name: what it calls the limit of an answer.
        takes_stream_options: whether it can be asked for the usage of a stream.
        context: tokens that it can read, where only a refusal told it.
        gives_usage: whether its latest answer had its number of tokens; None before one.
    """

    kind: ServerKind
    max_tokens_name: str = "max_tokens"
    takes_stream_options: bool = True
    context: int | None = None
    gives_usage: bool | None = None

    @property
    def sends_single_tokens(self) -> bool:
        """Whether each piece of its stream is a token, but for characters that take several."""
        return self.kind in (ServerKind.LLAMACPP, ServerKind.LLAMACPP_PYTHON)

    @property
    def tokens_from(self) -> str:
        """Who counts the tokens of an answer, in words."""
        told, pieces = "the server's usage", "the pieces of the stream (a character of several tokens counts once)"
        if not self.sends_single_tokens:
            return "nobody: the server gives no usage" if self.gives_usage is False else told
        return {None: f"{told}, or {pieces}", True: told, False: pieces}[self.gives_usage]

    def body(
        self,
        model: str,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        params: GenerationParams,
        passed: Mapping[str, Any],
    ) -> dict[str, Any]:
        """A request as this server takes it; `passed` are fields of the API as they are.

        Raises:
            ConfigError: something is asked for that this server has no field for.
        """
        said = dict(passed)
        extra = said.pop("extra_body", None) or {}
        if tools:
            said["tools"] = tools
        else:  # servers refuse to hear of tools where there are none
            said = {name: value for name, value in said.items() if name not in ("tool_choice", "parallel_tool_calls")}
        body: dict[str, Any] = {"model": model, "messages": messages, "stream": True}
        if self.takes_stream_options:
            body["stream_options"] = {"include_usage": True}
            if self.kind is ServerKind.VLLM:  # so that a stopped answer can be counted
                body["stream_options"]["continuous_usage_stats"] = True
        return {**body, **request_fields(params, self.kind, max_tokens_name=self.max_tokens_name), **said, **extra}


async def ask(
    client: OpenAIClient, body: dict[str, Any], answer: AnswerBuilder, habits: ServerHabits, prompt_tokens: int
) -> AsyncGenerator[StreamEvent]:
    """What is new in each event of the server's, which `answer` puts together. Closing the iterator hangs up.

    Raises:
        PromptTooLongError: the prompt does not fit.
        GenerationError: the answer ended too early, or is an error.
        EngineError: the server refused.
    """
    failure: EngineError | PromptTooLongError | None = None
    while True:
        try:
            async with aclosing(client.chat_events(body)) as pieces:
                async for piece in pieces:
                    for event in answer.read(piece):
                        yield event
                    if answer.is_over:  # it does not keep the limit, or has no end at all
                        return
            if answer.has_begun or answer.is_whole or not _without_stream(body):
                break
        except (ServerError, PromptTooLongError) as error:
            if answer.has_begun or not _ask_otherwise(body, error, habits, prompt_tokens):
                failure = error
                break
    if failure is None and not answer.is_whole:
        what = "stopped in the middle of its answer" if answer.has_begun else "sent no answer"
        failure = GenerationError(f"{client.address} {what}", why="its stream ended too early", fix="ask again")
    if failure is not None:
        if _is_cut_short(failure, answer) and await client.has_gone():
            failure.why = "the server has gone: nothing answers there any more"
            failure.fix = client.start_hint
        raise failure


def _is_cut_short(failure: EngineError | PromptTooLongError, answer: AnswerBuilder) -> bool:
    broke_off = isinstance(failure, ServerError) and failure.code == BROKEN_OFF
    return broke_off or (isinstance(failure, GenerationError) and not answer.is_whole)


def _ask_otherwise(
    body: dict[str, Any], error: ServerError | PromptTooLongError, habits: ServerHabits, prompt_tokens: int
) -> bool:
    """Change the request, where the refusal names what this server does not know; False where nothing helps."""
    if isinstance(error, PromptTooLongError):
        return _ask_for_less(body, error.why, habits, prompt_tokens)
    if error.code == BROKEN_OFF:
        return _without_stream(body)
    if error.status not in (400, 422):
        return False
    if "stream_options" in error.said and "stream_options" in body:
        habits.takes_stream_options = False
        del body["stream_options"]
        return True
    name, other = habits.max_tokens_name, _OTHER_NAME[habits.max_tokens_name]
    if name in body and name in error.said and _is_unknown(error):
        body[other] = body.pop(name)
        habits.max_tokens_name = other
        return True
    return False


def _ask_for_less(body: dict[str, Any], said: str, habits: ServerHabits, prompt_tokens: int) -> bool:
    """Learn the context from a refusal, and whether it was the answer's length that did not fit into it."""
    found = re.search(r"context[^.\d]{0,40}(\d[\d,]*)", said)
    if found is None:
        return False
    habits.context = int(found[1].replace(",", ""))
    room = habits.context - prompt_tokens
    if not 0 < room < body.get(habits.max_tokens_name, 0):
        return False
    body[habits.max_tokens_name] = room
    return True


def _without_stream(body: dict[str, Any]) -> bool:
    """Ask for the whole answer: a server that fails as soon as it streams says why when it does not."""
    body.pop("stream_options", None)
    was_stream, body["stream"] = body["stream"], False
    return bool(was_stream)


def _is_unknown(error: ServerError) -> bool:
    """Whether a refusal is of a field itself and not of its value."""
    said = f"{error.said} {error.code}".lower()
    words = ("unsupported_parameter", "unsupported parameter", "not supported", "unexpected", "unrecognized", "extra")
    return any(each in said for each in words)
