"""From files and addresses to message parts: what is taken, as what, and how shortly the rest is refused."""

from __future__ import annotations

import asyncio
import io
import os
import wave

import pytest

from kani_nb.engines import attachments
from kani_nb.engines.attachments import MAX_BYTES, fetch, part_of, read_file
from kani_nb.engines.media_types import is_html, mime_of
from kani_nb.errors import PromptError
from kani_nb.messages import AudioPart, ImagePart, TextPart, VideoPart
from tests.engines.file_server import encoded, make_png, serving

PNG = make_png()


def make_wav(frames=b"\0\0" * 100, rate=16000):
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(frames)
    return file.getvalue()


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as server:
        server.files = {"/done.png": ("image/png", PNG)}
        yield server


def refused(error, *words):
    said = str(error.value)
    assert "cannot be attached" in said
    assert len(said.splitlines()) <= 2
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("content", "expected", "mime"),
    [
        (PNG, ImagePart, "image/png"),
        (encoded("JPEG"), ImagePart, "image/jpeg"),
        (encoded("GIF"), ImagePart, "image/gif"),
        (encoded("WEBP"), ImagePart, "image/webp"),
        (encoded("BMP"), ImagePart, "image/bmp"),
        (encoded("TIFF"), ImagePart, "image/tiff"),
        (make_wav(), AudioPart, "audio/wav"),
        (b"fLaC\0\0\0\x22", AudioPart, "audio/flac"),
        (b"OggS\0\x02" + b"\0" * 22 + b"OpusHead", AudioPart, "audio/ogg"),
        (b"OggS\0\x02" + b"\0" * 23 + b"theora", VideoPart, "video/ogg"),
        (b"ID3\x04\0\0\0\0\0\0", AudioPart, "audio/mpeg"),
        (b"\xff\xfb\x90\x64" + b"\0" * 100, AudioPart, "audio/mpeg"),
        (b"\xff\xf1\x50\x80\0\x1f\xfc", AudioPart, "audio/aac"),
        (b"FORM\0\0\0\x10AIFFCOMM", AudioPart, "audio/aiff"),
        (b"\0\0\0\x18ftypM4A \0\0\0\0", AudioPart, "audio/mp4"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", VideoPart, "video/mp4"),
        (b"\0\0\0\x18ftypavif\0\0\0\0", ImagePart, "image/avif"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0", VideoPart, "video/quicktime"),
        (b"\x1a\x45\xdf\xa3\x93\x42\x82\x88webm", VideoPart, "video/webm"),
        (b"RIFF\x10\0\0\0AVI LIST", VideoPart, "video/x-msvideo"),
    ],
)
def test_content_decides_what_something_is_whatever_it_is_called(tmp_path, content, expected, mime):
    for name in ("thing", "thing.txt", "thing.html", "thing.pdf"):
        path = tmp_path / name
        path.write_bytes(content)
        part = read_file(path)
        assert type(part) is expected
        assert (part.mime, part.data) == (mime, content)
    assert part_of(content, "x.html", declared="text/html").mime == mime


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "code.py", "table.csv", "record.json", "LOUD.TXT"])
def test_text_is_headed_by_its_name(tmp_path, name):
    path = tmp_path / name
    path.write_text("\N{ZERO WIDTH NO-BREAK SPACE}<html> Grüße\n", encoding="utf-8")
    assert read_file(str(path)) == TextPart(f"# {name}\n\n<html> Grüße\n\n")


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "note.txt").write_text("here")
    assert "here" in str(read_file("~/note.txt"))
    with pytest.raises(PromptError) as error:
        read_file("~nobody-of-that-name/x.txt")
    refused(error, "~nobody-of-that-name")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.png", b"", "it is empty"),
        ("blank.txt", b" \n", "it is empty"),
        ("latin.txt", "Grüße".encode("latin-1"), "not UTF-8 text (byte 2)"),
        ("wide.txt", "hello there".encode("utf-16"), "not UTF-8"),
        ("nul.txt", b"a\0b", "NUL characters"),
        ("page.html", b"<!-- x --><!DOCTYPE html><p>hi", "it is a web page"),
        ("page", b"\n<HTML lang=en>", "it is a web page"),
        ("drawing.svg", b"<svg onload='alert(1)'/>", "save it as PNG"),
        ("paper.pdf", b"%PDF-1.7", "its type is application/pdf"),
        ("thing.zip", b"PK\3\4", "its type is application/zip"),
        ("thing", b"\1\2\3", "its type is not known"),
        ("fake.png", b"no picture at all", "it is called image/png, and its content is something else"),
        ("bom.html", b"\xef\xbb\xbf<?xml version='1.0'?><html >", "it is a web page"),
    ],
)
def test_what_no_model_takes_is_refused_in_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError) as error:
        read_file(tmp_path / name)
    refused(error, str(tmp_path / name), words)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(PromptError) as error:
        read_file(tmp_path)
    refused(error, "it is a folder")
    with pytest.raises(PromptError) as error:
        read_file(tmp_path / "nothing.png")
    refused(error, "there is no such file")
    with pytest.raises(PromptError) as error:
        read_file("a\0b.png")
    refused(error, "null")
    with pytest.raises(PromptError) as error:
        read_file(tmp_path / ("x" * 5000))
    refused(error, "File name too long")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(PromptError) as error:
            read_file(tmp_path / "pipe")
        refused(error, "not a plain file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = tmp_path / "secret.png"
    path.write_bytes(PNG)
    path.chmod(0)
    with pytest.raises(PromptError) as error:
        read_file(path)
    refused(error, "Permission denied")


def test_a_huge_file_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a hole: it takes no room
    with pytest.raises(PromptError) as error:
        read_file(path)
    refused(error, "larger than 52,428,800 bytes")
    text = tmp_path / "long.txt"
    text.write_bytes(b"a " * (attachments.MAX_TEXT_BYTES // 2 + 1))
    with pytest.raises(PromptError) as error:
        read_file(text)
    refused(error, "text of 4,194,306 bytes")


def test_a_web_page_is_recognised_in_linear_time():
    assert not is_html(b"<!---->" * 600)
    assert is_html(b"<!---->" * 500 + b"<body>")
    assert not is_html(b"# a heading\n<html>")
    assert not is_html(b"<!-- never closed")
    assert mime_of(b"") is None
    assert mime_of(b"\xff\xfea\0b\0") is None, "text in UTF-16 is no MPEG"


@pytest.mark.parametrize(
    ("path", "kind", "content", "expected"),
    [
        ("/a.png", "image/png", PNG, ImagePart(PNG, "image/png")),
        ("/a.jpg", "image/jpeg", PNG, ImagePart(PNG, "image/png")),
        ("/picture", "text/html; charset=utf-8", PNG, ImagePart(PNG, "image/png")),
        ("/picture", "", PNG, ImagePart(PNG, "image/png")),
        ("/a%20b.md", "text/plain; charset=utf-8", b"hello", TextPart("# a b.md\n\nhello\n\n")),
        ("/x.csv", "application/octet-stream", b"a,b\n1,2", TextPart("# x.csv\n\na,b\n1,2\n\n")),
        ("/x.py", "", b"print()", TextPart("# x.py\n\nprint()\n\n")),
        ("/api", "application/json", b"{}", TextPart("# api\n\n{}\n\n")),
        ("/new.jxl", "image/jxl", b"\xff\x0aabc", ImagePart(b"\xff\x0aabc", "image/jxl")),
    ],
)
async def test_what_an_address_holds_is_taken_by_content_then_header_then_name(web, path, kind, content, expected):
    import urllib.parse

    web.files[urllib.parse.unquote(path).replace(" ", "%20")] = (kind, content)
    assert await fetch(web.url + path) == expected


async def test_redirects_are_followed_five_times_and_nothing_secret_is_sent(web, monkeypatch, tmp_path):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login ada password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    assert await fetch(f"{web.url}/redirect/4?key=1") == ImagePart(PNG, "image/png")
    assert len(web.requests) == 6
    for _, headers in web.requests:
        assert not {"authorization", "cookie", "proxy-authorization", "referer"} & set(headers)
    with pytest.raises(PromptError) as error:
        await fetch(f"{web.url}/redirect/5")
    refused(error, "it redirects more than 5 times")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nothing.png", "the server answers 404 Not Found"),
        ("/status/500", "the server answers 500"),
        ("/status/401", "credentials are never sent"),
        ("/status/403", "credentials are never sent"),
        ("/status/204", "the server answers 204"),
        ("/loop", "it redirects more than 5 times"),
        ("/to?file:///etc/passwd", "file: is not http or https"),
        ("/to?http://ada:secret@127.0.0.1:1/x.png", "credentials are never sent"),
        ("/to?http://[", "cannot be attached"),
        ("/page", "it is a web page (text/html)"),
        ("/lies.png", "it is a web page (text/html)"),
        ("/garbage.png", "it is called image/png, and its content is something else"),
        ("/app", "its type is application/pdf"),
        ("/what", "its type is not known"),
        ("/drawing", "its type is image/svg+xml"),
        ("/empty.png", "it is empty"),
        ("/reset", "the connection failed"),
        ("/short", "the connection failed"),
        ("/gzip", "it is not UTF-8 text"),
    ],
)
async def test_what_an_address_does_not_give_is_said_shortly(web, path, words):
    web.files |= {
        "/page": ("text/html", b"<p>hello"),
        "/lies.png": ("image/png", b"<!doctype html><title>Sign in"),
        "/garbage.png": ("image/png", b"garbage"),
        "/app": ("application/pdf", b"%PDF"),
        "/what": ("application/octet-stream", b"\1\2"),
        "/drawing": ("image/svg+xml", b"<svg xmlns='x'><script>alert(1)</script></svg>"),
        "/empty.png": ("image/png", b""),
        "/gzip": ("text/plain", b"\x1f\x8b\x08\0"),
    }
    with pytest.raises(PromptError) as error:
        await fetch(f"{web.url}{path}")
    refused(error, web.url, words)
    assert "secret" not in str(error.value)


async def test_what_is_too_large_is_refused_while_it_comes(web):
    with pytest.raises(PromptError) as error:
        await fetch(f"{web.url}/endless", max_bytes=100_000)
    refused(error, "larger than 100,000 bytes")
    web.released.set()
    assert web.sent_bytes < 50_000_000, "the server was left"
    web.files["/big.png"] = ("image/png", PNG + b"\0" * 200_000)
    with pytest.raises(PromptError) as error:
        await fetch(f"{web.url}/big.png", max_bytes=100_000)
    refused(error, "larger than 100,000 bytes")


async def test_what_nobody_takes_is_left_before_it_has_come(web):
    web.files["/huge.html"] = ("text/html", b"<p>" * 1_000_000)
    with pytest.raises(PromptError) as error:
        await fetch(f"{web.url}/huge.html", max_bytes=4_000_000)
    refused(error, "web page")


async def test_a_server_that_is_silent_is_given_up(web):
    with pytest.raises(PromptError) as error:
        await fetch(f"{web.url}/silent", read_s=0.05)
    refused(error, "the server was silent for 0.05 s")
    with pytest.raises(PromptError) as error:
        await fetch(f"{web.url}/silent", total_s=0.2)
    refused(error, "it did not come within 0.2 s")


async def test_a_fetch_can_be_cancelled(web):
    call = asyncio.ensure_future(fetch(f"{web.url}/silent"))
    await asyncio.to_thread(web.reached.wait, 30)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x.png", "ftp: is not http or https"),
        ("file:///etc/passwd", "file: is not http or https"),
        ("http:///x.png", "is not http or https"),
        ("http://ada:secret@127.0.0.1/x.png", "credentials are never sent"),
        ("http://[::1/x.png", "cannot be attached"),
        ("http://127.0.0.1:1/x.png?key=secret", "the connection failed"),
        ("http://127.0.0.1:99999/x.png", "cannot be attached"),
        ("https://exa mple/x.png", "cannot be attached"),
    ],
)
async def test_an_address_that_leads_nowhere_is_refused_without_its_secrets(url, words, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(PromptError) as error:
        await fetch(url, connect_s=5)
    refused(error, words)
    assert "secret" not in str(error.value)
