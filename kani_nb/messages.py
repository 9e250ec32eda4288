"""Messages: who said what, in which parts, and which tools were called.

Immutable records with kani's names and constructors. A message knows nothing of templates, tokens or storage beyond
`to_dict` and `from_dict`, which are what conversations are saved as.
"""

from __future__ import annotations

import base64
import json
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar, Self

from kani_nb.errors import ConfigError


class ChatRole(StrEnum):
    """Who speaks; the values are the wire names of OpenAI and kani."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    FUNCTION = "function"


@dataclass(frozen=True, slots=True)
class MessagePart(ABC):
    """One part of a message's content; `str(part)` is what a text-only model may see of it."""

    kind: ClassVar[str] = ""

    def __str__(self) -> str:
        """Nothing, unless the part is text."""
        return ""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe record with a `type` key."""


@dataclass(frozen=True, slots=True)
class TextPart(MessagePart):
    """Plain text."""

    kind: ClassVar[str] = "text"
    content: str

    def __str__(self) -> str:
        """The text."""
        return self.content

    def to_dict(self) -> dict[str, Any]:
        """See `MessagePart.to_dict`."""
        return {"type": self.kind, "text": self.content}


@dataclass(frozen=True, slots=True)
class ReasoningPart(MessagePart):
    """The model's reasoning: kept beside the answer, never part of its text."""

    kind: ClassVar[str] = "reasoning"
    content: str

    def to_dict(self) -> dict[str, Any]:
        """See `MessagePart.to_dict`."""
        return {"type": self.kind, "text": self.content}


@dataclass(frozen=True, slots=True)
class MediaPart(MessagePart):
    """Encoded bytes of a medium with their MIME type, for example `image/png`."""

    data: bytes = field(repr=False)
    mime: str

    def to_dict(self) -> dict[str, Any]:
        """See `MessagePart.to_dict`."""
        return {"type": self.kind, "mime": self.mime, "data": base64.b64encode(self.data).decode("ascii")}


@dataclass(frozen=True, slots=True)
class ImagePart(MediaPart):
    """An encoded image."""

    kind: ClassVar[str] = "image"


@dataclass(frozen=True, slots=True)
class AudioPart(MediaPart):
    """An encoded sound."""

    kind: ClassVar[str] = "audio"


@dataclass(frozen=True, slots=True)
class VideoPart(MediaPart):
    """An encoded video."""

    kind: ClassVar[str] = "video"


def part_from_dict(record: dict[str, Any]) -> MessagePart:
    """The part that `MessagePart.to_dict` described.

    Raises:
        ConfigError: the record's `type` is not known.
    """
    kind = record.get("type")
    for text_kind in (TextPart, ReasoningPart):
        if kind == text_kind.kind:
            return text_kind(record["text"])
    for media_kind in (ImagePart, AudioPart, VideoPart):
        if kind == media_kind.kind:
            return media_kind(base64.b64decode(record["data"]), record["mime"])
    raise ConfigError(f"unknown message part {kind!r}", why="expected text, reasoning, image, audio or video")


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A function's name and its arguments as JSON text, exactly as the model wrote them."""

    name: str
    arguments: str = "{}"

    @property
    def kwargs(self) -> dict[str, Any]:
        """The arguments, parsed.

        Raises:
            json.JSONDecodeError: the model wrote invalid JSON.
        """
        parsed: dict[str, Any] = json.loads(self.arguments)
        return parsed

    @classmethod
    def with_args(cls, name: str, /, **arguments: Any) -> Self:
        """A call of `name` with `arguments`."""
        return cls(name, json.dumps(arguments))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool that the model asked for."""

    id: str
    function: FunctionCall
    type: str = "function"

    @classmethod
    def from_function_call(cls, call: FunctionCall, call_id_: str | None = None) -> Self:
        """A call with an id, a new one if none is given."""
        return cls(call_id_ or uuid.uuid4().hex[:9], call)  # the templates of Mistral take no other length

    @classmethod
    def from_function(cls, name: str, /, *, call_id_: str | None = None, **arguments: Any) -> Self:
        """A call of `name` with `arguments`."""
        return cls.from_function_call(FunctionCall.with_args(name, **arguments), call_id_)

    def to_dict(self) -> dict[str, Any]:
        """The record in OpenAI's form."""
        function = {"name": self.function.name, "arguments": self.function.arguments}
        return {"id": self.id, "type": self.type, "function": function}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """The call that `to_dict` described; OpenAI's `tool_calls` entries too."""
        function = record["function"]
        return cls(record["id"], FunctionCall(function["name"], function["arguments"]), record.get("type", "function"))


Content = str | tuple[MessagePart | str, ...] | None


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message. `content` is text, a tuple of parts and strings, or None (a bare tool call)."""

    role: ChatRole
    content: Content
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    is_tool_call_error: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Copy what a caller might still change."""
        object.__setattr__(self, "role", ChatRole(self.role))
        if self.content is not None and not isinstance(self.content, str):
            object.__setattr__(self, "content", tuple(self.content))
        if self.tool_calls is not None:
            object.__setattr__(self, "tool_calls", tuple(self.tool_calls))
        object.__setattr__(self, "extra", dict(self.extra))

    @classmethod
    def system(cls, content: Content, **fields: Any) -> Self:
        """A message that instructs the model."""
        return cls(ChatRole.SYSTEM, content, **fields)

    @classmethod
    def user(cls, content: Content, **fields: Any) -> Self:
        """A message by the person."""
        return cls(ChatRole.USER, content, **fields)

    @classmethod
    def assistant(cls, content: Content = None, **fields: Any) -> Self:
        """A message by the model."""
        return cls(ChatRole.ASSISTANT, content, **fields)

    @classmethod
    def function(cls, name: str, content: Content, tool_call_id: str | None = None, **fields: Any) -> Self:
        """The result of a function that the model called."""
        return cls(ChatRole.FUNCTION, content, name=name, tool_call_id=tool_call_id, **fields)

    @property
    def text(self) -> str:
        """The message's text: all text parts, joined. Reasoning and media are not text."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(str(part) for part in self.content)

    @property
    def parts(self) -> tuple[MessagePart | str, ...]:
        """The content as parts, whatever its form."""
        if self.content is None:
            return ()
        return (self.content,) if isinstance(self.content, str) else self.content

    @property
    def function_call(self) -> FunctionCall | None:
        """The only call that the message asks for, or the first; None where it asks for none."""
        return self.tool_calls[0].function if self.tool_calls else None

    @property
    def reasoning(self) -> str:
        """The model's reasoning: all reasoning parts, joined."""
        return "".join(part.content for part in self.parts if isinstance(part, ReasoningPart))

    def copy_with(self, **changes: Any) -> ChatMessage:
        """This message with some fields replaced (`text=` is `content=` with a string)."""
        if "text" in changes:
            changes["content"] = changes.pop("text")
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe record without the fields that are unset."""
        record: dict[str, Any] = {"role": self.role.value}
        if isinstance(self.content, tuple):
            record["content"] = [part if isinstance(part, str) else part.to_dict() for part in self.content]
        else:
            record["content"] = self.content
        if self.tool_calls is not None:
            record["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        for key in ("name", "tool_call_id", "is_tool_call_error"):
            if getattr(self, key) is not None:
                record[key] = getattr(self, key)
        if self.extra:
            record["extra"] = self.extra
        return record

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """The message that `to_dict` described.

        Raises:
            ConfigError: the record has no valid role, or a part of an unknown type.
        """
        try:
            role = ChatRole(record["role"])
        except (KeyError, ValueError):
            raise ConfigError(
                f"unknown message role {record.get('role')!r}", why=f"expected {', '.join(ChatRole)}"
            ) from None
        content = record.get("content")
        if isinstance(content, list):
            content = tuple(part if isinstance(part, str) else part_from_dict(part) for part in content)
        calls = record.get("tool_calls")
        return cls(
            role,
            content,
            name=record.get("name"),
            tool_call_id=record.get("tool_call_id"),
            tool_calls=None if calls is None else tuple(ToolCall.from_dict(call) for call in calls),
            is_tool_call_error=record.get("is_tool_call_error"),
            extra=record.get("extra") or {},
        )
