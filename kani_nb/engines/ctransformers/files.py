"""Which legacy file is meant, where it is, and whether the package can be asked to run it at all.

Measured with ctransformers 0.2.27 and its `avx2`, `avx` and `basic` libraries: GGML files of GPT-2, GPT-J, GPT-NeoX,
Dolly, StarCoder, MPT and LLaMA (ggjt), and GGUF files of LLaMA whose vocabulary is SentencePiece's. GGUF files with
another vocabulary cannot be loaded by it.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

from kani_nb.engines.base import ProgressCallback
from kani_nb.engines.ctransformers.layout import check_whole
from kani_nb.engines.llamacpp.files import fetch_from_hub
from kani_nb.engines.sources_cache import Fetch
from kani_nb.engines.sources_gguf import read_gguf_header
from kani_nb.errors import ConfigError, ModelFilesError, UnknownModelError, did_you_mean

#: Model types that were run.
MEASURED = ("gpt2", "gptj", "gpt_neox", "dolly-v2", "starcoder", "mpt", "llama")
_LLAMA_MAGICS = (b"tjgg", b"fmgg")  # ggjt and ggmf, little endian
_PLAIN_MAGIC = b"lmgg"  # ggml
_SUCCESSOR = "LlamaCppEngine runs it: %load_engine FILE.gguf"


class LegacyFile(NamedTuple):
    """A file and the name that ctransformers has for its architecture; None where the file says it."""

    path: Path
    model_type: str | None


def find_file(
    model_id: str,
    model_file: str | None,
    model_type: str | None,
    *,
    token: str | None = None,
    progress: ProgressCallback | None = None,
    cancelled: threading.Event | None = None,
) -> LegacyFile:
    """The file of `model_id` (a file, a folder, or a repository of the Hub), downloaded if need be. Blocks.

    Raises:
        UnknownModelError, ModelUnavailableError: there is no such file, or it cannot be had.
        ModelFilesError: it is cut off, or of a kind that ctransformers cannot run.
        ConfigError: it does not say its architecture, and nobody else does.
    """
    path = Path(model_id).expanduser()
    if path.is_dir():
        path = _in_folder(path, model_file)
    elif not path.is_file():
        fetch = Fetch(model_id, progress, cancelled)
        folder, names = fetch_from_hub(
            model_id, lambda names: [choose_file(model_id, names, model_file)], fetch, token=token
        )
        path = folder / names[0]
    return LegacyFile(path.absolute(), check_kind(path, model_type))


def _in_folder(folder: Path, model_file: str | None) -> Path:
    names = [each.relative_to(folder).as_posix() for each in sorted(folder.rglob("*")) if each.is_file()]
    return folder / choose_file(str(folder), names, model_file)


def choose_file(where: str, names: list[str], model_file: str | None) -> str:
    """The file that is meant among `names`.

    Raises:
        UnknownModelError: there is none.
        ConfigError: there are several, and none was named.
    """
    models = [name for name in names if name.lower().endswith((".bin", ".gguf", ".ggml"))]
    if model_file is not None:
        if model_file in names:
            return model_file
        raise UnknownModelError(
            f"{where} has no file {model_file!r}", fix=did_you_mean(model_file, models) or f"it has {', '.join(models)}"
        )
    if len(models) == 1:
        return models[0]
    if models:
        raise ConfigError(
            f"{where} has {len(models)} models", why=", ".join(models[:8]), fix=f"model_file={models[0]!r}"
        )
    raise UnknownModelError(f"{where} has no GGML file", fix="a GGML file ends with .bin or .ggml, and is one file")


def check_kind(path: Path, model_type: str | None) -> str | None:
    """The model type to tell ctransformers.

    Raises:
        ModelFilesError: the file is cut off, or of a kind that ctransformers cannot run.
        ConfigError: it does not say its architecture, and `model_type` is None.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        header = read_gguf_header(path)
        vocabulary = header.metadata.get("tokenizer.ggml.model")
        if vocabulary != "llama":
            raise ModelFilesError(
                f"ctransformers cannot run {path.name}",
                why=f"of GGUF files it runs those with a SentencePiece vocabulary, and this one is {vocabulary!r}",
                fix=_SUCCESSOR,
            )
        return None
    if magic in _LLAMA_MAGICS:
        check_whole(path, model_type or "llama")
        return model_type or "llama"
    if magic != _PLAIN_MAGIC:
        raise ModelFilesError(
            f"{path.name} is no GGML file", why=f"it begins with {magic!r}", fix="HuggingEngine reads other formats"
        )
    if model_type is None:
        raise ConfigError(
            f"{path.name} does not say which architecture it is",
            fix=f"model_load_kwargs={{'model_type': ...}}, one of {', '.join(MEASURED)}",
        )
    check_whole(path, model_type)
    return model_type
