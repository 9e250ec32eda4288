"""The requests under way on one event loop, so that hanging up ends all of them and leaves nothing open.

httpx leaves a connection behind that was being made when its client was closed, and does not interrupt who waits for an
answer. Here each of them is ended first.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx


class HungUpError(Exception):
    """The session was closed while the request was under way. Never leaves this package."""


class Session:
    """One httpx client on one event loop.

    Args:
        http: sends the requests.
        is_ours: whether to close it in the end.
    """

    def __init__(self, http: httpx.AsyncClient, *, is_ours: bool) -> None:
        self.http = http
        self.loop = asyncio.get_running_loop()
        self.is_closed = False
        self._is_ours = is_ours
        self._sending: set[asyncio.Task[httpx.Response]] = set()
        self._open: set[httpx.Response] = set()

    async def send(self, request: httpx.Request, auth: Any) -> httpx.Response:
        """The response, its body unread; give it back with `leave`.

        Raises:
            HungUpError: `close` was called meanwhile.
            httpx.HTTPError: what httpx raises.
        """
        task = asyncio.ensure_future(self.http.send(request, stream=True, auth=auth))
        self._sending.add(task)
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await (await task).aclose()  # it may just have come
            raise
        finally:
            self._sending.discard(task)
        if task.cancelled():
            raise HungUpError
        response = task.result()
        if self.is_closed:
            await response.aclose()
            raise HungUpError
        self._open.add(response)
        return response

    async def leave(self, response: httpx.Response) -> None:
        """Done with a response, read or not."""
        self._open.discard(response)
        await response.aclose()

    async def close(self) -> None:
        """End every request, then close the connections."""
        if self.is_closed:
            return
        self.is_closed = True
        sending = set(self._sending)
        for task in sending:
            task.cancel()
        if sending:
            await asyncio.wait(sending)
        for response in tuple(self._open):
            await self.leave(response)
        if self._is_ours:
            await self.http.aclose()
