"""Tools for models whose chat template knows none: described in words, called by plain JSON, answered as a user would.

Small and older instruct models were not taught to call tools, and their templates ignore them without a word. Many can
follow an instruction all the same. Nothing here changes the conversation: it is said in the prompt alone.

Every local engine encodes its prompts through `encode_with_tools`, whatever turns messages into token ids there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from kani_nb.errors import PromptError
from kani_nb.functions import tool_schemas
from kani_nb.messages import ChatMessage, ChatRole, MediaPart

#: From messages and the schemas of tools to token ids.
Encode = Callable[[Sequence[ChatMessage], list[dict[str, Any]] | None], list[int]]

_INSTRUCTION = (
    "You can call functions. To call one, answer with nothing but a JSON object, on one line:\n"
    '{"name": "the function\'s name", "arguments": {"parameter": "value"}}\n'
    "You are then told its result, and answer the user. Where no function helps, answer as usual.\n"
    "The functions, each with the JSON schema of its parameters:"
)
#: Shown to a template once, to see whether it takes notice of tools.
_PROBE = [
    {
        "type": "function",
        "function": {
            "name": "kani_probe",
            "description": "?",
            "parameters": {"type": "object", "properties": {}, "required": []},
        },
    }
]


def ignores_tools(render: Callable[[Sequence[ChatMessage], list[dict[str, Any]] | None], Any]) -> bool:
    """Whether `render`, of messages and tools, gives the same prompt with a tool as without one.

    What fails on a bare question is asked again with a system message; what fails on everything is not taken to ignore
    tools, so that its own error is what people see.
    """

    def rendered(tools: list[dict[str, Any]] | None) -> Any:
        question = [ChatMessage.user("?")]
        for messages in (question, [ChatMessage.system("?"), *question]):
            with contextlib.suppress(PromptError):
                return render(messages, tools)
        return None

    told, untold = rendered(_PROBE), rendered(None)
    return bool((told is not None or untold is not None) and told == untold)


def encode_with_tools(
    encode: Encode,
    messages: Sequence[ChatMessage],
    functions: Sequence[Any] | None,
    is_ignoring: Callable[[], bool],
) -> list[int]:
    """What `encode` makes of messages and tools; where it cannot hold them as they are, as it can.

    Tools go in words where it takes no notice of them; calls that it refuses go as other templates want them.

    Args:
        encode: raises `PromptError` on what it cannot hold.
        messages: the conversation.
        functions: those offered.
        is_ignoring: whether `encode` takes no notice of tools; asked only where there are tools or calls.

    Raises:
        PromptError: there is no message, or it refuses them in every form.
    """
    if not messages:
        raise PromptError("there is no message to answer")
    messages = [_without_media_results(each) for each in messages]
    tools = tool_schemas(functions)
    offered = tools or None
    if not (tools or any(each.tool_calls or each.role is ChatRole.FUNCTION for each in messages)):
        return encode(messages, None)
    if is_ignoring():
        try:
            return encode(with_described_tools(messages, tools), None)
        except PromptError:  # where a system message is what it refuses
            return encode(with_described_tools(messages, tools, takes_system=False), None)
    try:
        return encode(messages, offered)
    except PromptError:
        if not any(each.tool_calls or each.role is ChatRole.FUNCTION for each in messages):
            raise
        short = with_short_ids(messages)
        for variant, known in (
            (short, offered),
            (one_call_each(short), offered),
            (with_described_tools(messages, tools), None),
        ):
            with contextlib.suppress(PromptError):
                return encode(variant, known)
        raise


def _without_media_results(message: ChatMessage) -> ChatMessage:
    """A function's result in words where it is an image: nobody could take it out of the prompt."""
    if message.role is not ChatRole.FUNCTION or not any(isinstance(part, MediaPart) for part in message.parts):
        return message
    named = [
        f"[{part.mime}, {len(part.data):,} bytes, which this model cannot read]"
        if isinstance(part, MediaPart)
        else part
        for part in message.parts
    ]
    return message.copy_with(content="".join(str(part) for part in named))


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
