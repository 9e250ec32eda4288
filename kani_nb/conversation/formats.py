"""Conversations as files: our own JSON (everything, branches included), OpenAI messages, ShareGPT and Markdown.

The other formats hold the current branch only, and what was said rather than how (no metrics; ShareGPT has no reasoning
and no ids of tool calls either). Media that a format cannot hold is refused rather than dropped. Files are written
whole or not at all. How Markdown looks is `markdown_format`.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kani_nb.conversation.markdown_format import from_markdown, is_markdown, to_markdown
from kani_nb.conversation.tree import Conversation, Turn, new_id
from kani_nb.errors import ConfigError, ConversationError, did_you_mean
from kani_nb.messages import (
    AudioPart,
    ChatMessage,
    ChatRole,
    FunctionCall,
    ImagePart,
    MediaPart,
    MessagePart,
    ReasoningPart,
    TextPart,
    ToolCall,
)

_KIND = "kani_nb conversation"
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write a conversation as text, and to read it."""

    name: str
    suffixes: tuple[str, ...]
    dump: Callable[[Conversation], str]
    parse: Callable[[str, str], Conversation]


def write(conversation: Conversation, path: str | os.PathLike[str], format: str | None = None) -> Path:
    """Write `conversation` to `path`, whole or not at all, and return the path.

    Args:
        conversation: what is written.
        path: replaced when it exists.
        format: `json` (everything), `openai`, `sharegpt` or `markdown`; by default the suffix says.

    Raises:
        ConversationError: an unknown format, content that the format cannot hold, or a file that cannot be written.
    """
    target = Path(path).expanduser()
    text = _format_of(target, format).dump(conversation)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:  # lone surrogates: only Markdown leaves them unescaped
        data = text.encode("utf-8", "surrogatepass")
    try:
        _write_whole(target, data)
    except OSError as error:
        if not target.parent.is_dir():
            fix = f"make it first (!mkdir -p {shlex.quote(str(target.parent))}), or choose another folder"
            raise ConversationError(
                f"cannot write {target}", why=f"there is no folder {target.parent}", fix=fix
            ) from error
        raise ConversationError(f"cannot write {target}", why=str(error.strerror or error)) from error
    return target


def read(path: str | os.PathLike[str], format: str | None = None) -> Conversation:
    """The conversation in the file at `path`; one that our own JSON holds keeps its ids, any other gets new ones.

    Args:
        path: the file.
        format: `json`, `openai`, `sharegpt` or `markdown`; by default the content says.

    Raises:
        ConversationError: no such file, an unknown format, or a file that is no conversation.
    """
    return _read(Path(path).expanduser(), format)[0]


def holds(path: str | os.PathLike[str], conversation: Conversation) -> bool:
    """Whether the file at `path` was written from `conversation`, however far that has gone on since.

    Our own JSON is known by its id, Markdown by its name, and any format without an id by a first message that
    `conversation` has on one of its branches.

    Raises:
        ConversationError: as `read`.
    """
    found, format = _read(Path(path).expanduser(), None)
    if format.name == "json":
        return found.id == conversation.id
    if format.name == "markdown" and found.name != conversation.name:
        return False
    begins = {each.messages[0].text.strip() for each in conversation.turns.values() if each.parent_id is None}
    return all(each.messages[0].text.strip() in begins for each in found.turns.values() if each.parent_id is None)


def _read(source: Path, format: str | None) -> tuple[Conversation, Format]:
    """The conversation in a file, and the format it has."""
    chosen = _format_of(source, format) if format is not None else None
    try:
        text = source.read_bytes().decode("utf-8", "surrogatepass")
    except FileNotFoundError:
        raise ConversationError(
            f"there is no file {source}", why=f"the current folder is {Path.cwd()}", fix="%chat list shows what is kept"
        ) from None
    except OSError as error:
        raise ConversationError(f"cannot read {source}", why=str(error.strerror or error)) from error
    except UnicodeDecodeError:
        raise _not_one(source, "it is not text") from None
    text = text.removeprefix("\ufeff")
    try:
        chosen = chosen or _sniffed(text)
        return chosen.parse(text, source.stem), chosen
    except json.JSONDecodeError as error:
        raise _not_one(source, f"it is not valid JSON ({error.msg}, line {error.lineno})") from error
    except KeyError as error:
        raise _not_one(source, f"a part of it has no {error}") from error
    except (TypeError, AttributeError) as error:
        raise _not_one(source, "its parts are not those of messages") from error
    except ValueError as error:  # also of base64
        raise _not_one(source, str(error)) from error
    except ConfigError as error:
        raise _not_one(source, str(error)) from error


def conversation_of(
    messages: Iterable[ChatMessage], name: str, *, interrupted: frozenset[int] = frozenset()
) -> Conversation:
    """A conversation with one branch made of `messages`: each user message begins a turn.

    A system message at the very beginning becomes the system prompt. `interrupted` holds the positions of messages
    whose answer was cut short.
    """
    rounds: list[tuple[list[ChatMessage], bool]] = []
    system = None
    for position, message in enumerate(messages):
        if position == 0 and message.role is ChatRole.SYSTEM and isinstance(message.content, str):
            system = message.content
            continue
        if not rounds or message.role is ChatRole.USER:
            rounds.append(([], False))
        rounds[-1] = ([*rounds[-1][0], message], rounds[-1][1] or position in interrupted)
    conversation = Conversation.new(name, system=system)
    turns: dict[str, Turn] = {}
    parent = None
    now = time.time()
    for spoken, is_interrupted in rounds:
        turn = Turn(new_id(), parent, tuple(spoken), created_at=now, interrupted=is_interrupted)
        turns[turn.id], parent = turn, turn.id
    return Conversation(conversation.id, name, "", system, turns, parent, now, now)


def _messages(conversation: Conversation) -> list[ChatMessage]:
    system = [] if conversation.system is None else [ChatMessage.system(conversation.system)]
    return [*system, *conversation.history]


# Our own JSON.


def _dump_json(conversation: Conversation) -> str:
    record = {"format": _KIND, "version": _VERSION, **conversation.to_dict()}
    return json.dumps(record, indent=1, default=repr) + "\n"


def _parse_json(text: str, name: str) -> Conversation:
    record = json.loads(text)
    if record.get("format") != _KIND:
        raise ValueError("it is not kani_nb's own JSON")
    if record["version"] > _VERSION:
        raise ConversationError(
            f"conversation {record.get('name')!r} was saved in version {record['version']} of the format",
            why=f"this kani_nb knows versions up to {_VERSION}",
            fix="pip install --upgrade kani-nb",
        )
    return Conversation.from_dict(record)


# OpenAI.


def _dump_openai(conversation: Conversation) -> str:
    return json.dumps({"messages": [_to_openai(each) for each in _messages(conversation)]}, indent=1) + "\n"


def _dump_openai_line(conversation: Conversation) -> str:
    return json.dumps({"messages": [_to_openai(each) for each in _messages(conversation)]}) + "\n"


def _parse_openai(text: str, name: str) -> Conversation:
    record = json.loads(text)
    entries = record["messages"] if isinstance(record, dict) else record
    return conversation_of([_from_openai(each) for each in entries], name)


def _to_openai(message: ChatMessage) -> dict[str, Any]:
    role = "tool" if message.role is ChatRole.FUNCTION and message.tool_call_id is not None else message.role.value
    record: dict[str, Any] = {"role": role, "content": message.content}
    if isinstance(message.content, tuple):
        record["content"] = [_part_to_openai(part) for part in message.parts if not isinstance(part, ReasoningPart)]
        reasoning = "".join(part.content for part in message.parts if isinstance(part, ReasoningPart))
        if reasoning:
            record["reasoning_content"] = reasoning
    if message.tool_calls is not None:
        record["tool_calls"] = [call.to_dict() for call in message.tool_calls]
    for key in ("name", "tool_call_id"):
        if getattr(message, key) is not None:
            record[key] = getattr(message, key)
    return record


def _part_to_openai(part: MessagePart | str) -> dict[str, Any]:
    if isinstance(part, str | TextPart):
        return {"type": "text", "text": str(part)}
    if isinstance(part, ImagePart):
        data = base64.b64encode(part.data).decode("ascii")
        return {"type": "image_url", "image_url": {"url": f"data:{part.mime};base64,{data}"}}
    if isinstance(part, AudioPart):
        data = base64.b64encode(part.data).decode("ascii")
        return {"type": "input_audio", "input_audio": {"data": data, "format": part.mime.partition("/")[2]}}
    raise ConversationError(f"OpenAI's format cannot hold {part.kind or type(part).__name__}", fix="save it as .json")


def _from_openai(record: Mapping[str, Any]) -> ChatMessage:
    role = {"developer": "system", "tool": "function"}.get(record["role"], record["role"])
    content = record.get("content")
    parts: Any = content
    if isinstance(content, list):
        parts = tuple(_part_from_openai(part) for part in content)
    if record.get("reasoning_content"):
        spoken = parts if isinstance(parts, tuple) else (parts,) if parts else ()
        parts = (ReasoningPart(record["reasoning_content"]), *spoken)
    calls = record.get("tool_calls")
    if calls is None and record.get("function_call"):
        calls = [{"id": new_id(), "function": record["function_call"]}]
    if parts is not None and not isinstance(parts, str | tuple):
        raise TypeError(f"the content of a message is a {type(parts).__name__}")
    message = ChatMessage.from_dict({"role": role, "content": None})
    return message.copy_with(
        content=parts,
        name=record.get("name"),
        tool_call_id=record.get("tool_call_id"),
        tool_calls=None if calls is None else tuple(ToolCall.from_dict(call) for call in calls),
    )


def _part_from_openai(record: Mapping[str, Any] | str) -> MessagePart | str:
    if isinstance(record, str):
        return record
    if record["type"] == "text":
        return TextPart(record["text"])
    if record["type"] == "input_audio":
        audio = record["input_audio"]
        return AudioPart(base64.b64decode(audio["data"]), f"audio/{audio['format']}")
    if record["type"] == "image_url":
        head, mark, data = record["image_url"]["url"].partition(";base64,")
        if not mark or not head.startswith("data:"):
            raise ValueError("an image that is not in the file itself")
        return ImagePart(base64.b64decode(data), head.removeprefix("data:"))
    raise ValueError(f"an unknown part {record['type']!r}")


# ShareGPT.

_SPEAKERS = {ChatRole.SYSTEM: "system", ChatRole.USER: "human", ChatRole.ASSISTANT: "gpt", ChatRole.FUNCTION: "tool"}
_ROLES = {
    **{speaker: role for role, speaker in _SPEAKERS.items()},
    "user": ChatRole.USER,
    "assistant": ChatRole.ASSISTANT,
    "chatgpt": ChatRole.ASSISTANT,
    "bing": ChatRole.ASSISTANT,
    "bard": ChatRole.ASSISTANT,
    "observation": ChatRole.FUNCTION,
    "function_response": ChatRole.FUNCTION,
}


def _dump_sharegpt(conversation: Conversation) -> str:
    entries: list[dict[str, Any]] = []
    for message in _messages(conversation):
        if any(isinstance(part, MediaPart) for part in message.parts):
            raise ConversationError("ShareGPT holds text only", why="a message has media", fix="save it as .json")
        if message.tool_calls:
            call = message.tool_calls[0].function
            if len(message.tool_calls) > 1 or message.text:
                raise ConversationError(
                    "ShareGPT holds one tool call a message, without text", fix="save it as .json or --format openai"
                )
            call_text = json.dumps({"name": call.name, "arguments": call.arguments})
            entries.append({"from": "function_call", "value": call_text})
        else:
            entries.append({"from": _SPEAKERS[message.role], "value": message.text})
    return json.dumps({"id": conversation.id, "conversations": entries}, indent=1) + "\n"


def _parse_sharegpt(text: str, name: str) -> Conversation:
    record = json.loads(text)
    if isinstance(record, list) and record and "conversations" in record[0]:
        if len(record) > 1:
            raise ConversationError(f"the file holds {len(record):,} conversations", fix="save the one you want alone")
        record = record[0]
    entries = record["conversations"] if isinstance(record, dict) else record
    return conversation_of([_from_sharegpt(each) for each in entries], name)


def _from_sharegpt(record: Mapping[str, Any]) -> ChatMessage:
    speaker, value = record["from"], record["value"]
    if not isinstance(value, str):
        raise TypeError(f"the value of a message is a {type(value).__name__}")
    if speaker == "function_call":
        call = json.loads(value)
        arguments = call["arguments"]
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return ChatMessage.assistant(None, tool_calls=(ToolCall(new_id(), FunctionCall(call["name"], arguments)),))
    if speaker not in _ROLES:
        raise ValueError(f"an unknown speaker {speaker!r}")
    return ChatMessage(_ROLES[speaker], value)


# Which one it is.


def _parse_markdown(text: str, name: str) -> Conversation:
    found, messages, interrupted = from_markdown(text)
    return conversation_of(messages, found or name, interrupted=interrupted)


FORMATS = (
    Format("json", (".json",), _dump_json, _parse_json),
    Format("openai", (), _dump_openai, _parse_openai),
    Format("openai-jsonl", (".jsonl",), _dump_openai_line, _parse_openai),
    Format("sharegpt", (), _dump_sharegpt, _parse_sharegpt),
    Format("markdown", (".md", ".markdown"), to_markdown, _parse_markdown),
)


def _format_of(path: Path, name: str | None) -> Format:
    if name is None:
        for each in FORMATS:
            if path.suffix.lower() in each.suffixes:
                return each
        suffixes = ", ".join(suffix for each in FORMATS for suffix in each.suffixes)
        raise ConversationError(
            f"the suffix of {path.name!r} names no format",
            why=f"known are {suffixes}",
            fix="add --format json, openai, sharegpt or markdown",
        )
    known = {each.name: each for each in FORMATS} | {"md": FORMATS[-1]}
    if name.lower() not in known:
        hint = did_you_mean(name, list(known)) or f"known are {', '.join(known)}"
        raise ConversationError(f"unknown format {name!r}", fix=hint)
    return known[name.lower()]


def _sniffed(text: str) -> Format:
    """The format that the content shows.

    Raises:
        ValueError: none of ours.
    """
    by_name = {each.name: each for each in FORMATS}
    if is_markdown(text):
        return by_name["markdown"]
    record = json.loads(text)
    first = record[0] if isinstance(record, list) and record else record
    if not isinstance(first, dict):
        raise ValueError("no messages")  # noqa: TRY004 - of a file's content
    if first.get("format") == _KIND:
        return by_name["json"]
    if "messages" in first or "role" in first:
        return by_name["openai"]
    if "conversations" in first or "from" in first:
        return by_name["sharegpt"]
    raise ValueError("neither kani_nb's own JSON, OpenAI messages nor ShareGPT")


def _not_one(path: Path, why: str) -> ConversationError:
    return ConversationError(
        f"{path} is not a conversation that can be read",
        why=why,
        fix="known are kani_nb's own .json and .md, OpenAI messages, and ShareGPT",
    )


def _write_whole(target: Path, data: bytes) -> None:
    """Write beside `target`, then take its place."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:40]}.")
    beside = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask()
        beside.chmod(mode)
        beside.replace(target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
