"""What servers refuse, and connections that break, in our words; and the secrets kept out of those words.

A server's own text is quoted, short and on one line, after everything secret that was sent to it has been taken out
again: servers and proxies do repeat keys. Nothing here makes a request.
"""

from __future__ import annotations

import base64
import html
import json
import random
import re
import time
import urllib.parse
from collections.abc import Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from kani_nb._secrets import without_secrets
from kani_nb.engines.httpclient.address import public_url
from kani_nb.errors import ConfigError, EngineError, GatedModelError, ModelUnavailableError

#: Most characters of a server's own words.
_QUOTED = 300
#: Errors within errors that are looked into.
_DEEPEST = 6
#: The `code` of an answer that broke off after it had begun.
BROKEN_OFF = "broken_off"
#: How often a failure is worth another try; it is often the same again after a plain 500, or where nothing listens.
MOST_RETRIES = {408: 99, 429: 99, 500: 1, 502: 99, 503: 99, 504: 99, 529: 99, None: 2}
_WITHHELD = "(its words are not shown: they repeat a secret)"
#: Keys in headers and addresses, masked ones too: `Bearer abc`, `sk-ab***yz`, `api_key=abc`.
_SHOWN_KEY = re.compile(
    r"(?i)(?P<before>\bbearer\s+|\b(?:api[-_]?key|access[-_]?token|password|secret)['\"]?\s*[=:]\s*['\"]?)"
    r"(?=[^\s'\"&,;<>]*\d)[^\s'\"&,;<>]{4,}|\bsk-[\w*.…-]{6,}"
)
#: What OpenSSL says when the other side answers in plain text.
_NO_TLS = re.compile(r"WRONG_VERSION_NUMBER|RECORD_LAYER_FAILURE|PACKET_LENGTH_TOO_LONG|HTTP_REQUEST", re.IGNORECASE)
_SECRET_NAME = re.compile(r"(?i)auth|key|token|secret|passw|cookie|sig|code")
_HARMLESS = {"accept", "accept-encoding", "connection", "content-type", "user-agent"}


class ServerError(EngineError):
    """A server answered with what cannot be used, or not at all.

    Attributes:
        status: the HTTP status; None where there was none.
        code: the server's own word for the error, as `context_length_exceeded`; empty where it gave none.
        said: the server's own words, short and without secrets.
        retry_after_s: how long the server asked to wait, in seconds; None where it did not say.
    """

    status: int | None = None
    code: str = ""
    said: str = ""
    retry_after_s: float | None = None


class RateLimitError(ServerError):
    """Too many requests (429)."""


class ServerTimeoutError(ServerError):
    """The server was silent for too long."""


class ServerDownError(ModelUnavailableError):
    """Nothing answers at the address."""


class AccessRefusedError(GatedModelError):
    """The server refused the key, or wants one (401, 403).

    Attributes:
        status: the HTTP status.
        said: the server's own words, short and without secrets.
    """

    status: int | None = None
    said: str = ""


class Redactor:
    """Takes secrets out of texts, in every spelling in which a server may repeat them. Prints none of them."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        spelled = {form for secret in secrets if secret for form in _spellings(secret)}
        # The longest first: one may hold another.
        self._secrets = sorted(spelled, key=len, reverse=True)

    def __call__(self, text: str) -> str:
        """`text` without any secret."""
        for secret in self._secrets:
            if secret in text:
                if len(secret) < 4:  # replaced, so short a one would be seen by what is missing
                    return _WITHHELD
                text = text.replace(secret, "[secret]")
        text = _SHOWN_KEY.sub(lambda found: (found["before"] or "") + "[secret]", text)
        return without_secrets(text)

    def __repr__(self) -> str:
        """How many, and not which."""
        return f"Redactor({len(self._secrets)} secrets)"


def secrets_among(named: Mapping[str, Any], *, are_all: bool = True) -> set[str]:
    """The values of headers or parameters that may be secret: all that are long enough, or those with such a name."""
    found: set[str] = set()
    for name, value in named.items():
        text = str(value)
        if _SECRET_NAME.search(name) or (are_all and len(text) >= 8 and name.lower() not in _HARMLESS):
            found |= {text, text.partition(" ")[2]}  # with and without `Bearer `
    return found - {""}


def _spellings(secret: str) -> set[str]:
    """How a secret may come back: as it is, in an address, in JSON, in HTML, in base64."""
    coded = base64.b64encode(secret.encode("utf-8", "replace")).decode()
    quoted = {urllib.parse.quote(secret, safe=""), urllib.parse.quote_plus(secret), html.escape(secret)}
    return {secret, json.dumps(secret)[1:-1], coded, coded.rstrip("="), *quoted}


def said_by(body: bytes, redact: Redactor) -> tuple[str, str]:
    """`(words, code)` of an error's body: JSON in any of the usual forms, a page, or text."""
    text = body.decode("utf-8", "replace").strip()
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return one_line(_page_words(text) if text.startswith("<") else text, redact), ""
    words, code = words_of(record)
    return one_line(words, redact), redact(code)


def words_of(record: Any, depth: int = 0) -> tuple[str, str]:
    """`(words, code)` of an error as JSON: OpenAI's, FastAPI's, or plain text. May hold secrets still."""
    if isinstance(record, Mapping) and depth < _DEEPEST:
        for name in ("error", "detail", "message", "msg"):
            if (inner := record.get(name)) not in (None, "", [], {}):
                words, code = words_of(inner, depth + 1)
                own = record.get("code") or record.get("type")
                return words, code or (str(own) if isinstance(own, str | int) else "")
    if isinstance(record, list) and record and depth < _DEEPEST:
        return words_of(record[0], depth + 1)
    if isinstance(record, str):
        return record, ""
    try:
        return json.dumps(record), ""
    except (ValueError, RecursionError):
        return "", ""


def one_line(text: str, redact: Redactor) -> str:
    """A server's words in at most one short line, without secrets and control characters."""
    words = redact(text)  # before anything is cut, so that no half of a secret is left
    words = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", words)
    words = " ".join("".join(each if each.isprintable() else " " for each in words).split())
    return words if len(words) <= _QUOTED else f"{words[:_QUOTED].rstrip()} …"


def _page_words(page: str) -> str:
    title = re.search(r"(?is)<title[^>]*>(.*?)</title>", page)
    return f"an HTML page, {html.unescape(title[1]).strip()!r}" if title else "an HTML page"


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, given as seconds or as a date (RFC 9110, 10.2.3); None without a request."""
    with_ms = headers.get("retry-after-ms")
    said = headers.get("retry-after")
    try:
        if with_ms is not None:
            return max(0.0, float(with_ms) / 1000)
        if said is None:
            return None
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", said):
            return float(said)
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return None


def refusal(
    status: int, headers: Mapping[str, str], body: bytes, *, where: str, redact: Redactor, key_hint: str = ""
) -> EngineError:
    """What an HTTP status other than 2xx says, as one of our errors. `where` is the request, without secrets."""
    words, code = said_by(body, redact)
    if status in (401, 403):
        denied = AccessRefusedError(f"{where} was refused ({status})", why=words, fix=key_hint or "check the key")
        denied.status, denied.said = status, words
        return denied
    error: ServerError
    if status == 429:
        error = RateLimitError(f"{where} was refused for now (429)", why=words or "too many requests")
    else:
        error = ServerError(f"{where} was answered with {status}", why=words, fix=_status_fix(status, headers))
    error.retry_after_s = wait = retry_after(headers) if status in (429, 503) else None
    if status == 429 or wait:
        error.fix = f"wait {wait:.0f} s and run it again" if wait else "wait a little and run it again"
    error.status, error.code, error.said = status, code, words
    return error


def _status_fix(status: int, headers: Mapping[str, str]) -> str:
    if 300 <= status < 400:
        try:
            target = one_line(public_url(headers.get("location", "")), Redactor())
        except ValueError:
            target = ""
        return f"it was sent on to {target}: give that address" if target else "give the address it was sent on to"
    if status == 404:
        return "check the address: that of an OpenAI-compatible server usually ends in /v1"
    return "look at the server's own log, and run it again later" if status >= 500 else ""


def unreached(
    error: Exception, *, where: str, address: str, redact: Redactor, connect_timeout: float, start_hint: str
) -> EngineError:
    """What one of httpx's errors says, raised before an answer began, as one of ours."""
    import httpx

    reason = one_line(str(error), redact) or type(error).__name__
    if isinstance(error, httpx.ConnectError) and address.startswith("https://") and _NO_TLS.search(reason):
        plain = f"http://{address.removeprefix('https://')}"
        return ServerDownError(
            f"nothing speaks https at {address}",
            why=f"what answers there is not encrypted ({reason})",
            fix=f"did you mean {plain}?",
        )
    if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
        reason = f"no connection within {connect_timeout:g} s"
    elif isinstance(error, httpx.TimeoutException):
        return ServerTimeoutError(
            f"{where} was not answered", why="the server was silent for too long", fix="ask again with a longer timeout"
        )
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.ProxyError):
        return ServerDownError(f"nothing answers at {address}", why=reason, fix=start_hint)
    return ServerError(f"{where} got no answer", why=reason, fix="look at the server's own log, and ask again")


def broken_off(error: Exception, *, address: str, redact: Redactor) -> EngineError:
    """What one of httpx's errors says, raised in the midst of an answer, as one of ours."""
    import httpx

    if isinstance(error, httpx.TimeoutException):
        return ServerTimeoutError(
            f"{address} fell silent in the middle of its answer", fix="ask again, or with a longer timeout"
        )
    reason = one_line(str(error), redact) or type(error).__name__
    failure = ServerError(f"{address} broke off in the middle of its answer", why=reason, fix="ask again")
    failure.code = BROKEN_OFF
    return failure


def sendable(name: str, value: str) -> str:
    """A header's value, which httpx would repeat in its own error where it cannot be sent.

    Raises:
        ConfigError: it cannot be sent; the text does not repeat it.
    """
    text = str(value).strip()
    if not text.isascii() or not text.isprintable():
        raise ConfigError(
            f"the value of the header {name} cannot be sent",
            why="it holds other characters than ASCII's printable ones",
            fix="if it is a key: copy it again, without quotes and line ends",
        )
    return text


def decoded(text: str, *, where: str, redact: Redactor) -> Any:
    """What `text` is as JSON.

    Raises:
        ServerError: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # also whole numbers that are too long
        pass
    start = text.lstrip()
    kind = "an HTML page" if start.startswith("<") else "text that is not whole JSON" if start else "nothing"
    shown = _page_words(start[:2000]) if start.startswith("<") else start[:2000]
    raise ServerError(
        f"{where} was answered with {kind}",
        why=one_line(shown, redact)[:120],
        fix="check the address: a proxy, a login page or another service may answer there",
    )


def pause_before_retry(failure: EngineError, tried: int, *, first_s: float, longest_s: float) -> float | None:
    """Seconds before the next try, which the server may have asked for; None where that is more than `longest_s`."""
    asked = failure.retry_after_s if isinstance(failure, ServerError) else None
    if asked is not None and asked > longest_s:
        return None
    pause: float = min(first_s * 2**tried, 8.0)
    # Between half and the whole, so that many clients do not come back at once.
    return max(asked or 0.0, pause * random.uniform(0.5, 1.0))  # noqa: S311 - no secret hangs on it


def text_of(body: bytes, encoding: str | None) -> str:
    """A body's text, whatever encoding the server claims."""
    try:
        return body.decode(encoding or "utf-8", "replace")
    except LookupError:
        return body.decode("utf-8", "replace")
