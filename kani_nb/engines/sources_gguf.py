"""Reads the header of a GGUF file, quickly and without trusting it: is it whole, and what model is inside.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The tensors themselves are left to
transformers; long lists (a vocabulary) are skipped over.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kani_nb.engines.sources_cache import human_bytes
from kani_nb.errors import ModelFilesError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST_STRING = 16 * 1024**2
_MOST_ENTRIES = 2**24


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file says of itself. `metadata` holds its single values; lists are left out."""

    metadata: dict[str, int | float | bool | str]
    tensor_count: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the model family."""
        return str(self.metadata.get("general.architecture", ""))


class _DamagedError(Exception):
    pass


class _Cursor:
    """Little-endian reads that never go past the end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file = file
        self.size = size

    def skip(self, count: int) -> None:
        if count < 0 or self.file.tell() + count > self.size:
            raise _DamagedError("its header goes on past the end of the file")
        self.file.seek(count, 1)

    def scalar(self, code: str) -> int | float | bool:
        width = struct.calcsize(f"<{code}")
        data = self.file.read(width)
        if len(data) < width:
            raise _DamagedError("its header goes on past the end of the file")
        value: int | float | bool = struct.unpack(f"<{code}", data)[0]
        return value

    def count(self, what: str, limit: int = _MOST_ENTRIES) -> int:
        value = int(self.scalar("Q"))
        if value > limit:
            raise _DamagedError(f"it claims {value} {what}")
        return value

    def text(self) -> str:
        length = self.count("bytes in one name", _LONGEST_STRING)
        data = self.file.read(length)
        if len(data) < length:
            raise _DamagedError("its header goes on past the end of the file")
        return data.decode("utf-8", errors="replace")

    def value(self, kind: int) -> int | float | bool | str | None:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise _DamagedError(f"it has a value of unknown type {kind}")
        inner, length = int(self.scalar("I")), self.count("values in a list")
        if inner in _SCALARS:
            self.skip(length * struct.calcsize(f"<{_SCALARS[inner]}"))
        else:
            for _ in range(length):
                if inner == _STRING:
                    self.skip(self.count("bytes in one name", _LONGEST_STRING))
                else:
                    self.value(inner)
        return None


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of `path`, when the file is as long as its header says.

    Raises:
        ModelFilesError: not a GGUF file, damaged, or cut off.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            return _read(_Cursor(file, size))
    except _DamagedError as error:
        raise ModelFilesError(
            f"{path.name} is not a whole GGUF file",
            why=f"{error}, and the file has {human_bytes(size)}",
            fix="download it again",
        ) from None
    except (RecursionError, UnicodeError, OverflowError) as error:
        raise ModelFilesError(f"{path.name} is a damaged GGUF file", why=str(error), fix="download it again") from error


def _read(cursor: _Cursor) -> GgufHeader:
    magic = cursor.file.read(4)
    if magic != b"GGUF":
        raise _DamagedError(f"it begins with {magic!r} instead of b'GGUF'")
    version = int(cursor.scalar("I"))
    if version not in (2, 3):
        raise _DamagedError(f"its version is {version}, and 2 and 3 are known")
    tensors, pairs = cursor.count("tensors"), cursor.count("values")
    metadata: dict[str, int | float | bool | str] = {}
    for _ in range(pairs):
        name = cursor.text()
        value = cursor.value(int(cursor.scalar("I")))
        if value is not None:
            metadata[name] = value
    size_of = _tensor_sizes()
    end = 0
    for _ in range(tensors):
        cursor.text()
        dimensions = int(cursor.scalar("I"))
        if dimensions > 8:
            raise _DamagedError(f"it has a tensor of {dimensions} dimensions")
        elements = 1
        for _ in range(dimensions):
            elements *= cursor.count("values in a tensor", 2**48)
        kind, offset = int(cursor.scalar("I")), int(cursor.scalar("Q"))
        end = max(end, offset + size_of(kind, elements))
    if not tensors:
        raise _DamagedError("it holds no tensors")
    alignment = int(metadata.get("general.alignment", 32)) or 32
    start = -(-cursor.file.tell() // alignment) * alignment
    if start + end > cursor.size:
        raise _DamagedError(f"its tensors take {human_bytes(start + end)}")
    return GgufHeader(metadata, tensors)


def _tensor_sizes() -> Callable[[int, int], int]:
    """How many bytes so many elements of a quantization take."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    def size_of(kind: int, elements: int) -> int:
        try:
            block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise _DamagedError(f"it has a tensor of unknown type {kind}") from None
        return int(-(-elements // block) * width)

    return size_of
