"""Quantized copies of models, kept in our cache: loading one takes no second quantization, nor the memory of it.

A copy is known by what it was made from: which files (a Hub commit, or paths with sizes and times), which scheme with
which settings, which dtype, and which versions of the libraries that quantize. Whoever has the same all over gets the
copy; anything else is another copy. Nothing here loads, quantizes or saves a model: the saving is handed in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kani_nb.engines.sources_cache import cache_folder
from kani_nb.engines.staging import folder_bytes, staged_folder
from kani_nb.engines.wheel_model import STAMP, read_stamp
from kani_nb.errors import ConfigError, ModelFilesError
from kani_nb.quantization import Quantization

#: Raised when copies would be made differently; older ones are then no longer found.
_FORMAT = 1
_LIBRARIES = ("bitsandbytes", "transformers", "torch", "gptqmodel", "optimum")
_SOURCES = ("*.safetensors", "*.json", "*.bin", "*.gguf", "*.jinja", "*.model", "*.txt")
_RECORD = "copy_of"


@dataclass(frozen=True, slots=True)
class CopyKey:
    """What a copy is made from.

    Attributes:
        name: of the model, for people.
        scheme: the quantization's label, for people.
        identity: everything that makes another copy when it changes, as JSON.
    """

    name: str
    scheme: str
    identity: str

    @property
    def folder(self) -> Path:
        """Where the copy lies, or will."""
        digest = hashlib.sha256(self.identity.encode()).hexdigest()[:12]
        words = [re.sub(r"[^a-z0-9.]+", "-", each.lower()).strip("-.") for each in (self.name, self.scheme)]
        return copies_folder() / "-".join([*(word[:48] for word in words if word), digest])


@dataclass(frozen=True, slots=True)
class QuantizedCopy:
    """A copy on this disk: the model's name, its scheme, its folder, its bytes, and which weights these are."""

    name: str
    scheme: str
    folder: Path
    size_bytes: int
    origin: str


def copies_folder() -> Path:
    """The folder of all copies; it may not exist yet."""
    return cache_folder() / "quantized"


def copy_key(
    folder: Path, settings: Quantization, dtype: str, *, name: str, device: str = "cpu", model_cls: type | None = None
) -> CopyKey:
    """What a copy of the model in `folder` would be known by; reads no weights.

    Args:
        folder: the model's files.
        settings: the scheme and its settings.
        dtype: the name of the dtype that the rest of the weights is held in.
        name: of the model, for people.
        device: the kind of device that quantizes; kernels of another one may round differently.
        model_cls: that loads it, instead of the usual one.
    """
    record = {
        "format": _FORMAT,
        "source": _source(folder),
        "model_cls": None if model_cls is None else f"{model_cls.__module__}.{model_cls.__qualname__}",
        "settings": asdict(settings),
        "dtype": dtype,
        "device": device.partition(":")[0],
        "versions": {library: _version(library) for library in _LIBRARIES},
    }
    bare = name.rstrip("/\\").replace("\\", "/").rpartition("/")[2] or name
    return CopyKey(bare, settings.label, json.dumps(record, sort_keys=True))


def find_copy(key: CopyKey) -> Path | None:
    """The folder of the copy, when it is there and whole; reads one small file and the sizes of the others."""
    return key.folder if _is_whole(key.folder, key.identity) else None


def keep_copy(
    key: CopyKey, save: Callable[[Path], object], *, waiting: Callable[[float], object] | None = None
) -> Path:
    """The folder of the copy, made now by `save` when it is not there. Two processes at once make it once.

    Blocks.

    Args:
        key: what it is made from.
        save: is given an empty folder, and fills it or raises; then nothing is kept.
        waiting: called three times a second with the seconds waited while another process makes it; may raise.

    Raises:
        EngineError: the disk is full; what else `save` raises.
        ConfigError: the cache cannot be written.
    """
    if found := find_copy(key):
        return found
    with _only_one(key.folder, waiting):
        if found := find_copy(key):  # the other process made it while this one waited
            return found
        if key.folder.exists():
            _remove(key.folder)
        try:
            with staged_folder(key.folder) as work:
                save(work)
                _stamp(key, work)
        except ConfigError:
            if find_copy(key) is None:  # otherwise another process was faster where there are no locks
                raise
    return key.folder


def list_copies() -> list[QuantizedCopy]:
    """Every copy on this disk, by name and scheme, whether or not it would still be found by what is installed."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for folder in copies_folder().iterdir():
            stamp = read_stamp(folder) or {}
            record = stamp.get(_RECORD)
            if isinstance(record, dict) and not folder.name.startswith("."):
                size = folder_bytes(folder)
                found.append(
                    QuantizedCopy(
                        str(record["name"]), str(record["scheme"]), folder, size, str(stamp.get("origin", ""))
                    )
                )
    return sorted(found, key=lambda each: (each.name.lower(), each.scheme, each.folder.name))


def delete_copy(copy: QuantizedCopy | Path | str) -> int:
    """Delete a copy, given as listed, as its folder or as its folder's name; the bytes that this frees.

    Raises:
        ConfigError: there is no such copy.
        ModelFilesError: the system does not let go of its files.
    """
    given = copy.folder if isinstance(copy, QuantizedCopy) else Path(copy)
    known = {each.folder.name: each for each in list_copies()}
    found = known.get(given.name)
    if found is None or given not in (found.folder, Path(given.name)):
        raise ConfigError(
            f"there is no quantized copy {str(copy)!r}", fix=f"there are {', '.join(known)}" if known else ""
        )
    with _only_one(found.folder):
        _remove(found.folder)
    return found.size_bytes


def _source(folder: Path) -> object:
    """What names the files of a model: the Hub's commit, or where they are, how large, and when they were written."""
    folder = folder.absolute()
    if folder.parent.name == "snapshots":
        return [folder.parent.parent.name, folder.name]
    files = sorted({path for pattern in _SOURCES for path in folder.glob(pattern) if path.is_file()})
    return [str(folder), [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]]


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _stamp(key: CopyKey, work: Path) -> None:
    """Add to what the saving wrote about the folder what it is a copy of."""
    stamp = read_stamp(work) or {}
    stamp[_RECORD] = {"name": key.name, "scheme": key.scheme, "identity": key.identity}
    stamp["files"] = {path.name: path.stat().st_size for path in work.iterdir() if path.name != STAMP}
    (work / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")


def _is_whole(folder: Path, identity: str) -> bool:
    stamp: dict[str, Any] = read_stamp(folder) or {}
    record, files = stamp.get(_RECORD), stamp.get("files")
    if not isinstance(record, dict) or record.get("identity") != identity or not isinstance(files, dict):
        return False
    try:
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


def _remove(folder: Path) -> None:
    """Delete `folder`, out of sight at once: a process that looks for it finds all of it or nothing."""
    hidden = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.deleted")
    try:
        folder.rename(hidden)
    except OSError as error:
        raise ModelFilesError(f"{folder} could not be deleted", why=str(error), fix="unload it first") from error
    for each in (hidden, *folder.parent.glob(".*.deleted")):
        shutil.rmtree(each, ignore_errors=True)


@contextlib.contextmanager
def _only_one(folder: Path, waiting: Callable[[float], object] | None = None) -> Iterator[None]:
    """Hold the lock of a copy; the operating system drops that of a process that died.

    Where a file system has no locks, two processes may make it twice, and the second keeps the first one's.
    """
    import filelock

    started = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.with_name(f"{folder.name}.lock"))
        while not lock.is_locked:
            try:
                lock.acquire(timeout=0.3)
            except filelock.Timeout:
                if waiting is not None:
                    waiting(time.monotonic() - started)
    except NotImplementedError:
        yield
        return
    except OSError as error:
        raise ConfigError(
            f"{folder.parent} cannot be written", why=str(error), fix="point KANI_NB_CACHE at a folder of your own"
        ) from error
    try:
        yield
    finally:
        lock.release()
