"""What is attached to a prompt: from a file's or an address's bytes to a message part of the right kind.

What something is says its content first: the bytes it begins with, then a server's header, then the name's ending. Text
is taken where it is UTF-8 and called text. Nothing is decoded here, so that no image library is needed: whether a
picture can be read is found out by the engine that looks at it. No credentials are ever sent.
"""

from __future__ import annotations

import asyncio
import mimetypes
import stat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from kani_nb.engines.media_types import is_html, mime_of, spelled_type
from kani_nb.errors import PromptError
from kani_nb.messages import AudioPart, ImagePart, MediaPart, MessagePart, TextPart, VideoPart

if TYPE_CHECKING:
    import httpx

#: Bytes from which something is refused: no model takes more at once.
MAX_BYTES = 50 * 1024**2
#: Bytes of text from which it is refused: a million tokens or so.
MAX_TEXT_BYTES = 4 * 1024**2
MOST_REDIRECTS = 5
#: Endings of files that are read as text.
TEXT_SUFFIXES = (".txt", ".md", ".py", ".csv", ".json")
_TEXT_TYPES = frozenset(
    {"text/plain", "text/markdown", "text/x-markdown", "text/csv", "text/x-python", "text/x-script.python"}
    | {"application/json", "application/x-python-code"}
)
#: What `mime_of` finds, where it is: so these are never taken on somebody's word.
_TOLD_BY_CONTENT = frozenset(
    {"image/png", "image/jpeg", "image/gif", "image/webp", "image/bmp", "image/tiff", "image/avif", "image/heic"}
    | {"audio/wav", "audio/flac", "audio/ogg", "audio/mp4", "audio/aiff", "audio/webm"}
    | {"video/mp4", "video/quicktime", "video/webm", "video/x-matroska", "video/x-msvideo", "video/ogg"}
)
_PAGES = frozenset({"text/html", "application/xhtml+xml"})
#: Types by which servers say that they do not know.
_UNSAID = frozenset({"", "application/octet-stream", "binary/octet-stream", "application/x-download"})
_PARTS: dict[str, type[MediaPart]] = {"image": ImagePart, "audio": AudioPart, "video": VideoPart}
_HEAD = 4096
_KINDS = "an image, sound, video, or text (.txt, .md, .py, .csv, .json) can be attached"


def read_file(path: Path | str) -> MessagePart:
    """The part that a file is; text begins with a heading line, its name. Blocks.

    Raises:
        PromptError: it is missing, empty, too large, no file, unreadable, or of a kind that no model takes.
    """
    shown = str(path)
    try:
        found = Path(path).expanduser()
        shown = str(found)
        about = found.stat()
        if stat.S_ISDIR(about.st_mode):
            raise _refused(shown, "it is a folder", "name a file in it")
        if not stat.S_ISREG(about.st_mode):  # a pipe would wait for its writer
            raise _refused(shown, "it is not a plain file", "copy its content into one")
        _check_size(shown, about.st_size)
        with found.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _refused(shown, f"there is no such file in {Path.cwd()}", "check the path; Tab completes it") from None
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, or a home that there is not
        raise _refused(shown, getattr(error, "strerror", None) or str(error), "check that it can be read") from None
    return part_of(content, found.name, shown=shown)


def part_of(content: bytes, name: str = "", *, declared: str = "", shown: str = "") -> MessagePart:
    """The part that some bytes are.

    Args:
        content: the whole of it.
        name: as a file would be called; the heading of text.
        declared: the type that a server named, if one did.
        shown: what errors call it; the name by default.

    Raises:
        PromptError: it is empty, too large, or of a kind that no model takes.
    """
    shown = shown or name or f"{len(content):,} bytes"
    _check_size(shown, len(content))
    mime = _kind(content[:_HEAD], name, declared, shown)
    kind = _PARTS.get(mime.partition("/")[0])
    if kind is not None:
        return kind(content, mime)
    if len(content) > MAX_TEXT_BYTES:
        raise _refused(shown, f"it is text of {len(content):,} bytes, and at most {MAX_TEXT_BYTES:,} are taken")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refused(shown, f"it is not UTF-8 text (byte {error.start:,})", "save it as UTF-8") from None
    if "\0" in text:
        raise _refused(shown, "it is called text, and has NUL characters in it", "save it as UTF-8")
    if not text.strip():
        raise _refused(shown, "it is empty")
    heading = f"# {' '.join(name.split())}\n\n" if name else ""
    return TextPart(f"{heading}{text.rstrip()}\n\n")


async def fetch(
    url: str,
    *,
    max_bytes: int = MAX_BYTES,
    connect_s: float = 10.0,
    read_s: float = 30.0,
    total_s: float = 300.0,
) -> MessagePart:
    """The part that lies at an http(s) address; cancelling closes the connection.

    Args:
        url: without a user name or password in it.
        max_bytes: from which it is refused, while it is read.
        connect_s: seconds to wait for the server, at each redirect.
        read_s: seconds it may be silent.
        total_s: seconds for all of it.

    Raises:
        PromptError: it cannot be had, is too large, or of a kind that no model takes: a web page, for one.
    """
    import httpx

    shown = _address(url)
    timeout = httpx.Timeout(read_s, connect=connect_s)
    try:
        async with (
            asyncio.timeout(total_s),
            httpx.AsyncClient(timeout=timeout, headers={"accept-encoding": "identity"}) as client,
        ):
            return await _fetched(client, _checked(url, shown), shown, max_bytes)
    except TimeoutError:
        raise _refused(shown, f"it did not come within {total_s:g} s", "try again, or attach a file") from None
    except httpx.ConnectTimeout:
        raise _refused(shown, f"the server did not answer within {connect_s:g} s", "check the address") from None
    except httpx.TimeoutException:
        raise _refused(shown, f"the server was silent for {read_s:g} s", "try again, or attach a file") from None
    except httpx.TransportError as error:
        why = str(error).strip().splitlines()
        said = why[0][:200] if why else type(error).__name__
        raise _refused(shown, f"the connection failed ({said})", "check the address, or attach a file") from None
    except (httpx.InvalidURL, httpx.DecodingError, ValueError) as error:
        raise _refused(shown, str(error)[:200] or type(error).__name__, "check the address") from None


async def _fetched(client: httpx.AsyncClient, url: str, shown: str, max_bytes: int) -> MessagePart:
    """Follow redirects one by one, so that each address is checked and no cookie is carried on."""
    for _ in range(MOST_REDIRECTS + 1):
        client.cookies.clear()
        async with client.stream("GET", url, follow_redirects=False) as response:
            if response.next_request is None:
                return await _read(response, shown, max_bytes)
            url = _checked(str(response.next_request.url), shown)
    raise _refused(shown, f"it redirects more than {MOST_REDIRECTS} times", "open it in a browser, and attach the file")


async def _read(response: httpx.Response, shown: str, max_bytes: int) -> MessagePart:
    if response.status_code in (401, 403, 407):
        said = f"the server answers {response.status_code}, and credentials are never sent"
        raise _refused(shown, said, "download it yourself, and attach the file")
    if response.status_code != 200:
        said = f"the server answers {response.status_code} {response.reason_phrase}".rstrip()
        raise _refused(shown, said, "check the address")
    name = unquote(PurePosixPath(response.url.path).name)
    declared = response.headers.get("content-type", "").partition(";")[0].strip().lower() or "application/octet-stream"
    length = response.headers.get("content-length", "")
    _check_size(shown, int(length) if length.isdecimal() else 1, max_bytes)
    content, is_known = bytearray(), False
    async for piece in response.aiter_bytes():
        content += piece
        _check_size(shown, len(content) or 1, max_bytes)
        if not is_known and len(content) >= _HEAD:  # what nobody takes need not come whole
            _kind(bytes(content[:_HEAD]), name, declared, shown)
            is_known = True
    return part_of(bytes(content), name, declared=declared, shown=shown)


def _checked(url: str, shown: str) -> str:
    parts = urlsplit(url)
    _ = parts.port  # a ValueError where it is none
    if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
        raise _refused(shown, f"{parts.scheme or 'nothing'}: is not http or https", "give a path or an http(s) address")
    if parts.username is not None or parts.password is not None:
        raise _refused(
            shown, "a name or password stands in it, and credentials are never sent", "download it, and attach the file"
        )
    return url


def _kind(head: bytes, name: str, declared: str, shown: str) -> str:
    """The type by content, else as declared, else by the name's ending; `text/plain` for any text.

    Raises:
        PromptError: it is none that can be attached.
    """
    suffix = PurePosixPath(name.lower()).suffix
    by_name = mimetypes.guess_type(f"x{suffix}")[0] or ""
    said = spelled_type(by_name if declared in _UNSAID else declared)
    if (found := mime_of(head, said)) is not None:
        return found
    is_page = is_html(head) or said in _PAGES
    if suffix in TEXT_SUFFIXES and (not declared or (not is_page and (declared in _UNSAID or "text" in said))):
        return "text/plain"
    if is_page:
        fix = "open it in a browser, and save what it shows" if declared else "save its text as .md or .txt"
        raise _refused(shown, "it is a web page (text/html)", fix)
    if said in _TEXT_TYPES:
        return "text/plain"
    if said.partition("/")[0] in _PARTS and said != "image/svg+xml":
        if said not in _TOLD_BY_CONTENT:
            return said
        raise _refused(shown, f"it is called {said}, and its content is something else", "check the file")
    fix = "save it as PNG: models see pixels" if said == "image/svg+xml" else _KINDS
    raise _refused(shown, f"its type is {said}" if said else "its type is not known", fix)


def _check_size(shown: str, count: int, most: int = MAX_BYTES) -> None:
    if count < 1:
        raise _refused(shown, "it is empty")
    if count > most:
        raise _refused(shown, f"it is larger than {most:,} bytes", "shrink or cut it")


def _address(url: str) -> str:
    """An address as errors show it: no name, no password, no query, which may hold a key."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "the address"
    text = f"{parts.scheme}://{host}{parts.path}"
    text = text if len(text) <= 120 else f"{text[:119]}…"
    return f"{text}?…" if parts.query else text


def _refused(shown: str, why: str, fix: str = "") -> PromptError:
    return PromptError(f"{shown} cannot be attached", why=why, fix=fix)
