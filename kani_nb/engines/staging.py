"""Folders that appear whole or not at all: written beside their place under a hidden name, and put there at the end.

It knows nothing of models. Whoever writes is given an empty folder; when that fails, is interrupted or finds the disk
full, nothing of it stays. A process that was killed leaves the hidden folder behind, and the next one removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from kani_nb.engines.sources_cache import existing_parent, free_bytes, human_bytes, is_disk_full
from kani_nb.errors import ConfigError, EngineError, KaniNbError

#: Put in its place last: without it, no library takes the folder for a model.
_LAST = "config.json"


def check_empty(folder: Path) -> None:
    """Refuse a place where something is already.

    Raises:
        ConfigError: it is a file, or a folder that holds anything; says what.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file", why="a model is saved as a folder", fix="name a folder that is new")
    _remove_leftovers(folder, "")
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    if names:
        held = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ConfigError(
            f"{folder} is not empty",
            why=f"it holds {held}, and nothing is overwritten",
            fix=f"name a new folder, for example {_free_name(folder)}",
        )


@contextlib.contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write into, which becomes `folder` when the block ends well; otherwise all of it is removed.

    A folder that exists already is filled, not replaced: it may be someone's current folder, or lie where nothing
    else may be made. What makes it a model, `config.json`, is then put there last.

    Raises:
        ConfigError: something is there already, or is written there at this moment; or it cannot be written.
        EngineError: the disk is full.
    """
    folder = folder.expanduser().absolute()
    check_empty(folder)
    made = _missing(folder.parent)
    work = None
    try:
        work = _make_work_folder(folder)
        with _disk_errors(folder):
            yield work
            _make_ordinary(work)
            _flush(work)
            if folder.exists():
                _fill(folder, work)
            else:
                _rename(work, folder)
    except BaseException:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # someone else has put something there meanwhile
                parent.rmdir()
        raise
    _flush_folder(folder.parent)


def require_space(folder: Path, needed_bytes: int) -> None:
    """Refuse before the first byte when `needed_bytes` do not fit on the disk of `folder`.

    Raises:
        EngineError: with both numbers.
    """
    free = free_bytes(folder)
    if free < needed_bytes:
        raise EngineError(
            f"saving into {folder} needs {human_bytes(needed_bytes)}",
            why=f"{human_bytes(free)} are free on that disk",
            fix="free some space, or name a folder on a larger disk",
        )


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in `folder`."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _free_name(folder: Path) -> Path:
    number = 2
    while (name := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    return name


def _missing(folder: Path) -> list[Path]:
    """The folders on the way that are not there yet, the innermost first."""
    present = existing_parent(folder)
    return [each for each in (folder, *folder.parents) if each != present and present in each.parents]


def _mark(name: str) -> str:
    host = re.sub(r"[^\w-]", "_", socket.gethostname())
    return f".{name}{'.' if name else ''}saving-{host}-"


def _this_process() -> str:
    """Number and beginning: a container that is started again has the same numbers."""
    import psutil

    return f"{os.getpid()}-{psutil.Process().create_time():.0f}"


def _make_work_folder(folder: Path) -> Path:
    """A new hidden folder on the same disk, in `folder` where that exists and else beside it."""
    inside = folder.exists()
    parent, name = (folder, "") if inside else (folder.parent, folder.name)
    work = parent / f"{_mark(name)}{_this_process()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(parent, name)
        work.mkdir()
    except OSError as error:
        if work.is_dir():
            why, fix = f"{work.name} is there", "wait for it, or name another folder"
            raise ConfigError(f"{folder} is being saved at this moment", why=why, fix=fix) from None
        raise ConfigError(f"{folder} cannot be written", why=str(error), fix="name a folder of your own") from error
    return work


def _remove_leftovers(parent: Path, name: str) -> None:
    """Remove what processes of this machine left behind that are no more."""
    import psutil

    mark = _mark(name)
    with contextlib.suppress(OSError):
        for path in list(parent.iterdir()):
            words = re.fullmatch(r"(\d+)-(\d+)", path.name.removeprefix(mark))
            if words is None or not path.name.startswith(mark):
                continue
            try:
                is_theirs = f"{psutil.Process(int(words[1])).create_time():.0f}" == words[2]
            except psutil.NoSuchProcess:
                is_theirs = False
            if not is_theirs:
                shutil.rmtree(path, ignore_errors=True)


def _rename(path: Path, target: Path) -> None:
    """Put `path` where nothing is yet, or only an empty folder."""
    if target.is_file():
        raise _taken(target)
    try:
        path.rename(target)
    except OSError as error:
        if not target.exists():
            raise
        raise _taken(target) from error


def _taken(target: Path) -> ConfigError:
    return ConfigError(
        f"{target} was written by someone else meanwhile", why="nothing is overwritten", fix="name another folder"
    )


def _make_ordinary(folder: Path) -> None:
    """Give every file the mode that this user's new files have; safetensors are written readable for the owner only."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _fill(folder: Path, work: Path) -> None:
    """Move everything from `work` within `folder` up, what makes it a model last; or nothing."""
    moved: list[Path] = []
    try:
        for path in sorted(work.iterdir(), key=lambda each: each.name == _LAST):
            _rename(path, folder / path.name)
            moved.append(folder / path.name)
    except BaseException:
        for path in moved:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    work.rmdir()
    _flush_folder(folder)


def _flush(folder: Path) -> None:
    """Put everything safely on the disk, so that no rename comes there before what it names."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "posix":
        with contextlib.suppress(OSError):  # file systems that have no such thing
            handle = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """What a disk says, in our words. Writers of weights raise errors of their own around it."""
    try:
        yield
    except KaniNbError:
        raise
    except Exception as error:
        if is_disk_full(error):
            free = human_bytes(free_bytes(folder))
            raise EngineError(
                f"the disk of {folder} is full",
                why=f"{free} are free now ({error}); nothing half-written was kept",
                fix="free some space, or name a folder on a larger disk",
            ) from error
        if isinstance(error, OSError):
            raise EngineError(f"{folder} could not be written", why=str(error)) from error
        raise
