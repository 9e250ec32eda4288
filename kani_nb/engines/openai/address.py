"""Which server, which model, and which key: what `%load_engine openai:...`, `vllm:...` and `http://...` mean.

A key is sent to nobody it was not meant for:

- a key that is passed as `api_key` goes to the address it was passed with;
- `OPENAI_API_KEY` goes to api.openai.com, and to the server of `OPENAI_BASE_URL` where that is set, and nowhere else;
- `KANI_NB_API_KEY` is for servers of one's own: it goes to any other server that is named, or, where
  `KANI_NB_API_BASE` is set, to that server alone.

Nothing here makes a request.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from dataclasses import dataclass, field

from kani_nb.engines.httpclient.address import ServiceAddress, origin_of
from kani_nb.errors import ConfigError

OPENAI_BASE = "https://api.openai.com/v1"
#: Where `vllm serve` listens unless told otherwise.
VLLM_BASE = "http://127.0.0.1:8000/v1"
#: What OpenAIEngine asks OpenAI for when no model is named.
DEFAULT_MODEL = "gpt-4o-mini"

_FORMS = "openai:MODEL, openai:MODEL@http://host:8000/v1, vllm:http://host:8000/v1 or http://host:8000/v1#MODEL"
#: An address without its scheme, or something else with a colon or a slash in it.
_BARE_ADDRESS = re.compile(
    r"(?P<host>(?P<known>localhost|\d{1,3}(?:\.\d{1,3}){3}|\[[0-9a-f:]+\])|[a-z0-9][\w-]*(?:\.[a-z0-9][\w-]*)*)"
    r"(?P<port>:\d{2,5})?(?P<path>(?:/[^?#\s]*)?)(?P<rest>(?:[?#]\S*)?)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A server's API, and the model that was named; None takes the only one it has. Prints nothing secret."""

    api_base: str = field(repr=False)
    model: str | None = None
    is_vllm: bool = False


def read_address(text: str) -> ServerAddress:
    """What a model's name says about the server.

    `openai:NAME` (OpenAI, or the server of `OPENAI_BASE_URL`), `openai:NAME@http://host/v1`, `vllm:NAME` (this
    machine), `vllm:http://host:8000/v1`, `http://host:8000` (to which `/v1` is added), and any address with `#NAME`,
    `?model=NAME` or `/models/NAME` at its end.

    Raises:
        ConfigError: none of these, or an address without a host.
    """
    given = text.strip()
    prefix, colon, rest = given.partition(":")
    kind = prefix.lower() if colon and prefix.lower() in ("openai", "vllm") else ""
    named = rest.strip() if kind else given
    model: str | None = None
    if (found := re.match(r"(?i)(?P<name>.+?)@(?=https?://)", named)) is not None and not _is_url(named):
        model, named = found["name"], named[found.end() :]
    if _is_url(named):
        base, of_address = split_address(named)
        return ServerAddress(base, model or of_address, kind == "vllm")
    if not kind or "://" in named:
        raise ConfigError(f"{ServiceAddress(named).shown!r} names no server", fix=_FORMS)
    name, at, host = named.rpartition("@")
    if (meant := with_scheme(host)) is not None:
        named_first = "" if ":" in name else name + at  # which could be a person's name, and a password
        raise ConfigError(
            f"{host!r} looks like a server's address",
            why="http:// is missing before it",
            fix=f"did you mean {kind}:{named_first}{meant}?",
        )
    base = VLLM_BASE if kind == "vllm" else default_base()
    return ServerAddress(base, named or None, kind == "vllm")


def split_address(url: str) -> tuple[str, str | None]:
    """The address of the API, and the model that stands in it.

    Raises:
        ConfigError: it is no address.
    """
    ServiceAddress(url)
    parts = urllib.parse.urlsplit(url)
    query = urllib.parse.parse_qsl(parts.query, keep_blank_values=True)
    model = urllib.parse.unquote(parts.fragment) or dict(query).get("model")
    kept = "&".join(each for each in parts.query.split("&") if each.partition("=")[0] != "model")
    path, is_model, name = parts.path.partition("/models/")
    if is_model:
        model = model or urllib.parse.unquote(name.strip("/"))
    path = path.rstrip("/")
    for ending in ("/chat/completions", "/completions", "/models"):
        path = path.removesuffix(ending)
    base = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path or "/v1", kept, ""))
    return base, model or None


def with_scheme(text: str) -> str | None:
    """The address that `text` is without its `http://`, as `localhost:8000` and `10.0.0.7:8000/v1`; None for others.

    A host that is no number and not this machine needs a port of four digits or a usual one: `org/model` and
    `mistral:7` are none.
    """
    found = _BARE_ADDRESS.fullmatch(text.strip())
    if found is None or not (found["known"] or len(port := found["port"] or "") > 4 or port in (":80", ":443")):
        return None
    path = found["path"] if found["path"].strip("/") else "/v1"
    return f"http://{found['host']}{found['port'] or ''}{path}{found['rest']}"


def is_address(text: str) -> bool:
    """Whether `text` is a server's address, with its scheme or without."""
    return _is_url(text.strip()) or with_scheme(text) is not None


def holds_credentials(text: str) -> bool:
    """Whether an address in `text` has a password before its host, or a token in its query."""
    _, is_url, rest = text.partition("://")
    if not is_url:
        return False
    host, _, query = rest.partition("?")
    names = [name for name, _ in urllib.parse.parse_qsl(query.partition("#")[0], keep_blank_values=True)]
    return "@" in re.split(r"[/#]", host)[0] or any(
        re.search(r"(?i)key|token|secret|passw|auth|sig", each) for each in names
    )


def default_base() -> str:
    """Where OpenAI's API is: `OPENAI_BASE_URL`, or OpenAI's own."""
    return os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI_BASE


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key and where it was found; prints only the latter."""

    value: str = field(repr=False)
    source: str

    def __str__(self) -> str:
        """Where it was found."""
        return f"from {self.source}"


def find_key(api_base: str, given: str | None = None) -> ApiKey | None:
    """The key that is meant for this server, by the rules above; None without any."""
    if given and given.strip():
        return ApiKey(given.strip(), "the api_key argument")
    if is_openai(api_base) or _is_set_to("OPENAI_BASE_URL", api_base):
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            return ApiKey(key, "OPENAI_API_KEY")
        if is_openai(api_base):
            return None
    own_base = os.environ.get("KANI_NB_API_BASE", "").strip()
    if own_base and not _is_set_to("KANI_NB_API_BASE", api_base):
        return None
    key = os.environ.get("KANI_NB_API_KEY", "").strip()
    return ApiKey(key, "KANI_NB_API_KEY") if key else None


def is_openai(api_base: str) -> bool:
    """Whether this is OpenAI's own server, spoken to in private."""
    return origin_of(api_base) == origin_of(OPENAI_BASE)


def _is_set_to(variable: str, api_base: str) -> bool:
    value = os.environ.get(variable, "").strip()
    return _is_url(value) and origin_of(value) == origin_of(api_base)


def _is_url(text: str) -> bool:
    return re.match(r"(?i)https?://", text) is not None
