"""Images and sound from their encoded bytes, as processors take them: checked first, so that what is wrong is said.

Pillow, soundfile and scipy do the work; they come with the extra `multimodal`.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

from kani_nb.errors import MissingDependencyError, PromptError
from kani_nb.messages import AudioPart, ImagePart, MediaPart, VideoPart

#: Pixels from which an image is refused: no processor keeps more than a few million.
MAX_PIXELS = 100_000_000
#: Seconds of sound from which it is refused.
MAX_SECONDS = 3600
_INSTALL = "`pip install 'kani-nb[multimodal]'`"


def digest_of(part: MediaPart) -> int:
    """A number below 2**60 that is equal for equal media."""
    found = hashlib.blake2b(part.mime.encode() + b"\0" + part.data, digest_size=8).digest()
    return int.from_bytes(found, "big") >> 4


def read_image(part: ImagePart) -> Any:
    """The image as a `PIL.Image` in RGB, upright.

    Raises:
        PromptError: it is no image that Pillow can read, or too large.
        MissingDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise MissingDependencyError("images need Pillow", fix=_INSTALL) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(part.data))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise PromptError(
                    f"the image has {width:,} x {height:,} pixels",
                    why=f"at most {MAX_PIXELS:,} are read",
                    fix="shrink it",
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise PromptError("the image is too large", why=str(error), fix="shrink it") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise PromptError(
            f"the image ({part.mime}, {len(part.data):,} bytes) cannot be read",
            why=_first(error),
            fix="open it elsewhere",
        ) from None


def read_audio(part: AudioPart, sample_rate: int) -> Any:
    """The sound as one channel `(T,) float32` at `sample_rate` in Hz; resampled where it has another.

    Raises:
        PromptError: it cannot be read, is empty, or too long.
        MissingDependencyError: soundfile or scipy is not installed.
    """
    import numpy as np

    try:
        import soundfile
    except ImportError:
        raise MissingDependencyError("sound needs soundfile", fix=_INSTALL) from None
    try:
        with soundfile.SoundFile(io.BytesIO(part.data)) as file:
            rate = file.samplerate
            if file.frames > MAX_SECONDS * rate:
                raise PromptError(
                    f"the sound is {file.frames / rate / 60:,.0f} minutes long",
                    why=f"at most {MAX_SECONDS // 60} are read",
                    fix="cut it",
                )
            samples = file.read(dtype="float32", always_2d=True).mean(axis=1)
    except (soundfile.LibsndfileError, RuntimeError, ValueError) as error:
        raise PromptError(
            f"the sound ({part.mime}, {len(part.data):,} bytes) cannot be read",
            why=_first(error),
            fix="try WAV or FLAC",
        ) from None
    if not len(samples):
        raise PromptError("the sound is empty", why="it has no samples")
    if rate != sample_rate:
        samples = _resampled(samples, rate, sample_rate)
    return np.ascontiguousarray(samples, dtype=np.float32)


def _resampled(samples: Any, rate: int, wanted: int) -> Any:
    from math import gcd

    try:
        from scipy.signal import resample_poly
    except ImportError:
        raise MissingDependencyError(
            f"the sound has {rate:,} Hz and the model hears {wanted:,}", why="scipy converts it", fix=_INSTALL
        ) from None
    divisor = gcd(rate, wanted)
    return resample_poly(samples, wanted // divisor, rate // divisor)


def video_file(part: VideoPart) -> str:
    """A file that holds the video, for processors, which read files; the caller deletes it."""
    suffix = "." + part.mime.partition("/")[2].partition(";")[0].replace("quicktime", "mov").replace(
        "x-matroska", "mkv"
    )
    with tempfile.NamedTemporaryFile(prefix="kani-nb-", suffix=suffix, delete=False) as file:
        file.write(part.data)
    return str(Path(file.name))


def _first(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
