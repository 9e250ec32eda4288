"""Messages, parts, tool calls and functions: ours as the kani package's, and its as ours.

Whatever kani's part types hold that ours have no place for (signatures of thinking, encrypted reasoning) is kept in the
message's `extra`, so that the provider is given back what it sent. Nothing here calls an engine.
"""

from __future__ import annotations

import copy
import importlib
import io
from collections.abc import Sequence
from typing import Any

from kani_nb.errors import MissingDependencyError, PromptError
from kani_nb.functions import tool_schemas
from kani_nb.messages import (
    AudioPart,
    ChatMessage,
    Content,
    FunctionCall,
    ImagePart,
    MediaPart,
    MessagePart,
    ReasoningPart,
    TextPart,
    ToolCall,
    VideoPart,
)

#: Where a message keeps the content that kani gave, if it has parts that ours cannot hold.
KEPT = "kani_content"


def kani_module(name: str = "kani") -> Any:
    """A module of the kani package.

    Raises:
        MissingDependencyError: kani is not installed, or too old to have it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{name} cannot be imported", why=str(error), fix="pip install 'kani-nb[kani]'"
        ) from error


def to_kani(message: ChatMessage) -> Any:
    """The message as a `kani.ChatMessage`. Pictures are decoded here, so it may take a while.

    Raises:
        PromptError: kani cannot hold it.
    """
    from pydantic import ValidationError

    kani = kani_module()
    calls = None
    if message.tool_calls is not None:
        calls = [call.to_dict() for call in message.tool_calls]
    try:
        return kani.ChatMessage(
            role=kani.ChatRole(message.role.value),
            content=_content_to_kani(message),
            name=message.name,
            tool_call_id=message.tool_call_id,
            tool_calls=calls,
            is_tool_call_error=message.is_tool_call_error,
        )
    except ValidationError as error:
        reason = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise PromptError(f"a {message.role} message cannot be given to kani", why=reason) from error


def from_kani(message: Any) -> ChatMessage:
    """A `kani.ChatMessage` as ours."""
    calls = None
    if message.tool_calls is not None:
        calls = tuple(
            ToolCall(call.id, FunctionCall(call.function.name, call.function.arguments), call.type)
            for call in message.tool_calls
        )
    kept = _kept(message)
    return ChatMessage(
        message.role.value,
        _content_from_kani(message.content),
        name=message.name,
        tool_call_id=message.tool_call_id,
        tool_calls=calls,
        is_tool_call_error=message.is_tool_call_error,
        extra={} if kept is None else {KEPT: kept},
    )


def functions_to_kani(functions: Sequence[Any] | None) -> list[Any] | None:
    """What engines of kani read of functions (name, description, schema), as functions that are never called."""
    described = [each["function"] for each in tool_schemas(functions)]
    make = kani_module().AIFunction
    return [
        make(
            _never_called,
            name=each["name"],
            desc=each.get("description") or f"The function {each['name']}.",
            json_schema=each.get("parameters") or {"type": "object", "properties": {}},
        )
        for each in described
    ] or None


def _never_called() -> None:
    raise AssertionError("kani_nb calls the functions itself")


def _content_to_kani(message: ChatMessage) -> Any:
    if not isinstance(message.content, tuple):
        return message.content
    kept = _restored(message)
    return [_part_to_kani(part) for part in message.content] if kept is None else kept


def _part_to_kani(part: MessagePart | str) -> Any:
    if isinstance(part, str | TextPart):
        return str(part)
    if isinstance(part, ReasoningPart):
        return kani_module("kani.parts").ReasoningPart(content=part.content)
    if isinstance(part, MediaPart):
        return _media_to_kani(part)
    raise PromptError(f"a part of the type {type(part).__name__} cannot be given to kani", why="it has none like it")


def _media_to_kani(part: MediaPart) -> Any:
    try:
        media = importlib.import_module("kani.ext.multimodal_core")
    except ImportError as error:
        raise PromptError(
            f"{part.mime} cannot be given to engines of kani",
            why=f"its package for media cannot be imported: {error}",
            fix="pip install kani-multimodal-core",
        ) from error
    try:
        if isinstance(part, ImagePart):
            return media.ImagePart.from_bytes(part.data)
        if isinstance(part, AudioPart):
            subtype = part.mime.partition("/")[2].removeprefix("x-")
            return media.AudioPart.from_file(
                io.BytesIO(part.data), format={"mpeg": "mp3", "wave": "wav"}.get(subtype, subtype)
            )
        return media.VideoPart.from_bytes(part.data, part.mime)
    except Exception as error:
        raise PromptError(f"{part.mime} of {len(part.data):,} bytes cannot be read", why=str(error)) from error


def _content_from_kani(content: Any) -> Content:
    if content is None or isinstance(content, str):
        return content
    found = (part if isinstance(part, str) else _part_from_kani(part) for part in content)
    return tuple(part for part in found if part is not None)


def _part_from_kani(part: Any) -> MessagePart | str | None:
    """The part as ours; None where nobody could read it."""
    parts = kani_module("kani.parts")
    if isinstance(part, parts.ReasoningPart):
        return ReasoningPart(part.content)
    if isinstance(part, parts.TextPart):
        return TextPart(part.content)
    kind = type(part).__name__
    if type(part).__module__.startswith("kani.ext.multimodal_core"):
        if kind == "ImagePart":
            return ImagePart(part.as_bytes("png"), "image/png")
        if kind == "AudioPart":
            return AudioPart(part.as_wav_bytes(), "audio/wav")
        return VideoPart(part.as_bytes(), part.mime)
    # kani's own text for a part that has none is a placeholder and a warning.
    has_text = type(part).__str__ is not kani_module().MessagePart.__str__
    return TextPart(str(part)) if has_text and str(part) else None


def _kept(message: Any) -> list[Any] | None:
    """The content as JSON, where ours would lose something of it."""
    if not isinstance(message.content, list):
        return None
    parts = kani_module("kani.parts")
    plain = (parts.TextPart, parts.ReasoningPart)
    if all(
        isinstance(part, str)
        or (type(part) in plain and not part.extra)
        or type(part).__module__.startswith("kani.ext.multimodal_core")
        for part in message.content
    ):
        return None
    try:
        kept: list[Any] = message.model_dump(mode="json", include={"content"})["content"]
    except Exception:  # noqa: BLE001 - parts are strangers' classes; without it, the answer is still an answer
        return None
    return kept


def _restored(message: ChatMessage) -> list[Any] | None:
    """What `_kept` kept, if the message still says the same."""
    kept = message.extra.get(KEPT)
    if not isinstance(kept, list):
        return None
    kani = kani_module()
    try:
        content = kani.ChatMessage.model_validate({"role": message.role.value, "content": copy.deepcopy(kept)}).content
    except (ValueError, kani.exceptions.KaniException):  # of a provider whose package is not here now
        return None
    return list(content) if _content_from_kani(content) == message.content else None
