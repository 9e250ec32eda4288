"""BaseClient: an HTTP client for engines whose model runs behind a server.

A subclass sets `SERVICE_BASE` and has requests with time limits, retries, streams of events and errors in words. What
is secret (keys, headers, credentials in an address) goes to the server alone: it stands in no repr, no error, and no
exception that an error came from. Nothing here knows what the requests are about.

    class WeatherClient(BaseClient):
        SERVICE_BASE = "https://weather.example/api"

    forecast = await WeatherClient().get("/forecast", params={"city": "Köln"})
"""

from __future__ import annotations

import asyncio
import json
import logging
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from kani_nb.engines.httpclient.address import ServiceAddress, origin_of
from kani_nb.engines.httpclient.errors import (
    MOST_RETRIES,
    AccessRefusedError,
    RateLimitError,
    Redactor,
    ServerDownError,
    ServerError,
    ServerTimeoutError,
    broken_off,
    decoded,
    one_line,
    pause_before_retry,
    refusal,
    secrets_among,
    sendable,
    text_of,
    unreached,
    words_of,
)
from kani_nb.engines.httpclient.session import HungUpError, Session
from kani_nb.engines.httpclient.sse import NO_EVENTS, ServerEvent, events_in
from kani_nb.errors import ConfigError, EngineError

if TYPE_CHECKING:
    import httpx

__all__ = [
    "AccessRefusedError",
    "BaseClient",
    "RateLimitError",
    "ServerDownError",
    "ServerError",
    "ServerEvent",
    "ServerTimeoutError",
]

#: Most bytes of an answer that is not a stream of events.
MAX_BODY_BYTES = 64 * 2**20
_ERROR_BODY_BYTES = 64 * 2**10


class BaseClient:
    """An HTTP client for one service; a subclass sets `SERVICE_BASE`.

    Args:
        http: an `httpx.AsyncClient` to use and to leave open; by default one is made when it is needed.
        headers: sent with every request; none of their values is ever shown.
        retry: how often a request is sent again after 429, 5xx or a broken connection, until it has been answered.
        timeout: longest silence while an answer is read, in seconds; there is no limit to the whole.
        connect_timeout: longest wait for the connection, in seconds.

    Raises:
        ConfigError: the address is none, or a header cannot be sent.
    """

    #: The address that routes are appended to. Credentials and a query in it are sent, and never shown.
    SERVICE_BASE: str = ""
    #: Seconds before the first retry, doubled for each further one, and the longest wait; a server's own wish counts
    #: up to the longest.
    BACKOFF_S: ClassVar[float] = 0.25
    MAX_WAIT_S: ClassVar[float] = 60.0

    logger: ClassVar[logging.Logger] = logging.getLogger(__name__)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Log under the subclass's own module."""
        super().__init_subclass__(**kwargs)
        cls.logger = logging.getLogger(cls.__module__)

    def __init__(
        self,
        http: httpx.AsyncClient | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        retry: int = 3,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
    ) -> None:
        self.http = http
        self.retry = retry
        self.timeout = timeout
        self.connect_timeout = connect_timeout
        self._headers = {name: sendable(name, value) for name, value in (headers or {}).items()}
        self._secrets: set[str] = set()  # of single requests
        self._session: Session | None = None

    # -- requests --------------------------------------------------------------------------------------------------

    async def request(self, method: str, route: str, *, response_as_text: bool = False, **kwargs: Any) -> Any:
        """What the service answers, decoded from JSON (or its text).

        Args:
            method: `GET`, `POST` ...
            route: appended to `SERVICE_BASE`.
            response_as_text: give the text, whatever it is.
            kwargs: `json`, `params`, `headers`, `content`, `data`, `files` as httpx takes them; `retry` and `timeout`
                for this request alone.

        Raises:
            AccessRefusedError: the key is missing or wrong.
            RateLimitError: too many requests, and the wait is too long or did not help.
            ServerDownError: nothing answers there.
            ServerTimeoutError: the server was silent for too long.
            ServerError: it answered with an error, or with something that is not JSON, or broke off.
        """
        async with self.open(method, route, **kwargs) as response:
            body = bytearray()
            async with aclosing(self._pieces(response)) as pieces:
                async for piece in pieces:
                    body += piece
                    if len(body) > MAX_BODY_BYTES:
                        raise ServerError(
                            f"{self._service.where(method, route)} was answered with too much",
                            why=f"more than {MAX_BODY_BYTES / 2**20:.0f} MiB",
                        )
            text, is_empty = text_of(bytes(body), response.charset_encoding), response.status_code == 204
        if is_empty and not response_as_text:  # which is what it says
            return None
        return text if response_as_text else self.decode(text, self._service.where(method, route))

    async def get(self, route: str, **kwargs: Any) -> Any:
        """`request("GET", route)`; raises what it raises."""
        return await self.request("GET", route, **kwargs)

    async def post(self, route: str, **kwargs: Any) -> Any:
        """`request("POST", route)`; raises what it raises."""
        return await self.request("POST", route, **kwargs)

    async def stream_sse(self, route: str, *, method: str = "POST", **kwargs: Any) -> AsyncGenerator[ServerEvent]:
        """The events of an answer as they come; `[DONE]` is the last. Closing the iterator hangs up.

        An answer that is one JSON object and no stream is one event with the type `json`.

        Raises:
            ServerError: as `request`; also in the midst of it, when the connection breaks.
            GenerationError: an event is too long to be one.
        """
        async with self.open(method, route, **kwargs) as response, aclosing(self._pieces(response)) as pieces:
            async for event in events_in(pieces, MAX_BODY_BYTES):
                if event.event == NO_EVENTS:
                    self.decode(event.data, self._service.where(method, route))
                    yield ServerEvent(event.data, "json")
                    continue
                yield event
                if event.data == "[DONE]":
                    await self._drain(pieces)
                    return

    @asynccontextmanager
    async def open(
        self,
        method: str,
        route: str,
        *,
        retry: int | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - of the silence between two pieces, not of the whole
        headers: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[httpx.Response]:
        """The response to a request once it is there, its body unread; hung up when the block is left.

        Raises:
            ServerError: as `request`.
        """
        tries = self.retry if retry is None else retry
        request = self._described(method, route, headers, timeout, kwargs)
        session, tried = self.session(), 0
        while True:
            answer, status = await self._attempt(session, request)
            if not isinstance(answer, EngineError):
                break
            wait = pause_before_retry(answer, tried, first_s=self.BACKOFF_S, longest_s=self.MAX_WAIT_S)
            if tried >= min(tries, MOST_RETRIES.get(status, 0)) or wait is None:
                raise answer
            tried += 1
            self.logger.warning("%s; retry %d in %.1f s", answer.what, tried, wait)
            await asyncio.sleep(wait)
            if session.is_closed:
                raise answer
        try:
            yield answer
        finally:
            await session.leave(answer)

    # -- one attempt -----------------------------------------------------------------------------------------------

    async def _attempt(
        self, session: Session, request: Mapping[str, Any]
    ) -> tuple[httpx.Response | EngineError, int | None]:
        """An answer with 2xx, or the error it is, and its status: -1 where another try is no use.

        Errors are returned and raised elsewhere, so that no exception of httpx, which holds the request and its key,
        is the context of ours.
        """
        import httpx

        where = self._service.where(request["method"], request["route"])
        pair = self._service.credentials
        auth = httpx.USE_CLIENT_DEFAULT if pair is None else pair
        arguments = {name: value for name, value in request.items() if name != "route"}
        try:
            response = await session.send(session.http.build_request(**arguments), auth)
        except HungUpError:
            return ServerError(f"{where} was given up", why="the client was closed meanwhile"), -1
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = unreached(
                error,
                where=where,
                address=self.address,
                redact=self.redact,
                connect_timeout=self.connect_timeout,
                start_hint=self._start_hint(),
            )
            # Who was silent once is silent again, and may still be at work on what was asked.
            return failure, -1 if isinstance(failure, ServerTimeoutError) else None
        if response.is_success:
            return response, response.status_code
        body = b""
        try:
            async with asyncio.timeout(10):
                async for piece in response.aiter_bytes():
                    body += piece
                    if len(body) > _ERROR_BODY_BYTES:
                        break
        except (httpx.HTTPError, TimeoutError):
            pass  # the status says enough
        finally:
            await session.leave(response)
        status = response.status_code
        failure = refusal(
            status, response.headers, body, where=where, redact=self.redact, key_hint=self._key_hint(status)
        )
        # A quota that is used up does not come back in a minute.
        return failure, -1 if getattr(failure, "code", "") == "insufficient_quota" else status

    async def _pieces(self, response: httpx.Response) -> AsyncGenerator[bytes]:
        """The body as it comes, with what breaks it off in our words."""
        import httpx

        failure = None
        try:
            async for piece in response.aiter_bytes():
                yield piece
        except (httpx.HTTPError, httpx.StreamError) as error:
            failure = broken_off(error, address=self.address, redact=self.redact)
        if failure is not None:
            raise failure

    async def _drain(self, pieces: AsyncGenerator[bytes]) -> None:
        """Read what follows the last event, if it is there already, so that the connection can be used again."""
        try:
            async with asyncio.timeout(0.05):
                async for _ in pieces:
                    pass
        except (TimeoutError, EngineError):
            pass

    def _described(
        self, method: str, route: str, headers: Mapping[str, str] | None, timeout: float | None, given: dict[str, Any]
    ) -> dict[str, Any]:
        """A request as httpx takes it, and its route; checked once, before any attempt."""
        import httpx

        arguments = dict(given)
        sent = {**self._headers, **{name: sendable(name, value) for name, value in (headers or {}).items()}}
        if (record := arguments.pop("json", None)) is not None:
            try:
                text = json.dumps(record, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"{method} {route} cannot be sent as JSON", why=str(error)) from None
            arguments["content"] = text.encode("ascii")
            sent = {"Content-Type": "application/json", **sent}
        params = arguments.pop("params", None)
        self._secrets |= secrets_among(headers or {}) | secrets_among(dict(params) if params else {}, are_all=False)
        address = self._service.of(route, params)
        limits = httpx.Timeout(None, connect=self.connect_timeout, read=timeout or self.timeout)
        known = {"method": method, "route": route, "url": address, "headers": sent, "timeout": limits}
        return {**arguments, **known}

    @property
    def _service(self) -> ServiceAddress:
        return ServiceAddress(self.SERVICE_BASE)

    def session(self) -> Session:
        """The requests of the running event loop; connections cannot change theirs.

        Raises:
            ConfigError: the client that was passed in is closed, or the network's settings are wrong.
        """
        import httpx

        known = self._session
        if known is not None and known.loop is asyncio.get_running_loop() and not known.is_closed:
            return known
        if self.http is not None:
            if self.http.is_closed:
                raise ConfigError("the httpx client that was passed in is closed", fix="pass an open one, or none")
            self._session = Session(self.http, is_ours=False)
            return self._session
        failure: ConfigError
        try:
            # No proxy is between this machine and itself; and reading all certificates takes a while.
            verify = not self.is_local or self.SERVICE_BASE.lower().startswith("https")
            self._session = Session(httpx.AsyncClient(trust_env=not self.is_local, verify=verify), is_ours=True)
        except (OSError, ValueError) as error:  # of certificates, and of proxies' addresses
            failure = ConfigError("the network's settings cannot be used", why=one_line(str(error), self.redact))
        else:
            return self._session
        raise failure

    async def has_gone(self) -> bool:
        """Whether nothing listens at the address any more: one connection, tried for a second; False where unknown."""
        if self.http is not None or (not self.is_local and urllib.request.getproxies()):
            return False  # its way there may be another
        host, port = origin_of(self.SERVICE_BASE)[1:]
        try:
            async with asyncio.timeout(1.0):
                _, writer = await asyncio.open_connection(host, port)
        except OSError as error:  # a timeout too, which says nothing of who is only busy
            return not isinstance(error, TimeoutError)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return False

    async def close(self) -> None:
        """Hang up: requests under way fail, and a later one connects again. A client that was passed in stays open."""
        session, self._session = self._session, None
        if session is None or session.loop.is_closed():
            return
        if session.loop is asyncio.get_running_loop():
            await session.close()
        elif session.loop.is_running():  # in another thread
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(session.close(), session.loop))

    # -- words -----------------------------------------------------------------------------------------------------

    @property
    def is_local(self) -> bool:
        """Whether the service runs on this machine, by its address."""
        return self._service.is_local

    @property
    def address(self) -> str:
        """Where the service is, without what is secret in its address."""
        return self._service.shown

    @property
    def redact(self) -> Redactor:
        """Takes everything secret that is sent to the service out of a text."""
        passed = {} if self.http is None else self.http.headers
        found = secrets_among({**passed, **self._headers})
        return Redactor({*self._service.secrets, *self._secrets, *found})

    def decode(self, text: str, where: str) -> Any:
        """What `text` is as JSON.

        Raises:
            ServerError: it is none.
        """
        return decoded(text, where=where, redact=self.redact)

    def error_in(self, record: Any) -> str:
        """The words of an error that came as JSON, short and without secrets."""
        return one_line(words_of(record)[0], self.redact)

    def _key_hint(self, status: int) -> str:
        """What to do after a 401 or 403."""
        return "check the key, and that it is meant for this service"

    def _start_hint(self) -> str:
        """What to do where nothing answers."""
        return "check the address, and that the server runs" if self.is_local else "check the address and the network"

    @property
    def start_hint(self) -> str:
        """What to do where nothing answers."""
        return self._start_hint()

    def __repr__(self) -> str:
        """The address; no key, no header."""
        return f"{type(self).__name__}({self.address!r})"
