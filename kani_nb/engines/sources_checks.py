"""Looks at a model's folder before torch is touched: is everything there, is it whole, and may it be loaded.

Only headers and sizes are read, so that it takes milliseconds whatever the model weighs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kani_nb.engines.sources_cache import human_bytes
from kani_nb.errors import ModelFilesError

_LONGEST_HEADER = 100 * 1024**2
_OTHER_FORMATS = ("tf_model.h5", "flax_model.msgpack", "model.ckpt.index", "rust_model.ot")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def check_weights(folder: Path, *, allow_pickle: bool = False) -> int:
    """Bytes of the weights that loading `folder` would read, when all of them are there and whole.

    Raises:
        ModelFilesError: no configuration, no weights, a missing or truncated file, or pickled weights without
            `allow_pickle`; says what is there.
    """
    if not folder.is_dir():
        raise ModelFilesError(f"{folder} is not a folder")
    _read_json(folder, "config.json")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return check_safetensors(single)
    if index.is_file():
        return sum(check_safetensors(path) for path in _shards(folder, index.name))
    pickle, pickle_index = folder / "pytorch_model.bin", folder / "pytorch_model.bin.index.json"
    if not (pickle.is_file() or pickle_index.is_file()):
        raise _nothing(folder)
    paths = [pickle] if pickle.is_file() else _shards(folder, pickle_index.name)
    if not allow_pickle:
        raise ModelFilesError(
            f"{folder} holds only pickled weights ({paths[0].name})",
            why="loading a pickle can run any code",
            fix="take a model with safetensors, or, if you trust where it came from, add --allow-pickle",
        )
    return sum(_check_pickle(path) for path in paths)


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that loading `folder` would read; an empty list where there are none, or not all."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            try:
                return _shards(folder, index)
            except ModelFilesError:
                return []
    return []


def has_tokenizer(folder: Path) -> bool:
    """Whether any file is there that a tokenizer is made of."""
    return any((folder / name).is_file() for name in _TOKENIZERS)


def check_safetensors(path: Path) -> int:
    """The size of `path`, when it is exactly as long as its header says.

    Raises:
        ModelFilesError: cut off, damaged, or the placeholder that git leaves for a large file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if head == b"version ":
            raise ModelFilesError(
                f"{path.name} is a git-lfs placeholder, not the weights", fix=f"`git lfs pull` in {path.parent}"
            )
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise _truncated(path, size, "its header is longer than the file" if size else "it is empty")
        try:
            header: Any = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise _truncated(path, size, f"its header cannot be read ({error})") from error
    if size != expected:
        raise _truncated(
            path, size, f"its header announces {human_bytes(expected)} ({expected - size:+d} bytes missing)"
        )
    return size


def _truncated(path: Path, size: int, why: str) -> ModelFilesError:
    return ModelFilesError(
        f"{path.name} in {path.parent} is damaged or cut off at {human_bytes(size)}",
        why=why,
        fix="copy or download it again",
    )


def _shards(folder: Path, index: str) -> list[Path]:
    """The files that an index names, all of them there and inside `folder`."""
    try:
        names = sorted(set(_read_json(folder, index)["weight_map"].values()))
    except (KeyError, AttributeError, TypeError) as error:
        raise ModelFilesError(f"{folder / index} has no weight_map", why="it is no index of weights") from error
    missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if missing or not names:
        raise ModelFilesError(
            f"{len(missing)} of the {len(names)} files of weights are missing from {folder}",
            why=f"{index} names {', '.join(missing[:3])}",
            fix="copy or download the rest",
        )
    return [folder / name for name in names]


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise _nothing(folder)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFilesError(f"{path} is not JSON", why=str(error), fix="copy or download it again") from error
    if not isinstance(record, dict):
        raise ModelFilesError(f"{path} is not a JSON object", fix="copy or download it again")
    return record


def _check_pickle(path: Path) -> int:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(2)
    if head not in (b"PK", b"\x80\x02"):  # torch's zip since 1.6, and the bare pickle before it
        raise _truncated(path, size, f"it begins with {head!r}, which torch never writes")
    return size


def _nothing(folder: Path) -> ModelFilesError:
    """What is wrong with a folder that transformers cannot load, and what it holds instead."""
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    held = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    missing = "weights" if (folder / "config.json").is_file() else "config.json"
    if ggufs := [name for name in names if name.endswith(".gguf")]:
        fix = f"load the file itself: {folder / ggufs[0]}"
    elif "adapter_config.json" in names:
        fix = "this is an adapter (LoRA): load the model it was made for"
    elif any(name in _OTHER_FORMATS for name in names):
        fix = "these are TensorFlow, Flax or Rust weights: take a version with safetensors"
    elif missing == "weights" and (single := [name for name in names if name.endswith((".pt", ".safetensors"))]):
        from kani_nb.engines.gptq_checkpoint import refuse_or_explain

        fix = refuse_or_explain(folder / single[0]).fix
    else:
        inner = [name for name in names if name.endswith("/") and (folder / name / "config.json").is_file()]
        fix = (
            f"did you mean {folder / inner[0].rstrip('/')}?" if inner else "name the folder that save_pretrained wrote"
        )
    return ModelFilesError(f"{folder} has no {missing}", why=f"it holds {held or 'nothing'}", fix=fix)
