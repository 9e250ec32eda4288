"""The address of a service: what of it is sent, what may be shown, and where a route lies.

Addresses may hold secrets, as credentials before the host or as tokens in the query. They go to the service with each
request, and are shown nowhere.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass, field
from typing import Any

from kani_nb.errors import ConfigError


def public_url(url: str) -> str:
    """`url` without the credentials and the query that it may hold."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def origin_of(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of an address: who is spoken to."""
    parts = urllib.parse.urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, (parts.hostname or "").lower(), port


@dataclass(frozen=True, slots=True)
class ServiceAddress:
    """Where a service is; prints only what may be shown.

    Raises:
        ConfigError: it is no address of the web.
    """

    url: str = field(repr=False)

    def __post_init__(self) -> None:
        """Check it once, here."""
        try:
            scheme, host, _ = origin_of(self.url)
        except ValueError:  # a port or a host that is none
            scheme = host = ""
        if scheme not in ("http", "https") or not host:
            shown = self.url.rpartition("@")[2].partition("?")[0]
            raise ConfigError(
                f"{shown!r} is no address of a server",
                why="it must begin with http:// or https:// and name a host",
                fix="for example http://127.0.0.1:8000/v1",
            )

    @property
    def shown(self) -> str:
        """The address without what is secret in it."""
        return public_url(self.url)

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, by its name."""
        host = origin_of(self.url)[1]
        return host in ("localhost", "::1") or host.startswith("127.")

    @property
    def port(self) -> int | None:
        """The port, given or usual."""
        return origin_of(self.url)[2]

    def above(self, ending: str = "/v1") -> str:
        """The whole address without `ending` at the end of its path, for what a server has beside that."""
        parts = urllib.parse.urlsplit(self.url)
        return urllib.parse.urlunsplit(parts._replace(path=parts.path.rstrip("/").removesuffix(ending)))

    @property
    def credentials(self) -> tuple[str, str] | None:
        """The name and the password before the host, if any."""
        parts = urllib.parse.urlsplit(self.url)
        if parts.username is None and parts.password is None:
            return None
        return urllib.parse.unquote(parts.username or ""), urllib.parse.unquote(parts.password or "")

    @property
    def secrets(self) -> set[str]:
        """Everything in it that must not be shown."""
        parts = urllib.parse.urlsplit(self.url)
        # Short ones stand in any text; and who is told in which version of an API learns nothing.
        found = {value for _, value in urllib.parse.parse_qsl(parts.query) if len(value) > 3} | {parts.query}
        if (pair := self.credentials) is not None:
            name, password = pair
            found |= {password, ":".join(pair), parts.netloc.rpartition("@")[0], name if len(name) > 3 else ""}
        return found - {""}

    def of(self, route: str, params: Any = None) -> str:
        """The address of a route, with the query of both and `params`, without credentials."""
        import httpx

        parts = urllib.parse.urlsplit(self.url)
        path, _, query = route.partition("?")
        url = httpx.URL(
            urllib.parse.urlunsplit(
                (
                    parts.scheme,
                    parts.netloc.rpartition("@")[2],
                    f"{parts.path.rstrip('/')}/{path.lstrip('/')}" if path else parts.path,
                    "&".join(filter(None, (parts.query, query))),
                    "",
                )
            )
        )
        return str(url.copy_merge_params(params) if params else url)

    def where(self, method: str, route: str) -> str:
        """A request, for people to read."""
        return f"{method} {self.shown.rstrip('/')}/{route.partition('?')[0].lstrip('/')}"
