"""Tools for models whose chat template knows none: described in words, called by plain JSON, answered as a user would.

Small and older instruct models were not taught to call tools, and their templates ignore them without a word. Many can
follow an instruction all the same. Nothing here changes the conversation: it is said in the prompt alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from kani_nb.messages import ChatMessage, ChatRole

_INSTRUCTION = (
    "You can call functions. To call one, answer with nothing but a JSON object, on one line:\n"
    '{"name": "the function\'s name", "arguments": {"parameter": "value"}}\n'
    "You are then told its result, and answer the user. Where no function helps, answer as usual.\n"
    "The functions, each with the JSON schema of its parameters:"
)


def with_described_tools(
    messages: Sequence[ChatMessage], tools: Sequence[Mapping[str, Any]], *, takes_system: bool = True
) -> list[ChatMessage]:
    """`messages` with the tools in their system message, earlier calls as JSON, and results as the user's words.

    Args:
        messages: the conversation.
        tools: as `kani_nb.functions.tool_schemas` gives them; none where only earlier calls are to be put in words.
        takes_system: the template has a system message; else what it would say stands before the first message.
    """
    described = _merged([_in_words(message) for message in messages])
    if not tools:
        return described
    lines = [json.dumps(each.get("function", each), ensure_ascii=False) for each in tools]
    instruction = "\n".join([_INSTRUCTION, *lines])
    first = described[0] if described else ChatMessage.user("")
    if first.role is ChatRole.SYSTEM:
        said = f"{first.text}\n\n{instruction}" if first.text else instruction
        described = [first.copy_with(content=said), *described[1:]]
    else:
        described = [ChatMessage.system(instruction), *described]
    if takes_system or len(described) < 2 or described[1].role is not ChatRole.USER:
        return described
    system, user = described[:2]
    return [user.copy_with(content=(f"{system.text}\n\n", *user.parts)), *described[2:]]


def _merged(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """`messages`, the user's that follow each other as one: many templates want user and assistant in turns."""
    merged: list[ChatMessage] = []
    for message in messages:
        if merged and merged[-1].role is message.role is ChatRole.USER:
            merged[-1] = merged[-1].copy_with(content=(*merged[-1].parts, "\n\n", *message.parts))
        else:
            merged.append(message)
    return merged


def one_call_each(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """`messages` with each call in a message of its own before its result, for templates that take only one."""
    split: list[ChatMessage] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        at += 1
        calls = message.tool_calls or ()
        if len(calls) < 2:
            split.append(message)
            continue
        results = list(takewhile(lambda each: each.role is ChatRole.FUNCTION, messages[at:]))
        at += len(results)
        for number, call in enumerate(calls):
            split.append(message.copy_with(content=message.content if number == 0 else "", tool_calls=(call,)))
            split += [each for each in results if each.tool_call_id == call.id]
    return split


def with_short_ids(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """`messages` with the ids of calls in nine letters and digits, which is what Mistral's templates take."""

    def short(call_id: str | None) -> str | None:
        return None if call_id is None else hashlib.sha256(call_id.encode("utf-8", "replace")).hexdigest()[:9]

    renamed = []
    for message in messages:
        calls = message.tool_calls and tuple(replace(call, id=str(short(call.id))) for call in message.tool_calls)
        renamed.append(message.copy_with(tool_calls=calls, tool_call_id=short(message.tool_call_id)))
    return renamed


def _in_words(message: ChatMessage) -> ChatMessage:
    if message.role is ChatRole.FUNCTION:
        what = "Error of" if message.is_tool_call_error else "Result of"
        return ChatMessage.user((f"{what} {message.name}:\n", *message.parts))
    if not message.tool_calls:
        return message
    calls = [_as_json(call.function.name, call.function.arguments) for call in message.tool_calls]
    return ChatMessage.assistant("\n".join(filter(None, (message.text, *calls))))


def _as_json(name: str, arguments: str) -> str:
    try:
        return json.dumps({"name": name, "arguments": json.loads(arguments)}, ensure_ascii=False)
    except json.JSONDecodeError:  # what the model wrote, word for word
        return arguments
