r"""What `%%chat -a FILE|URL|{{expr}}` attaches: from words of the line and values of the notebook to message parts.

Expressions are evaluated on the calling thread, where the notebook's own objects live; files are read and addresses
fetched on the loop, so that an interrupt ends that at once. What bytes are is decided in `engines.attachments`.
"""

from __future__ import annotations

import asyncio
import io
import re
import shlex
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kani_nb._interrupts import Interrupted, InterruptGuard
from kani_nb._waiting import Call
from kani_nb.engines.attachments import fetch, part_of, read_file
from kani_nb.errors import PromptError
from kani_nb.messages import ImagePart, MessagePart
from kani_nb.notebook.interpolation import evaluate, expression_at

if TYPE_CHECKING:
    from kani_nb._loop import LoopThread

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TAKEN = "attach a path, an address, bytes, a PIL image, a matplotlib figure or an IPython Image or Audio"


class _Address(str):
    """An http(s) address that is still to be fetched."""

    __slots__ = ()


def parts_of(words: Sequence[str], namespace: dict[str, Any], loop: LoopThread) -> tuple[MessagePart, ...]:
    """The parts that the words of `-a` stand for, in their order.

    Args:
        words: paths (with `~`), http(s) addresses, or `{{expr}}`.
        namespace: where expressions are evaluated, each once.
        loop: where files are read and addresses fetched.

    Raises:
        PromptError: one of them cannot be attached, with its name; nothing has been sent.
        Interrupted: an interrupt came meanwhile.
    """
    sources = [_source(word, namespace) for word in words]
    if all(isinstance(each, MessagePart) for each in sources):
        return tuple(each for each in sources if isinstance(each, MessagePart))
    with InterruptGuard() as guard:
        call = Call(loop, _all_of(sources), guard)
        try:
            return call.result()
        except CancelledError:
            raise Interrupted("interrupted while attachments were read; nothing was sent") from None


def with_expressions_quoted(line: str) -> str:
    """`line` with every bare `{{expr}}` as one word of a shell, whatever quotes and spaces are in it."""
    done, quote, position = [], "", 0
    while position < len(line):
        character = line[position]
        if quote:
            quote = "" if character == quote else quote
        elif line.startswith("{{", position) and (found := _closed(line, position)) > position:
            done.append(shlex.quote(line[position:found]))
            position = found
            continue
        elif character in "\"'":
            quote = character
        done.append(character)
        position += 1
    return "".join(done)


def _closed(line: str, start: int) -> int:
    """Where the braces that open at `start` are closed; `start` itself where they hold no expression."""
    try:
        found = expression_at(line, start + 2)
    except PromptError:
        return start
    return start if found is None else found[1]


async def _all_of(sources: Sequence[MessagePart | Path | _Address]) -> tuple[MessagePart, ...]:
    found = []
    for source in sources:
        if isinstance(source, MessagePart):
            found.append(source)
        elif isinstance(source, Path):
            found.append(await asyncio.to_thread(read_file, source))
        else:
            found.append(await fetch(source))
    return tuple(found)


def _source(word: str, namespace: dict[str, Any]) -> MessagePart | Path | _Address:
    if not word.strip():
        raise PromptError("-a has nothing after it", fix="%%chat -a picture.png")
    text = word.strip()
    if not text.startswith("{{"):
        return _named(word)
    found = expression_at(text, 2)
    if found is None or text[found[1] :].strip():
        raise PromptError(
            f"-a {_short(text)} is not one expression", why="it is read up to }}", fix='-a "{{image}}", in quotes'
        )
    return evaluate(found[0], namespace, lambda value: _part_of_value(value, found[0]))


def _named(text: str) -> Path | _Address:
    if _URL.match(text):
        return _Address(text)
    if text.lower().startswith("data:"):
        raise PromptError("data: addresses cannot be attached", fix="decode it, and attach {{its_bytes}}")
    return Path(text)


def _part_of_value(value: Any, expression: str) -> MessagePart | Path | _Address:
    """The part that a value of the notebook is, or where it is to be read.

    Raises:
        PromptError: nothing that a model could take.
    """
    shown = f"{{{{{_short(expression)}}}}}"
    if isinstance(value, MessagePart):
        return value
    if isinstance(value, str | Path):
        if not str(value).strip() or "\n" in str(value):
            raise _refused(shown, "it is text, and no path or address", "write {{…}} in the prompt itself")
        return _named(str(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return part_of(bytes(value), shown=shown)
    if (picture := _picture(value)) is not None:
        return ImagePart(picture, "image/png")
    if (displayed := _displayed(value, shown)) is not None:
        return displayed
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        raise _array_refused(value, shown)
    if callable(getattr(getattr(value, "figure", None), "savefig", None)):  # axes, and what is drawn in them
        raise _refused(shown, f"it is a part of a figure ({type(value).__name__})", f"-a {{{{{expression}.figure}}}}")
    if hasattr(value, "to_markdown"):
        raise _refused(shown, f"it is a {type(value).__name__}", f"write {shown} in the prompt itself")
    raise _refused(shown, f"it is a {type(value).__name__}", _TAKEN)


def _picture(value: Any) -> bytes | None:
    """PNG of a PIL image or a matplotlib figure; None for anything else. Neither library is imported."""
    if isinstance(value, type):
        return None
    file = io.BytesIO()
    if callable(getattr(value, "savefig", None)):  # pyplot itself too: its current figure
        value.savefig(file, format="png", bbox_inches="tight")
        return file.getvalue()
    is_pil = any(f"{each.__module__}.{each.__qualname__}" == "PIL.Image.Image" for each in type(value).__mro__)
    if not is_pil:
        return None
    # PNG holds neither CMYK nor floats.
    (value if value.mode in ("1", "L", "LA", "P", "RGB", "RGBA") else value.convert("RGB")).save(file, format="png")
    return file.getvalue()


def _displayed(value: Any, shown: str) -> MessagePart | Path | _Address | None:
    """What an IPython Image, Audio or Video holds or points to; None for anything else."""
    from IPython.display import Audio, Image, Video

    if not isinstance(value, Audio | Image | Video):
        return None
    if isinstance(value.data, bytes) and value.data:
        return part_of(value.data, shown=shown)
    for place in (value.filename, value.url, value.data):
        if isinstance(place, str) and place and len(place) < 4096:
            return _named(place)
    raise _refused(shown, f"this {type(value).__name__} holds no data", "attach the file itself")


def _array_refused(value: Any, shown: str) -> PromptError:
    shape = " x ".join(map(str, value.shape)) or "a single number"
    said = f"it is an array ({shape}, {value.dtype})"
    if len(value.shape) == 1:
        why = f"{said}, which does not say how many samples a second are"
        return _refused(shown, why, f"-a {{{{Audio({shown[2:-2]}, rate=16000)}}}}, with IPython.display.Audio")
    return _refused(shown, said, f"-a {{{{Image.fromarray({shown[2:-2]})}}}}, with PIL.Image")


def _refused(shown: str, why: str, fix: str) -> PromptError:
    return PromptError(f"{shown} cannot be attached", why=why, fix=fix)


def _short(text: str, most: int = 60) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
