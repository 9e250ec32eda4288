"""A prompt with its pictures as safe HTML: small ones as they are, others as thumbnails, the rest by their names.

Only the user's own message is drawn so; what a model says goes through `render`, which shows no images. A picture is
shown where the bytes it begins with are those of a raster format (PNG, JPEG, GIF, WebP): never an SVG, which can hold
scripts, whatever it calls itself. Pillow makes thumbnails where it is installed.
"""

from __future__ import annotations

import base64
import html
import io
import warnings
from collections.abc import Iterator, Sequence

from kani_nb.engines.media_types import mime_of
from kani_nb.messages import ImagePart, MessagePart
from kani_nb.notebook.render import showable
from kani_nb.notebook.transcript import part_text

#: Bytes of one picture, and of all pictures of a message: a notebook keeps them for good.
MAX_BYTES, _MOST_TOGETHER = 64 * 1024, 256 * 1024
MAX_SIDE = 320
#: Pixels from which a picture is not decoded: a small file can hold very many.
_MOST_PIXELS = 40_000_000
_RASTER = frozenset({"image/png", "image/jpeg", "image/gif", "image/webp"})
_STYLE = f"max-width:100%;max-height:{MAX_SIDE}px;display:block"


def prompt_html(prompt: str | Sequence[MessagePart | str]) -> str:
    """Safe HTML of a prompt with its media in place; empty where there is no picture to show."""
    drawn = list(_drawn(prompt))
    if not any(picture for _, picture in drawn):
        return ""
    return "".join(
        _image(*picture, part) if picture else html.escape(showable(part_text(part))) for part, picture in drawn
    )


def prompt_pictures(prompt: str | Sequence[MessagePart | str]) -> list[dict[str, str]]:
    """The pictures of a prompt for a front end of ours: `{"words", "source"}`, a data address of a raster format."""
    return [{"words": _words(part), "source": _data_address(*picture)} for part, picture in _drawn(prompt) if picture]


def _drawn(prompt: str | Sequence[MessagePart | str]) -> Iterator[tuple[MessagePart | str, tuple[bytes, str] | None]]:
    """Each part of a prompt, with its picture where that can be shown and the message has room for it."""
    left = _MOST_TOGETHER
    for part in () if isinstance(prompt, str) else prompt:
        picture = _raster(part.data) if isinstance(part, ImagePart) else None
        if picture is not None and len(picture[0]) > left:
            picture = None
        left -= len(picture[0]) if picture else 0
        yield part, picture


def _words(part: MessagePart | str) -> str:
    return showable(part_text(part)[1:-1])


def _data_address(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _image(content: bytes, mime: str, part: MessagePart | str) -> str:
    words = html.escape(_words(part))
    return f'<img alt="{words}" title="{words}" style="{_STYLE}" src="{_data_address(content, mime)}">'


def _raster(content: bytes) -> tuple[bytes, str] | None:
    """At most `MAX_BYTES` of a raster picture with its type; None where it cannot be shown."""
    mime = mime_of(content[:64])
    if mime not in _RASTER:
        return None
    assert mime is not None
    try:
        from PIL import Image
    except ImportError:
        return (content, mime) if len(content) <= MAX_BYTES else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Only decoders of those formats: the bytes decide, and no other code runs on them.
            with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "GIF", "WEBP")) as image:
                if image.width * image.height > _MOST_PIXELS:
                    return None
                if len(content) <= MAX_BYTES:
                    return content, mime
                image.thumbnail((MAX_SIDE, MAX_SIDE))
                return _encoded(image)
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError):
        return None  # what cannot be read is named; whether a model can is the engine's to say


def _encoded(image: object) -> tuple[bytes, str] | None:
    """A thumbnail as PNG where that is small enough, else as JPEG."""
    from PIL import Image, ImageOps

    assert isinstance(image, Image.Image)
    upright = ImageOps.exif_transpose(image)
    has_alpha = upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info
    drawn = upright.convert("RGBA" if has_alpha else "RGB")
    drawn.info.clear()  # no place and no camera in a notebook
    for name, mime, options in (("PNG", "image/png", {}), ("JPEG", "image/jpeg", {"quality": 80})):
        file = io.BytesIO()
        (drawn if name == "PNG" else drawn.convert("RGB")).save(file, format=name, **options)
        if file.tell() <= MAX_BYTES:
            return file.getvalue(), mime
    return None
