"""Where model files lie on disk, whether there is room for more, and how a long fetch is told and stopped.

`KANI_NB_CACHE` moves our folder; the Hugging Face Hub's cache is shared with every other program that uses it, and
found by its own variables. The environment is read when asked, so that a variable set in a cell counts. Nothing
here downloads.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import time
from pathlib import Path

from kani_nb.engines.base import LoadProgress, ProgressCallback
from kani_nb.errors import ModelUnavailableError

#: Left free on a disk after everything announced has been written.
SPARE_BYTES = 64 * 1024**2


def cache_folder() -> Path:
    """The folder of our own converted models and unfinished downloads; it may not exist yet."""
    if chosen := os.environ.get("KANI_NB_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "kani_nb" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "kani_nb"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kani_nb"


def hub_home() -> Path:
    """Hugging Face's own folder, which holds the saved login and, by default, the cache."""
    if chosen := os.environ.get("HF_HOME"):
        return Path(os.path.expandvars(chosen)).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "huggingface"


def hub_cache_folder() -> Path:
    """The Hugging Face Hub's cache, found the way its own library finds it; it may not exist yet."""
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(chosen)).expanduser() if chosen else hub_home() / "hub"


def existing_parent(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that holds `folder`, which need not exist yet."""
    return shutil.disk_usage(existing_parent(folder)).free


def is_writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, or it can be made."""
    return os.access(existing_parent(folder), os.W_OK | os.X_OK)


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse before the first byte when `needed_bytes` do not fit.

    Raises:
        ModelUnavailableError: too little is free, with both numbers; or the folder cannot be written.
    """
    if not is_writable(folder):
        raise ModelUnavailableError(
            f"{purpose} needs to write into {folder}",
            why="that folder is not writable",
            fix="point KANI_NB_CACHE and HF_HOME at folders of your own",
        )
    free = free_bytes(folder)
    if free < needed_bytes + SPARE_BYTES:
        raise ModelUnavailableError(
            f"{purpose} needs {human_bytes(needed_bytes)}",
            why=f"{human_bytes(free)} are free on the disk of {folder} ({human_bytes(SPARE_BYTES)} stay spare)",
            fix="free some space, or point KANI_NB_CACHE and HF_HOME at a larger disk",
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that no more can be written: disk, quota, or the largest file allowed."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in codes:
        return True
    # Writers in Rust (safetensors) pass the operating system's number only inside their text.
    return any(f"(os error {code})" in str(error) for code in codes)


def human_bytes(count: float) -> str:
    """`count` bytes as a person reads them, in decimal units as disks and downloads are sold."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.{1 if count < 100 * size else 0}f} {unit}"
    return f"{count:.0f} bytes"


def human_seconds(seconds: float) -> str:
    """`seconds` as a person reads them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Fetch:
    """One long fetch: tells its progress, and knows when it should end.

    `say` and `say_bytes` call the caller's `progress` on the calling thread, bytes at most five times a second.
    """

    def __init__(
        self,
        subject: str,
        progress: ProgressCallback | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        self.subject = subject
        self.cancelled = cancelled or threading.Event()
        self._progress = progress
        self._told_at = 0.0
        self._counting = ""
        self._rate_from: tuple[float, int] = (0.0, 0)

    def say(self, stage: str, detail: str = "", fraction: float | None = None) -> None:
        """Tell one step."""
        self.check()
        if self._progress is not None:
            self._progress(LoadProgress(stage, detail, fraction))

    def say_bytes(self, stage: str, what: str, done: int, total: int) -> None:
        """Tell how many of `total` bytes are there, how fast they come, and the time left."""
        self.check()
        now = time.monotonic()
        if self._counting != stage + what:
            self._counting, self._told_at, self._rate_from = stage + what, 0.0, (now, done)
        elif self._rate_from[1] == 0:  # the wait for the first byte is no speed
            self._rate_from = (now, done)
        if now - self._told_at < 0.2 and done < total:
            return
        self._told_at = now
        detail = f"{what}: {human_bytes(done)} of {human_bytes(total)}"
        elapsed, gained = now - self._rate_from[0], done - self._rate_from[1]
        if gained > 0 and elapsed > 0.2 and done < total:
            rate = gained / elapsed
            detail += f", {human_bytes(rate)}/s, {human_seconds((total - done) / rate)} left"
        if self._progress is not None:
            self._progress(LoadProgress(stage, detail, min(1.0, done / total) if total else None))

    def check(self) -> None:
        """End here when the caller asked for it.

        Raises:
            ModelUnavailableError: `cancelled` is set.
        """
        if self.cancelled.is_set():
            raise ModelUnavailableError(
                f"{self.subject}: interrupted",
                why="what was fetched so far is kept",
                fix="run it again to go on from there",
            )

    def pause(self, seconds: float) -> None:
        """Wait, or end at once when cancelled."""
        self.cancelled.wait(seconds)
        self.check()
