"""The type of an image, sound or video by the bytes it begins with. Pure; what is no medium is None.

Signatures are those of the WHATWG's MIME Sniffing Standard, and of the formats' own specifications where that has none.
"""

from __future__ import annotations

import re

#: What the brand of an ISO base media file (`ftyp`) stands for; others are MP4 video.
_BRANDS = {
    b"avif": "image/avif", b"avis": "image/avif", b"heic": "image/heic", b"heix": "image/heic", b"mif1": "image/heic",
    b"hevc": "image/heic", b"M4A ": "audio/mp4", b"M4B ": "audio/mp4", b"qt  ": "video/quicktime",
}  # fmt: skip
_RIFF = {b"WAVE": "audio/wav", b"AVI ": "video/x-msvideo", b"WEBP": "image/webp"}
_BEGINNINGS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"fLaC", "audio/flac"),
    (b"ID3", "audio/mpeg"),
    (b".snd\0\0\0", "audio/basic"),
    (b"\0\0\x01\xba", "video/mpeg"),
    (b"\0\0\x01\xb3", "video/mpeg"),
)
_HTML = re.compile(rb"<(?:!doctype\s+html|html|head|body)[\s>]", re.IGNORECASE)
#: Other spellings of the same types.
_SPELLINGS = {
    "audio/x-wav": "audio/wav", "audio/wave": "audio/wav", "audio/vnd.wave": "audio/wav", "audio/x-flac": "audio/flac",
    "audio/mp3": "audio/mpeg", "audio/x-aiff": "audio/aiff", "audio/x-m4a": "audio/mp4", "audio/mp4a-latm": "audio/mp4",
    "image/jpg": "image/jpeg", "image/pjpeg": "image/jpeg", "image/x-png": "image/png", "image/x-ms-bmp": "image/bmp",
    "application/ogg": "audio/ogg", "video/avi": "video/x-msvideo", "video/matroska": "video/x-matroska",
}  # fmt: skip


def spelled_type(mime: str) -> str:
    """`mime` in lower case and in its usual spelling."""
    lowered = mime.strip().lower()
    return _SPELLINGS.get(lowered, lowered)


def mime_of(head: bytes, said: str = "") -> str | None:
    """The type of what begins with `head`, of which a few hundred bytes suffice; None where it is no medium.

    Args:
        head: the first bytes.
        said: its type by a header or a name, which decides whether a container with sound and pictures is called sound.
    """
    for beginning, mime in _BEGINNINGS:
        if head.startswith(beginning):
            return mime
    if head[:4] == b"RIFF":
        return _RIFF.get(head[8:12])
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "audio/aiff"
    if head[4:8] == b"ftyp":
        found = _BRANDS.get(head[8:12], "video/mp4")
        return "audio/mp4" if found == "video/mp4" and said == "audio/mp4" else found
    if head[:4] == b"OggS":
        return "video/ogg" if b"theora" in head[:512] or said == "video/ogg" else "audio/ogg"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        kind = "webm" if b"webm" in head[:64] else "x-matroska"
        return "audio/webm" if said == "audio/webm" and kind == "webm" else f"video/{kind}"
    # Two letters begin many a text: a bitmap says where its pixels are, too, within its first kilobytes.
    if head[:2] == b"BM" and len(head) > 14 and head[6:10] == b"\0\0\0\0":
        return "image/bmp"
    return _frames_of_mpeg(head)


def is_html(head: bytes) -> bool:
    """Whether a web page begins so, with or without comments before it."""
    rest = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    while rest.startswith((b"<!--", b"<?xml")):
        _, end, rest = rest.partition(b"-->" if rest.startswith(b"<!--") else b"?>")
        rest = rest.lstrip()
        if not end:
            return False
    return _HTML.match(rest) is not None


def _frames_of_mpeg(head: bytes) -> str | None:
    """MPEG audio without a tag: a frame header with 11 (or AAC's 12) set bits whose other fields are none reserved."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    layer = head[1] >> 1 & 3
    if layer == 0:  # ADTS
        return "audio/aac" if head[1] & 0xF0 == 0xF0 and head[2] >> 2 & 0xF < 13 else None
    if layer == 3:  # nobody has Layer I, and UTF-16 begins so
        return None
    is_reserved = head[1] >> 3 & 3 == 1 or head[2] >> 4 in (0, 15) or head[2] >> 2 & 3 == 3
    return None if is_reserved else "audio/mpeg"
