"""Whether a GGML file is whole. The package does not look: of a file that is cut off it makes a model that babbles.

Such a file is a few numbers, the vocabulary, and tensors one after the other, each with its name and shape; nowhere
does it say how long it is. So its tensors are walked through, and the last one must end where the file does.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

from kani_nb.engines.sources_cache import human_bytes
from kani_nb.errors import ModelFilesError

#: Numbers at the beginning, by model type; whether the size of the vocabulary then comes once more; and which of the
#: numbers it is otherwise. Files of other types are not looked at.
_HEADS = {
    "gpt2": ("6i", True, 0),
    "starcoder": ("6i", True, 0),
    "gptj": ("7i", True, 0),
    "gpt_neox": ("8i", False, 0),
    "dolly-v2": ("8i", False, 0),
    "mpt": ("5i2fi", False, 4),
    "llama": ("7i", False, 0),
}
_ALIGNED = b"tjgg"
_NEWEST_BLOCKS = 2000  # added to the file type of those that are quantized as ever since


class _CutOffError(Exception):
    pass


class _OtherFormatError(Exception):
    pass


def check_whole(path: Path, model_type: str) -> None:
    """Refuse a file that ends within a tensor, or before the first.

    Raises:
        ModelFilesError: it does.
    """
    if model_type not in _HEADS:
        return
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            _walk(file, size, model_type)
        except _OtherFormatError:  # the package may know it
            return
        except _CutOffError as error:
            raise ModelFilesError(
                f"{path.name} is not a whole GGML file of {model_type}",
                why=f"{error} ({human_bytes(size)})",
                fix="download it again, or say its model_type; LlamaCppEngine runs GGUF files of the same models",
            ) from None


def _walk(file: BinaryIO, size: int, model_type: str) -> None:
    magic = file.read(4)
    has_version = magic != b"lmgg"
    version = _numbers(file, "i")[0] if has_version else 0
    form, is_repeated, place = _HEADS[model_type]
    head = _numbers(file, form)
    count = _numbers(file, "i")[0] if is_repeated else head[place]
    if not 0 < count < 2**24:
        raise _CutOffError(f"its vocabulary would have {count} tokens")
    for _ in range(int(count)):
        _skip(file, size, int(_numbers(file, "i")[0]) + (4 if has_version else 0))
    is_newest = version >= 3 or head[-1] >= _NEWEST_BLOCKS
    tensors = 0
    while file.tell() < size:
        dimensions, name_bytes, kind = (int(each) for each in _numbers(file, "3i"))
        if not (0 < dimensions <= 4 and 0 < name_bytes <= 512):
            raise _CutOffError(f"no tensor follows the first {tensors}")
        shape = [int(each) for each in _numbers(file, f"{dimensions}i")]
        _skip(file, size, name_bytes)
        if magic == _ALIGNED:
            _skip(file, size, -file.tell() % 32)
        _skip(file, size, _tensor_bytes(kind, math.prod(shape), is_newest=is_newest))
        tensors += 1
    if not tensors:
        raise _CutOffError("it holds no tensors")


def _tensor_bytes(kind: int, elements: int, *, is_newest: bool) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind > 1 and not is_newest:
        raise _OtherFormatError
    try:
        block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise _OtherFormatError from None
    return int(elements // block * width)


def _numbers(file: BinaryIO, form: str) -> tuple[int | float, ...]:
    width = struct.calcsize(f"<{form}")
    raw = file.read(width)
    if len(raw) < width:
        raise _CutOffError("it ends too early")
    return struct.unpack(f"<{form}", raw)


def _skip(file: BinaryIO, size: int, count: int) -> None:
    if count < 0 or file.tell() + count > size:
        raise _CutOffError("it ends within what it announces")
    file.seek(count, 1)
