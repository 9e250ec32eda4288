"""Messages as OpenAI's chat API takes them: roles, parts, tool calls and their results.

Nothing here is sent, and nothing that was passed is changed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

from kani_nb.errors import PromptError
from kani_nb.messages import (
    AudioPart,
    ChatMessage,
    ChatRole,
    ImagePart,
    MessagePart,
    ReasoningPart,
    ToolCall,
    VideoPart,
)

#: What the API calls the formats of sounds.
_SOUNDS = {"mpeg": "mp3", "x-wav": "wav", "wave": "wav", "vnd.wave": "wav", "x-flac": "flac"}


def api_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The `messages` of a request.

    Reasoning of earlier answers is left out: it was never part of what was said.

    Raises:
        PromptError: there are none, or one holds what the API has no place for (a video, an image in an answer).
    """
    if not messages:
        raise PromptError("there is nothing to answer", why="the list of messages is empty")
    calls: dict[str, list[str]] = {}
    records = []
    for message in messages:
        for call in message.tool_calls or ():
            calls.setdefault(call.function.name, []).append(call.id)
        records.append(_record(message, calls))
    return records


def whole_text(text: str) -> str:
    """`text` with halves of characters joined, or replaced where the other half is missing: no server takes them."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _record(message: ChatMessage, calls: dict[str, list[str]]) -> dict[str, Any]:
    role = message.role
    record: dict[str, Any] = {"role": role.value, "content": _content(message)}
    if role is ChatRole.FUNCTION:
        waiting = calls.get(message.name or "", [])
        call_id = message.tool_call_id or (waiting[0] if waiting else None)
        if call_id in waiting:
            waiting.remove(call_id)
        if call_id is None:  # the API's older form, which is all that can be said without the call
            return {**record, "name": message.name or "function"}
        return {**record, "role": "tool", "tool_call_id": call_id}
    if message.name:
        record["name"] = message.name
    if message.tool_calls:
        record["tool_calls"] = [_call(each) for each in message.tool_calls]
        record["content"] = record["content"] or None
    return record


def _call(call: ToolCall) -> dict[str, Any]:
    """A call as the model made it; servers refuse arguments that are no JSON, so those are wrapped."""
    record = call.to_dict()
    arguments = call.function.arguments
    try:
        is_object = isinstance(json.loads(arguments or "{}"), dict)
    except (ValueError, RecursionError):
        is_object = False
    record["function"]["arguments"] = (arguments or "{}") if is_object else json.dumps({"invalid_json": arguments})
    return record


def _content(message: ChatMessage) -> str | list[dict[str, Any]]:
    parts = [each for each in message.parts if not isinstance(each, ReasoningPart)]
    if all(_is_text(each) for each in parts):  # as one string, which the templates of text models need
        return whole_text("".join(str(each) for each in parts))
    if message.role is not ChatRole.USER:
        kinds = sorted({each.kind for each in parts if isinstance(each, MessagePart) and not _is_text(each)})
        raise PromptError(
            f"a message of the {message.role.value} holds {' and '.join(kinds)}",
            why="a chat server takes media in the user's messages alone",
        )
    return [_part(each) for each in parts]


def _is_text(part: MessagePart | str) -> bool:
    return isinstance(part, str) or part.kind == "text"


def _part(part: MessagePart | str) -> dict[str, Any]:
    if isinstance(part, ImagePart):
        coded = base64.b64encode(part.data).decode("ascii")
        return {"type": "image_url", "image_url": {"url": f"data:{part.mime};base64,{coded}"}}
    if isinstance(part, AudioPart):
        coded = base64.b64encode(part.data).decode("ascii")
        sort = part.mime.partition("/")[2].partition(";")[0].lower()
        return {"type": "input_audio", "input_audio": {"data": coded, "format": _SOUNDS.get(sort, sort)}}
    if isinstance(part, VideoPart) or not str(part):
        raise PromptError(
            f"a {getattr(part, 'kind', '') or type(part).__name__} cannot be sent to this server",
            why="OpenAI's chat API has no place for it",
            fix="send single frames of it as images",
        )
    return {"type": "text", "text": whole_text(str(part))}
