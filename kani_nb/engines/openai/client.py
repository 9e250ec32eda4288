"""OpenAIClient: the requests of OpenAI's HTTP API, to any server that speaks it. No vendor's SDK.

It knows routes, the key, and what servers say when they refuse. How a prompt is made and an answer put together is the
engine's.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kani_nb.engines.httpclient.client import BaseClient, ServerError, ServerEvent
from kani_nb.engines.httpclient.errors import sendable
from kani_nb.engines.httpclient.session import Session
from kani_nb.engines.openai.address import OPENAI_BASE, ApiKey, default_base, find_key, is_openai, split_address
from kani_nb.engines.openai.messages import api_messages
from kani_nb.errors import EngineError, PromptTooLongError, UnknownModelError, did_you_mean
from kani_nb.functions import tool_schemas
from kani_nb.messages import ChatMessage

if TYPE_CHECKING:
    import httpx

#: Characters of a model's name; what is longer is none, and would fill an error.
_LONGEST_NAME = 256
_TOO_LONG = re.compile(
    r"context_length_exceeded|exceed_context_size|max(imum)? model len|context (window|size|length)"
    r"|prompt (is )?too long|too many tokens|input is too long|longer than the model",
    re.IGNORECASE,
)
_NO_MODEL = re.compile(
    r"model_not_found|unknown model|pinned to|model\b.{0,300}\b(not found|not exist|no longer available)",
    re.IGNORECASE | re.DOTALL,
)


class OpenAIClient(BaseClient):
    """The chat API of one server.

    Args:
        api_key: sent to this server alone; None looks in the environment, by the rules of `address`.
        http: an `httpx.AsyncClient` to use and to leave open.
        api_base: the server's address, for example `http://127.0.0.1:8000/v1`; OpenAI's own by default.
        organization: OpenAI's organization, where a key belongs to several.
        headers, retry, timeout, connect_timeout: see `BaseClient`.

    Raises:
        ConfigError: the address is none, or the key cannot be sent.
    """

    SERVICE_BASE = OPENAI_BASE

    def __init__(
        self,
        api_key: str | None = None,
        http: httpx.AsyncClient | None = None,
        *,
        api_base: str | None = None,
        organization: str | None = None,
        headers: Mapping[str, str] | None = None,
        retry: int = 5,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
    ) -> None:
        super().__init__(http, headers=headers, retry=retry, timeout=timeout, connect_timeout=connect_timeout)
        usual = default_base() if self.SERVICE_BASE == OPENAI_BASE else self.SERVICE_BASE
        self.SERVICE_BASE = split_address(api_base or usual)[0]
        self.key: ApiKey | None = find_key(self.SERVICE_BASE, api_key)
        if self.key is not None and not any(name.lower() == "authorization" for name in self._headers):
            self._headers["Authorization"] = sendable("Authorization", f"Bearer {self.key.value}")
        if organization:
            self._headers["OpenAI-Organization"] = sendable("OpenAI-Organization", organization)

    # -- the API ---------------------------------------------------------------------------------------------------

    async def models(self, *, retry: int | None = None) -> list[dict[str, Any]]:
        """The records of the server's models.

        Raises:
            ServerError, ServerDownError, AccessRefusedError: as `BaseClient.request`.
        """
        found = await self.get("/models", retry=retry)
        records = found.get("data") if isinstance(found, dict) else found
        if not isinstance(records, list):
            raise ServerError(f"{self.address} does not list its models", why="its answer holds no list")
        named = [each for each in records if isinstance(each, dict) and isinstance(each.get("id"), str)]
        return [each for each in named if each["id"].isprintable() and 0 < len(each["id"]) <= _LONGEST_NAME]

    async def create_chat_completion(
        self,
        model: str,
        messages: Sequence[ChatMessage],
        functions: Sequence[Any] | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """The server's own record of a whole answer; `fields` are those of the API, as they are.

        Raises:
            PromptError: a message cannot be sent.
            EngineError: as `chat_events`.
        """
        body = {"model": model, "messages": api_messages(messages), **fields}
        if tools := tool_schemas(functions):
            body["tools"] = tools
        failure: EngineError | PromptTooLongError
        try:
            answer: dict[str, Any] = await self.post("/chat/completions", json=body)
        except ServerError as error:
            failure = await self.explained(error, model)
        else:
            return answer
        raise failure

    async def chat_events(self, body: Mapping[str, Any]) -> AsyncGenerator[ServerEvent]:
        """The events of a chat request. Closing the iterator hangs up, so that the server stops.

        Raises:
            PromptTooLongError: the server says that the prompt does not fit.
            UnknownModelError: the server has no such model; the near misses among those it has are named.
            ServerError, ServerDownError, AccessRefusedError: as `BaseClient.request`.
        """
        events = self.stream_sse("/chat/completions", json=body)
        failure: EngineError | PromptTooLongError | None = None
        try:
            async for event in events:
                yield event
        except ServerError as error:
            failure = await self.explained(error, str(body.get("model")))
        finally:
            await events.aclose()
        if failure is not None:
            raise failure

    async def of_root(self, method: str, route: str, **kwargs: Any) -> Any:
        """A request to what the server has beside the API, above its `/v1`; raises as `BaseClient.request`."""
        return await _Root(self).request(method, route, retry=2, **kwargs)

    # -- refusals --------------------------------------------------------------------------------------------------

    async def explained(self, error: ServerError, model: str) -> EngineError | PromptTooLongError:
        """What a refusal means, where it is one of those that have a name of their own."""
        said = f"{error.code} {error.said}"
        if error.status in (400, 413, 422, 500) and _TOO_LONG.search(said):
            return PromptTooLongError(
                "the prompt does not fit this server's context",
                why=error.said,
                fix="shorten it, or load the engine with the server's own --max-context-size",
            )
        if error.status in (400, 404) and _NO_MODEL.search(said):
            return await self.unknown_model(model)
        if error.status == 404 and not error.said.startswith("an HTML"):
            try:
                listed = [each["id"] for each in await self.models(retry=0)]
            except EngineError:
                return error
            return error if model in listed else await self.unknown_model(model)
        return error

    async def unknown_model(self, model: str, listed: Sequence[str] | None = None) -> UnknownModelError:
        """That the server has no such model, and which it has."""
        if listed is None:
            try:
                listed = [each["id"] for each in await self.models(retry=0)]
            except EngineError:
                listed = []
        shown = ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
        return UnknownModelError(
            f"{self.address} has no model {model!r}",
            why=f"it has {shown}" if listed else "",
            fix=did_you_mean(model, list(listed)) or ("name one of them" if listed else "ask who runs the server"),
        )

    def _key_hint(self, status: int) -> str:
        if self.key is not None:
            return f"the key {self.key} was refused: check that it is whole, and meant for this server"
        if is_openai(self.SERVICE_BASE):
            return "set OPENAI_API_KEY in the environment before the kernel starts"
        return (
            "the server wants a key: set KANI_NB_API_KEY in the environment (OPENAI_API_KEY goes to OpenAI alone, "
            "or where OPENAI_BASE_URL says)"
        )

    def _start_hint(self) -> str:
        if not self.is_local:
            return "check the address and the network, and that the server runs and listens to other machines"
        port = self._service.port
        return (
            f"start a server there, for example `vllm serve MODEL --port {port}`, `llama-server -m FILE.gguf --port "
            f"{port}` or `transformers serve MODEL --port {port}`"
        )


class _Root(BaseClient):
    """The same server, above its `/v1`: same key, same connections."""

    def __init__(self, client: OpenAIClient) -> None:
        super().__init__(client.http, headers=client._headers, timeout=30.0)
        self.SERVICE_BASE = client._service.above()
        self._client = client

    def session(self) -> Session:
        """The client's own, which closes it."""
        return self._client.session()
