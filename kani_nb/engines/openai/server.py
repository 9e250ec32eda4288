"""What a chat server is: whose, which model it runs, and how much that can read.

Asked once, when the engine is loaded. What a server does not say is assumed, and `ServerFacts` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kani_nb.engines.httpclient.client import AccessRefusedError, ServerDownError, ServerError, ServerTimeoutError
from kani_nb.engines.openai.address import DEFAULT_MODEL, is_openai
from kani_nb.engines.openai.client import OpenAIClient
from kani_nb.engines.openai.params import ServerKind
from kani_nb.errors import ConfigError, EngineError, UnknownModelError

#: Tokens that are assumed where neither the server nor the person says it.
ASSUMED_CONTEXT = 8192
#: Ollama's own default for each model, which it does not tell here; it leaves out the start of a longer prompt in
#: silence.
_OLLAMA_CONTEXT = 4096
#: OpenAI's API does not tell it. The windows of its models, by the start of their names, the most special first;
#: platform.openai.com/docs/models.
_OPENAI_CONTEXTS = {
    "gpt-3.5-turbo": 16_385,
    "gpt-4-turbo": 128_000,
    "gpt-4-1106": 128_000,
    "gpt-4-0125": 128_000,
    "gpt-4.1": 1_047_576,
    "gpt-4.5": 128_000,
    "gpt-4o": 128_000,
    "gpt-4": 8_192,
    "gpt-5-chat": 128_000,
    "gpt-5": 400_000,
    "chatgpt-4o": 128_000,
    "o1-mini": 128_000,
    "o1": 200_000,
    "o3": 200_000,
    "o4": 200_000,
}
_OWNERS = {
    "vllm": ServerKind.VLLM,
    "llamacpp": ServerKind.LLAMACPP,
    "library": ServerKind.OLLAMA,
    "me": ServerKind.LLAMACPP_PYTHON,
}
#: What servers call the context of a model in their lists.
_CONTEXT_NAMES = ("max_model_len", "context_length", "context_window", "max_context_length", "n_ctx")


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What was found out.

    Attributes:
        max_context_size: tokens of prompt and answer together.
        context_source: `given`, `told by the server`, `known of the model`, or `assumed`.
        notes: what could not be found out, for people to read.
    """

    kind: ServerKind
    model: str
    max_context_size: int
    context_source: str
    notes: tuple[str, ...] = ()

    @property
    def knows_context(self) -> bool:
        """Whether the context is more than an assumption."""
        return self.context_source != "assumed"


async def find_out(
    client: OpenAIClient, model: str | None, *, is_vllm: bool = False, max_context_size: int | None = None
) -> ServerFacts:
    """Ask the server what it is.

    Raises:
        ServerDownError: nothing answers there.
        AccessRefusedError: it wants a key, or another.
        UnknownModelError: it does not have the model.
        ConfigError: no model was named, and it has several or none.
        ServerError: what answers is no such server.
    """
    if is_openai(client.SERVICE_BASE):
        return await _openai(client, model, max_context_size)
    records, notes = await _listed(client, model)
    kind = _kind(records, is_vllm=is_vllm)
    chosen = model or _only_model(records, client)
    record = next((each for each in records if _is_named(each["id"], chosen)), None)
    if record is None and records:
        if not _is_folder(chosen):
            raise await client.unknown_model(chosen, [each["id"] for each in records])
        # `transformers serve FOLDER` lists its cache, and not the folder.
        notes.append(f"the server does not list {chosen}: its first answer will show whether it has it")
    context = _context_in(record) if kind is not ServerKind.LLAMACPP else await _llamacpp_context(client)
    size, source = max_context_size, "given"
    if size is None:
        size, source = context, "told by the server"
    if size is None:
        size, source = (_OLLAMA_CONTEXT if kind is ServerKind.OLLAMA else ASSUMED_CONTEXT), "assumed"
        notes.append(f"the server does not say how much it can read: {size:,} tokens are assumed (--max-context-size)")
    return ServerFacts(kind, chosen, size, source, tuple(notes))


async def _openai(client: OpenAIClient, model: str | None, max_context_size: int | None) -> ServerFacts:
    chosen = model or DEFAULT_MODEL
    if client.key is None and client.http is None:
        raise AccessRefusedError(
            f"{chosen} runs at OpenAI, and no key was found",
            fix="set OPENAI_API_KEY in the environment before the kernel starts; a server of your own is named by its "
            "address: vllm:http://host:8000/v1",
        )
    records, notes = await _listed(client, chosen)
    listed = [each["id"] for each in records]
    if chosen not in listed and not notes:
        raise await client.unknown_model(chosen, listed)
    if max_context_size is not None:
        return ServerFacts(ServerKind.OPENAI, chosen, max_context_size, "given", tuple(notes))
    known = next((size for start, size in _OPENAI_CONTEXTS.items() if chosen.startswith(start)), None)
    if known is not None:
        return ServerFacts(ServerKind.OPENAI, chosen, known, "known of the model", tuple(notes))
    note = f"how much {chosen} can read is not known here: 128,000 tokens are assumed (--max-context-size)"
    return ServerFacts(ServerKind.OPENAI, chosen, 128_000, "assumed", (*notes, note))


async def _listed(client: OpenAIClient, model: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """What the server lists, and what to note where it has no list, or fails to make it, and a model was named."""
    failure: ServerError
    try:
        return await client.models(retry=min(1, client.retry)), []
    except (AccessRefusedError, ServerDownError, ServerTimeoutError):
        raise
    except ServerError as error:
        failure = error
    # Any that answers so may still have the model.
    has_no_list = failure.status in (404, 405) or (failure.status or 0) >= 500
    if model is not None and has_no_list:
        return [], [f"the server does not list its models ({failure.status}): {model} was not looked for"]
    if has_no_list and failure.status != 404:  # a wrong address is likelier there
        failure.fix = f"it may answer all the same: name the model, {client.address}#MODEL; {failure.fix}".rstrip("; ")
    raise failure


def _is_named(listed: str, name: str) -> bool:
    """Whether a server means the model it lists as `listed` when it is asked for `name`."""
    return listed in (name, f"{name}:latest", f"{name}@main") or f"{listed}@main" == name


def _is_folder(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name[1:3] in (":\\", ":/")


def _kind(records: Sequence[Mapping[str, Any]], *, is_vllm: bool) -> ServerKind:
    if is_vllm:
        return ServerKind.VLLM
    owners = {str(each.get("owned_by", "")).lower() for each in records}
    return _OWNERS.get(owners.pop(), ServerKind.OTHER) if len(owners) == 1 else ServerKind.OTHER


def _only_model(records: Sequence[Mapping[str, Any]], client: OpenAIClient) -> str:
    names = [each["id"] for each in records]
    if len(names) == 1:
        return str(names[0])
    if not names:
        raise UnknownModelError(
            f"{client.address} lists no model",
            why="and none was named",
            fix=f"name the one that it runs: openai:MODEL@{client.address}",
        )
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    raise ConfigError(
        f"{client.address} has {len(names)} models, and none was named",
        why=f"it has {shown}",
        fix=f"openai:{names[0]}@{client.address}",
    )


def _context_in(record: Mapping[str, Any] | None) -> int | None:
    for source in (record or {}, (record or {}).get("meta") or {}):
        for name in _CONTEXT_NAMES:
            value = source.get(name) if isinstance(source, Mapping) else None
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


async def _llamacpp_context(client: OpenAIClient) -> int | None:
    try:
        found = await client.of_root("GET", "/props")
    except EngineError:  # it can be switched off, and behind a router it is
        return None
    settings = found.get("default_generation_settings") if isinstance(found, dict) else None
    return _context_in(settings if isinstance(settings, dict) else found if isinstance(found, dict) else None)
