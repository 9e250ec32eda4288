"""From messages to token ids: the chat template, the user's text as text, and the answers as they were generated.

Templates are programs by strangers; what they refuse is reported in their words with a way out. A user's text never
becomes a control token. And the model's own answers are given back to it in the tokens it chose: encoding their text
anew may split it differently, which would both change what the model sees and lose the cached states from there on.
"""

from __future__ import annotations

import inspect
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from json import JSONDecodeError
from typing import Any

from kani_nb.engines.described_tools import encode_with_tools, ignores_tools
from kani_nb.errors import PromptError
from kani_nb.messages import ChatMessage, ChatRole, MediaPart, ToolCall

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
_TEMPLATE_ROLES = {ChatRole.FUNCTION: "tool"}


def template_records(messages: Sequence[ChatMessage], *, with_media: bool = False) -> list[dict[str, Any]]:
    """The messages in the form that chat templates read; `with_media` their contents are lists of parts.

    Raises:
        PromptError: a part that is not text, or text that no encoding can represent.
    """
    records = []
    for message in messages:
        for part in message.parts:
            if isinstance(part, MediaPart) and not with_media:
                raise PromptError(f"this model reads only text, and the message holds {part.mime}", fix="remove it")
        record: dict[str, Any] = {"role": _TEMPLATE_ROLES.get(message.role, message.role.value)}
        if message.role is ChatRole.ASSISTANT:  # what a model says may be anything
            record["content"] = message.text.encode("utf-8", "replace").decode("utf-8")
        else:
            record["content"] = check_text(message.text)
        if with_media:
            record["content"] = _content_parts(message, record["content"])
        if message.tool_calls:
            record["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": _read(call)}}
                for call in message.tool_calls
            ]
        if message.reasoning:
            record["reasoning_content"] = message.reasoning
        if message.name is not None:
            record["name"] = message.name
        if message.tool_call_id is not None:
            record["tool_call_id"] = message.tool_call_id
        records.append(record)
    return records


def _content_parts(message: ChatMessage, text: str) -> list[dict[str, Any]]:
    """The parts in their order: what a template makes a placeholder of, and text."""
    if not any(isinstance(part, MediaPart) for part in message.parts):
        return [{"type": "text", "text": text}]
    return [
        {"type": part.kind} if isinstance(part, MediaPart) else {"type": "text", "text": str(part)}
        for part in message.parts
        if isinstance(part, MediaPart) or str(part)
    ]


def _read(call: ToolCall) -> Any:
    """The arguments as templates want them; what is not JSON as the model wrote it, for it to see."""
    try:
        return call.function.kwargs
    except JSONDecodeError:
        return call.function.arguments


def check_text(text: str) -> str:
    """`text`, if every tokenizer can read it.

    Raises:
        PromptError: a lone surrogate, which no encoding of Unicode represents, or a NUL.
    """
    bad = re.search(r"[\ud800-\udfff\x00]", text)
    if bad is None:
        return text
    what = "NUL" if bad[0] == "\x00" else f"lone surrogate U+{ord(bad[0]):04X}"
    raise PromptError(
        f"the message holds a {what} at character {bad.start():,}", why="it is not text", fix="remove it and ask again"
    )


class ChatTemplate:
    """A tokenizer's chat template, applied.

    Args:
        tokenizer: with `apply_chat_template`.
        model_name: for messages to people.
        template_kwargs: further variables of the template.
    """

    def __init__(self, tokenizer: Any, model_name: str, template_kwargs: dict[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._name = model_name
        self._kwargs = dict(template_kwargs or {})
        accepted = inspect.signature(tokenizer.apply_chat_template).parameters
        self._can_sanitize = "sanitize_control_tokens" in accepted

    @cached_property
    def ignores_tools(self) -> bool:
        """Whether the template says nothing of the tools it is given."""
        return ignores_tools(self._rendered_of)

    def encode(self, messages: Sequence[ChatMessage], functions: Sequence[Any] | None = None) -> list[int]:
        """The prompt's token ids, ready for the model's answer.

        A template that ignores tools gets them in words: see `kani_nb.engines.described_tools`.

        Raises:
            PromptError: there is no template, or it refuses these messages.
        """
        if not messages:
            raise PromptError("there is no message to answer")
        if getattr(self._tokenizer, "chat_template", None) is None:
            raise PromptError(
                f"{self._name} has no chat template",
                why="it is a base model, which continues text and was not taught to chat",
                fix="%load_engine an instruct or chat variant of it, for example smollm2",
            )
        return encode_with_tools(self._encoded, messages, functions, lambda: self.ignores_tools)

    def _encoded(self, messages: Sequence[ChatMessage], tools: list[dict[str, Any]] | None) -> list[int]:
        return self.encode_records(template_records(messages, with_media=self._wants_parts), tools)

    def encode_records(self, records: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """The token ids of messages that are in the template's own form already.

        Raises:
            PromptError: the template refuses them.
        """
        from jinja2 import TemplateError

        options: dict[str, Any] = {"tools": tools, **self._kwargs}
        try:
            ids = self._apply(records, options)
        except TemplateError as error:
            raise PromptError(
                f"the chat template of {self._name} refuses these messages",
                why=str(error),
                fix=_way_out(str(error), records),
            ) from error
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise PromptError(
                f"the chat template of {self._name} failed on these messages", why=f"{type(error).__name__}: {error}"
            ) from error
        return [int(token) for token in ids]

    def _rendered_of(self, messages: Sequence[ChatMessage], tools: list[dict[str, Any]] | None) -> str:
        rendered = self._rendered(template_records(messages, with_media=self._wants_parts), tools)
        if not rendered:
            raise PromptError(f"the chat template of {self._name} fails on a question")
        return rendered

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template reads contents as lists of parts only, as those of some multimodal models do."""
        asked = [{"role": "user", "content": "kani?"}]
        in_parts = [{"role": "user", "content": [{"type": "text", "text": "kani?"}]}]
        return "kani?" not in self._rendered(asked) and "kani?" in self._rendered(in_parts)

    def _rendered(self, records: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        """A prompt as text; empty where the template fails on it."""
        from jinja2 import TemplateError

        options = {"tools": tools, "add_generation_prompt": True, **self._kwargs}
        try:
            text: str = self._tokenizer.apply_chat_template(records, tokenize=False, **options)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError):
            return ""
        return text

    def _apply(self, records: list[dict[str, Any]], options: dict[str, Any]) -> list[int]:
        apply = self._tokenizer.apply_chat_template
        options = {"add_generation_prompt": True, **options}
        if self._can_sanitize:
            ids: list[int] = apply(records, tokenize=True, return_dict=False, sanitize_control_tokens=True, **options)
            return ids
        control = [token for token in self._tokenizer.all_special_tokens if token]
        texts = [_text_of(record) for record in records]
        if not any(token in text for text in texts for token in control):
            return list(apply(records, tokenize=True, return_dict=False, **options))
        # Before transformers 5.16 or so: render with marks in place of the contents, and encode those as plain text.
        marks = [f"\ue000{number}\ue001" for number in range(len(records))]
        marked = [_with_text(record, mark) for record, mark in zip(records, marks, strict=True)]
        rendered = apply(marked, tokenize=False, **options)
        encoded: list[int] = []
        for piece in re.split("(\ue000[0-9]+\ue001)", rendered):
            is_content = piece in marks
            text = texts[marks.index(piece)] if is_content else piece
            options = {"add_special_tokens": False, "split_special_tokens": is_content}
            encoded += self._tokenizer(text, **options)["input_ids"] if text else []
        return encoded


def _text_of(record: dict[str, Any]) -> str:
    """The text of a record whose content is text, or parts of text."""
    content = record.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _with_text(record: dict[str, Any], text: str) -> dict[str, Any]:
    is_text = isinstance(record.get("content"), str)
    return record | {"content": text if is_text else [{"type": "text", "text": text}]}


def _way_out(complaint: str, records: list[dict[str, Any]]) -> str:
    if "system" in complaint.lower() and records[0]["role"] == "system":
        return "%chat system --clear, and say it in the first message instead"
    if "alternat" in complaint.lower() or "role" in complaint.lower():
        return "%chat undo, or %chat new: this model wants user and assistant in turns"
    return "%chat history shows the messages; %chat new starts afresh"


def call_build_prompt(build: Callable[..., Any], messages: Sequence[ChatMessage], tools: Sequence[Any] | None) -> Any:
    """What `build_prompt` of an engine gives; those of the 0.x style may take no functions."""
    takes_functions = len(inspect.signature(build).parameters) > 1
    return build(messages, tools) if takes_functions else build(messages)


def ids_of(prompt: Any, tokenizer: Any) -> list[int]:
    """The token ids of what `build_prompt` gave: text, ids, a batch of one, a tensor, or a tokenizer's output.

    Text that does not begin with the tokenizer's beginning-of-sequence token gets its usual special tokens.

    Raises:
        PromptError: there is not a single token.
    """
    if isinstance(prompt, str):
        has_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        prompt = tokenizer(prompt, add_special_tokens=not has_bos)
    if isinstance(prompt, Mapping):
        prompt = prompt["input_ids"]
    if hasattr(prompt, "flatten"):
        prompt = prompt.flatten().tolist()
    if prompt and isinstance(prompt[0], list | tuple):
        prompt = [token for row in prompt for token in row]
    if not prompt:
        raise PromptError("the prompt has no tokens", why="the template rendered nothing", fix="%chat history")
    return [int(token) for token in prompt]


class AnswerMemory:
    """The token ids of the latest sequences as they really were, to be put back into prompts made from their text.

    Works without KV states, so that the model sees the same tokens whether states are reused or not.
    """

    def __init__(self, tokenizer: Any, limit: int = 64) -> None:
        self._tokenizer = tokenizer
        self._special = set(getattr(tokenizer, "all_special_ids", ()))
        self._sequences: deque[list[int]] = deque(maxlen=limit)

    def remember(self, ids: list[int]) -> None:
        """Keep one whole sequence, prompt and answer."""
        for known in list(self._sequences):
            if ids[: len(known)] == known:  # the new one goes on where a known one ended
                self._sequences.remove(known)
        self._sequences.append(ids)

    def restore(self, ids: list[int]) -> list[int]:
        """`ids` with the longest stretch that spells a remembered sequence replaced by that sequence's own ids."""
        best: tuple[int, int, list[int]] = (0, 0, [])
        for known in reversed(self._sequences):
            here, there = self._align(ids, known)
            if here > best[0]:
                best = (here, there, known)
        here, there, known = best
        return known[:there] + ids[here:]

    def _align(self, ids: list[int], known: list[int]) -> tuple[int, int]:
        """The furthest positions up to which both spell the same text with the same control tokens."""
        from kani_nb.engines.huggingface.prefix_cache import common_prefix

        here = there = common_prefix(ids, known)
        agreed = (here, there)
        while here < len(ids) and there < len(known):
            if ids[here] == known[there]:
                here, there = here + 1, there + 1
                agreed = (here, there)
                continue
            step = self._same_spelling(ids, here, known, there)
            if step is None:
                break
            here, there = step
            agreed = step
        return agreed

    def _same_spelling(self, ids: list[int], here: int, known: list[int], there: int) -> tuple[int, int] | None:
        """The next positions at which two different splits of one text meet again."""
        left = right = ""
        for _ in range(64):
            if len(left) <= len(right):
                if here >= len(ids) or ids[here] in self._special:
                    return None
                left += self._piece(ids[here])
                here += 1
            else:
                if there >= len(known) or known[there] in self._special:
                    return None
                right += self._piece(known[there])
                there += 1
            if left == right:
                return here, there
            if not left.startswith(right) and not right.startswith(left):
                return None
        return None

    def _piece(self, token_id: int) -> str:
        piece: str = self._tokenizer.convert_ids_to_tokens(token_id)
        # A byte's name must not be taken for the text that is spelled like it.
        return f"\0{token_id}" if _BYTE.fullmatch(piece) else piece
