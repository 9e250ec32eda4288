"""Requests to the Hugging Face Hub, or to the mirror that `HF_ENDPOINT` names, and its refusals in our words.

Proxies come from the environment (and the system's settings), certificates from `SSL_CERT_FILE`,
`REQUESTS_CA_BUNDLE` or `CURL_CA_BUNDLE` beside the system's own. The standard library does it all: a stopped
download must be able to go on where it was, which the Hub's own library does not do. A token is sent to the Hub
alone, and stands in no message or repr.
"""

from __future__ import annotations

import base64
import contextlib
import os
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import kani_nb
from kani_nb.engines.sources_aliases import ungated_like
from kani_nb.engines.sources_cache import Fetch, hub_home
from kani_nb.errors import ConfigError, EngineError, GatedModelError, ModelUnavailableError, UnknownModelError

DEFAULT_ENDPOINT = "https://huggingface.co"
#: Seconds without a byte before a connection counts as broken.
READ_TIMEOUT_S = 20.0
#: What a broken connection or a refusal raises below us.
TRANSPORT_ERRORS = (OSError, HTTPException)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HubToken:
    """A secret and where it was found; prints only the latter."""

    value: str = field(repr=False)
    source: str

    def __str__(self) -> str:
        return f"a token from {self.source}"


def endpoint() -> str:
    """The Hub's address, without a trailing slash; may hold credentials: show `public_url` of it.

    Raises:
        ConfigError: `HF_ENDPOINT` is not an http address.
    """
    chosen = (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
    if urllib.parse.urlsplit(chosen).scheme not in ("http", "https"):
        raise ConfigError(f"HF_ENDPOINT is {public_url(chosen)!r}", why="it must begin with http:// or https://")
    return chosen


def public_url(url: str) -> str:
    """`url` without the credentials it may hold."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit((parts.scheme, host, parts.path, "", ""))


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` (or `TRANSFORMERS_OFFLINE`) forbids asking the Hub."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def find_token(given: str | None = None) -> HubToken | None:
    """The Hub's token: `given`, the environment's, the saved login's, or Colab's Secrets'; None without any."""
    if given:
        return HubToken(given.strip(), "the token argument")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if value := os.environ.get(name, "").strip():
            return HubToken(value, name)
    if os.environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").upper() not in ("1", "ON", "YES", "TRUE"):
        path = Path(os.environ.get("HF_TOKEN_PATH") or hub_home() / "token").expanduser()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if value := path.read_text(encoding="utf-8").strip():
                return HubToken(value, f"the saved login {path}")
    return _colab_token()


def _colab_token() -> HubToken | None:
    try:
        from google.colab import userdata
    except ImportError:
        return None
    names = ("SecretNotFoundError", "NotebookAccessError", "TimeoutException")
    refusals = tuple(getattr(userdata, name) for name in names if hasattr(userdata, name))
    try:
        value = userdata.get("HF_TOKEN")
    except refusals:
        return None
    return HubToken(str(value).strip(), "Colab's Secrets") if value else None


def ca_bundle() -> str | None:
    """The certificate file that the environment names, or None."""
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if value := os.environ.get(name):
            return value
    return None


def _certificates() -> ssl.SSLContext:
    context = ssl.create_default_context()  # the system's, SSL_CERT_FILE and SSL_CERT_DIR
    bundle = ca_bundle()
    if bundle is not None:
        try:
            if Path(bundle).is_dir():
                context.load_verify_locations(capath=bundle)
            else:
                context.load_verify_locations(cafile=bundle)
        except OSError as error:  # an SSLError is one too
            raise ConfigError(
                f"the certificate file {bundle} cannot be used",
                why=str(error),
                fix="SSL_CERT_FILE and REQUESTS_CA_BUNDLE must name a PEM file",
            ) from error
        return context
    with contextlib.suppress(ImportError):  # Pythons that come without any certificates
        import certifi

        context.load_verify_locations(cafile=certifi.where())
    return context


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; the token goes along only within the same host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        secret = req.unredirected_hdrs.get("Authorization")
        if new is not None and secret and _origin(new.full_url) == _origin(req.full_url):
            new.add_unredirected_header("Authorization", secret)
        return new


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Hands a redirect back: its headers say what a large file is."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc.rpartition("@")[2]


def open_url(
    url: str,
    token: HubToken | None = None,
    *,
    method: str = "GET",
    offset: int = 0,
    timeout_s: float = READ_TIMEOUT_S,
    follow: bool = True,
) -> HTTPResponse:
    """An open response to one request, whole bodies or from byte `offset` on. Blocks; raises what urllib raises."""
    parts = urllib.parse.urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(  # noqa: S310 - `endpoint` lets only http and https through
        urllib.parse.urlunsplit(parts._replace(netloc=host)), method=method
    )
    request.add_header("User-Agent", f"kani_nb/{kani_nb.__version__}")
    request.add_header("Accept-Encoding", "identity")
    if offset:
        request.add_header("Range", f"bytes={offset}-")
    if token is not None:
        request.add_unredirected_header("Authorization", f"Bearer {token.value}")
    elif credentials:
        basic = base64.b64encode(urllib.parse.unquote(credentials).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {basic}")
    opener = urllib.request.build_opener(
        _Redirects() if follow else _NoRedirects(), urllib.request.HTTPSHandler(context=_certificates())
    )
    response: HTTPResponse = opener.open(request, timeout=timeout_s)
    return response


def head(url: str, token: HubToken | None) -> Message:
    """The headers of a file's address, without following it to where the bytes lie."""
    try:
        with open_url(url, token, method="HEAD", follow=False) as response:
            return response.headers
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (301, 302, 303, 307, 308):
                return error.headers
        raise


class _Outcome(Generic[T]):
    value: T
    error: BaseException | None = None


def abandonable(call: Callable[[], T], fetch: Fetch, timeout_s: float | None = None) -> T:
    """`call()` in a thread of its own, left behind when `fetch` is cancelled or the time is over.

    Looking up a name cannot be given a time limit, and a stalled connection cannot be stopped from outside.

    Raises:
        TimeoutError: `timeout_s` passed.
        ModelUnavailableError: cancelled.
    """
    outcome: _Outcome[T] = _Outcome()
    done = threading.Event()

    def run() -> None:
        try:
            outcome.value = call()
        except BaseException as error:  # noqa: BLE001 - raised again by the waiting thread
            outcome.error = error
        finally:
            done.set()

    threading.Thread(target=run, name="kani-nb-hub", daemon=True).start()
    waited = 0.0
    try:
        while not done.wait(0.05):
            fetch.check()
            waited += 0.05
            if timeout_s is not None and waited >= timeout_s:
                raise TimeoutError(f"no answer within {timeout_s:g} s")
    except KeyboardInterrupt:  # in a command line: the thread must not go on by itself
        fetch.cancelled.set()
        raise
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def refusal(error: BaseException, repo: str, revision: str | None, token: HubToken | None) -> EngineError:
    """What went wrong between us and the Hub, as one of our errors. Never holds the token."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return _http_refusal(error.code, error.headers, repo, revision, token)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    fix = "check the network and the proxy (`%kani doctor` shows what was found)"
    if isinstance(reason, ssl.SSLError):
        fix = (
            "if your network has its own certificates, point SSL_CERT_FILE at them; `%kani doctor` shows what was found"
        )
    return ModelUnavailableError(
        f"{repo} is not in the local caches, and {public_url(endpoint())} could not be reached",
        why=str(reason) or type(reason).__name__,
        fix=fix,
    )


def _http_refusal(code: int, headers: Message, repo: str, revision: str | None, token: HubToken | None) -> EngineError:
    said = headers.get("X-Error-Code", "")
    page = f"{public_url(endpoint())}/{repo}"
    if said == "RevisionNotFound":
        return UnknownModelError(
            f"{repo} has no revision {revision!r}", fix=f"{page}/tree/main lists its branches and tags"
        )
    if said == "RepoNotFound" or code == 404:
        return UnknownModelError(
            f"there is no repository {repo!r} on {public_url(endpoint())}", why="or it is private and needs a token"
        )
    if code in (401, 403) or said == "GatedRepo":
        other = ungated_like(repo)
        held = f"{token} was refused" if token else "no token was found"
        return GatedModelError(
            f"{repo} is gated or private ({code})",
            why=f"its owner must grant access first, and {held}",
            fix=f"accept its licence on {page} and set HF_TOKEN (in Colab: Secrets), or take {other.name}, "
            f"which needs neither ({other.repo}, {other.parameters / 1e9:.1f}B, {other.licence})",
        )
    if code == 429:
        after = headers.get("Retry-After")
        return ModelUnavailableError(
            f"{public_url(endpoint())} refused {repo} for now (429)",
            why="too many requests came from this address",
            fix=f"wait {after} s and run it again" if after else "wait a little and run it again",
        )
    return ModelUnavailableError(
        f"{public_url(endpoint())} answered {code} for {repo}",
        why="the server failed" if code >= 500 else "the request was refused",
        fix="run it again later; what was fetched so far is kept",
    )
