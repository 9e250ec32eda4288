"""How many tokens a prompt has: counted by the server's tokenizer where it has one, else by the best that there is.

In this order: vLLM's `/tokenize`, llama.cpp's `/apply-template` and `/tokenize`, llama-cpp-python's
`/extras/tokenize/count` (texts alone, so that the template is estimated), `tiktoken` for OpenAI's models where it is
installed and has its files, else an estimate from the number of bytes. What the server has counted itself, as the
usage of an answer, is remembered and built upon.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import importlib.util
import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from kani_nb.engines.httpclient.client import ServerError
from kani_nb.engines.openai.client import OpenAIClient
from kani_nb.engines.openai.params import ServerKind
from kani_nb.errors import PromptError, PromptTooLongError

#: UTF-8 bytes per token; a little too few, so that a prompt is rather thought too long than too short.
BYTES_PER_TOKEN = 3.5
#: What a chat template puts around one message, and around all.
_PER_MESSAGE, _PER_PROMPT = 6, 4
#: An image or a sound; it depends on the model and on its size.
_PER_MEDIUM = 800
_REMEMBERED = 512

_WORDS = {
    ServerKind.VLLM: "the server's tokenizer",
    ServerKind.LLAMACPP: "the server's tokenizer",
    ServerKind.LLAMACPP_PYTHON: "the server's tokenizer, and an estimate of the chat template",
}
_ESTIMATE = f"an estimate (a token per {BYTES_PER_TOKEN} bytes), corrected by what the server counts"


class TokenCounter:
    """Counts prompts for one model of one server.

    Attributes:
        counted_by: how, in words.
        is_exact: whether a prompt without media has exactly so many tokens.
    """

    def __init__(self, client: OpenAIClient, kind: ServerKind, model: str) -> None:
        self._client = client
        self._kind = kind
        self._model = model
        self._encoding: Any = None
        self._looks_for_encoding = kind is ServerKind.OPENAI
        self._counted: OrderedDict[str, int] = OrderedDict()
        self._told: OrderedDict[str, int] = OrderedDict()
        self.counted_by = _WORDS.get(kind, _ESTIMATE)

    @property
    def is_exact(self) -> bool:
        """Whether the server counts the very prompt that it makes."""
        return self._kind in (ServerKind.VLLM, ServerKind.LLAMACPP)

    async def count(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], *, ask: bool = True
    ) -> int:
        """Tokens of the prompt; an estimate where the server must not be asked now.

        Raises:
            PromptError: the server cannot make a prompt of the messages; `PromptTooLongError` where it says so.
            ServerDownError, ServerTimeoutError, AccessRefusedError: as their names say.
        """
        key = _key(messages, tools)
        if (told := self._told.get(key)) is not None:
            return told
        if (counted := self._counted.get(key)) is None:
            if not ask:
                return self._estimate(messages, tools)
            counted = await self._count(messages, tools)
            _remember(self._counted, key, counted)
        return counted

    def learn(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], tokens: int) -> None:
        """What the server says that this prompt had."""
        if not self.is_exact:
            _remember(self._told, _key(messages, tools), tokens)

    async def _count(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
        if self._kind in _WORDS:
            try:
                return await self._by_server(messages, tools)
            except ServerError as error:
                failure = await self._client.explained(error, self._model)
                if isinstance(failure, PromptTooLongError):
                    raise failure from None
                if error.status not in (404, 405, 501):
                    raise PromptError("the server cannot make a prompt of these messages", why=error.said) from None
            # It has been switched off, or a proxy lets only the API through.
            self._kind, self.counted_by = ServerKind.OTHER, _ESTIMATE
        if self._looks_for_encoding:
            self._looks_for_encoding = False
            if (found := await self._tiktoken()) is not None:
                self._encoding, self.counted_by = found, f"tiktoken ({found.name}), corrected by what the server counts"
        return self._estimate(messages, tools)

    async def _by_server(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
        client, said = self._client, {"model": self._model, "messages": list(messages)}
        media = _PER_MEDIUM * sum(_media(each) for each in messages)
        if tools:
            said["tools"] = list(tools)
        if self._kind is ServerKind.VLLM:
            found = await client.of_root("POST", "/tokenize", json={**said, "add_generation_prompt": True})
            return _number(found, "count") + media
        if self._kind is ServerKind.LLAMACPP:
            prompt = await client.of_root("POST", "/apply-template", json=said)
            text = prompt.get("prompt") if isinstance(prompt, dict) else None
            asked = {"content": text, "add_special": True, "parse_special": True}
            found = await client.of_root("POST", "/tokenize", json=asked)
            return _number(found, "tokens") + media
        total = _PER_PROMPT + media
        for text in (*(_said(each) for each in messages), *([_compact(tools)] if tools else ())):
            key = _key(text, ())
            if (known := self._counted.get(key)) is None:
                asked = {"model": self._model, "input": text}
                known = _number(await client.of_root("POST", "/extras/tokenize/count", json=asked), "count")
                _remember(self._counted, key, known)
            total += _PER_MESSAGE + known
        return total

    def _estimate(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> int:
        """From the longest beginning that the server has counted, if there is one."""
        start, total = 0, _PER_PROMPT + (self._tokens(_compact(tools)) if tools else 0)
        for length in range(len(messages) - 1, 0, -1):
            if (told := self._told.get(_key(messages[:length], tools))) is not None:
                start, total = length, told
                break
        for message in messages[start:]:
            total += _PER_MESSAGE + self._tokens(_said(message)) + _PER_MEDIUM * _media(message)
        return total

    def _tokens(self, text: str) -> int:
        if self._encoding is not None:
            return len(self._encoding.encode(text, disallowed_special=()))
        return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN)

    async def _tiktoken(self) -> Any:
        """OpenAI's encoding of the model; None where tiktoken is not installed or cannot fetch its files."""
        if importlib.util.find_spec("tiktoken") is None:
            return None

        def find() -> Any:
            tiktoken = importlib.import_module("tiktoken")
            try:
                return tiktoken.encoding_for_model(self._model)
            except KeyError:  # newer than the library
                return tiktoken.get_encoding("o200k_base")

        try:
            async with asyncio.timeout(10):
                return await asyncio.to_thread(find)
        except Exception:  # noqa: BLE001 - whatever its download raises, an estimate does
            return None


def _said(message: Mapping[str, Any]) -> str:
    """Everything in a message that is text for a model."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(each.get("text", "") for each in content)
    calls = message.get("tool_calls")
    return f"{content}{_compact(calls)}" if calls else content


def _media(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    return sum(each.get("type") != "text" for each in content) if isinstance(content, list) else 0


def _number(found: Any, name: str) -> int:
    value = found.get(name) if isinstance(found, dict) else None
    if isinstance(value, list):
        return len(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ServerError("the server's tokenizer gave no number", why=f"its answer has no {name!r}")


def _compact(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False, sort_keys=True)


def _key(messages: Any, tools: Any) -> str:
    return hashlib.sha256(_compact([messages, list(tools)]).encode("utf-8", "replace")).hexdigest()


def _remember(known: OrderedDict[str, int], key: str, tokens: int) -> None:
    known[key] = tokens
    known.move_to_end(key)
    while len(known) > _REMEMBERED:
        known.popitem(last=False)
