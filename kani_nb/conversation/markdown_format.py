"""A conversation as Markdown that reads well anywhere, and back.

Each message stands below a heading, with one HTML comment above it that says whose it is; readers do not see the
comments, and only they are read back, so that headings and code fences inside a message cannot be mistaken. A line of a
message that looks like such a comment is kept apart by a backslash. Only the current branch is written.
"""

from __future__ import annotations

import json
import re
from typing import Any

from kani_nb.conversation.tree import Conversation, Turn
from kani_nb.messages import ChatMessage, ChatRole, MediaPart

_MARK = re.compile(r"^<!-- kani_nb (\{.*\}) -->$", re.MULTILINE)
_LOOKS_LIKE_MARK = re.compile(r"^<!-- (\\*)kani_nb ", re.MULTILINE)
_ESCAPED_MARK = re.compile(r"^<!-- \\(\\*)kani_nb ", re.MULTILINE)
_TITLES = {ChatRole.SYSTEM: "System", ChatRole.USER: "User", ChatRole.ASSISTANT: "Assistant", ChatRole.FUNCTION: "Tool"}


def is_markdown(text: str) -> bool:
    """Whether `text` is Markdown that `to_markdown` wrote."""
    return text.startswith("<!-- kani_nb {")


def to_markdown(conversation: Conversation) -> str:
    """The system prompt and the current branch."""
    title = " ".join(conversation.name.split()) or "Conversation"
    blocks = [_mark({"conversation": conversation.name, "version": 1}) + f"\n# {title}\n"]
    if conversation.system is not None:
        blocks.append(_block(ChatMessage.system(conversation.system), None))
    for turn in conversation.path():
        blocks += [_block(message, turn) for message in turn.messages]
    return "\n".join(blocks)


def from_markdown(text: str) -> tuple[str, list[ChatMessage], frozenset[int]]:
    """The name, the messages (a system prompt first), and the positions of those whose answer was cut short.

    Raises:
        ValueError: it is not Markdown that `to_markdown` wrote.
        ConfigError: a message that cannot be read.
    """
    marks = list(_MARK.finditer(text))
    head: dict[str, Any] = json.loads(marks[0][1]) if marks else {}
    if "conversation" not in head:
        raise ValueError("it does not begin with kani_nb's mark")
    messages, interrupted = [], set()
    for position, mark in enumerate(marks[1:]):
        is_last = position + 2 == len(marks)
        end = len(text) if is_last else marks[position + 2].start()
        record = json.loads(mark[1])
        if record.pop("interrupted", False):
            interrupted.add(position)
        if "content" not in record:
            # Below the mark stand the heading, an empty line and the text; before the next mark an empty line.
            body = text[mark.end() + 1 : end].split("\n", 2)[2].removesuffix("\n" if is_last else "\n\n")
            record["content"] = _ESCAPED_MARK.sub(r"<!-- \1kani_nb ", body)
        messages.append(ChatMessage.from_dict(record))
    return head["conversation"], messages, frozenset(interrupted)


def _block(message: ChatMessage, turn: Turn | None) -> str:
    record = message.to_dict()
    if isinstance(message.content, str):
        del record["content"]  # it stands below the heading
        body = _LOOKS_LIKE_MARK.sub(r"<!-- \\\1kani_nb ", message.content)
    else:
        pieces = [f"*({part.kind})*" if isinstance(part, MediaPart) else str(part) for part in message.parts]
        calls = [f"*calls* `{each.function.name}({each.function.arguments})`" for each in message.tool_calls or ()]
        body = _LOOKS_LIKE_MARK.sub(r"<!-- \\\1kani_nb ", "\n\n".join(filter(None, [*pieces, *calls])))
    title = _TITLES[message.role]
    if turn is not None and turn.interrupted and message is turn.messages[-1]:
        record["interrupted"] = True
        title += " (interrupted)"
    return f"{_mark(record)}\n## {title}\n\n{body}\n"


def _mark(record: dict[str, Any]) -> str:
    """A comment that holds `record`; no `-->` can end it early, and it is one line of ASCII."""
    return f"<!-- kani_nb {json.dumps(record, default=repr).replace('>', chr(92) + 'u003e')} -->"
