"""The limits a container sets: memory and CPU time of this process's control group, version 2 or 1.

Inside a container the machine's own totals are what others see, not what may be used. Only reads; None is "no limit".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: Version 1 writes "no limit" as the largest multiple of a page.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True, slots=True)
class CgroupLimits:
    """What this process's control groups allow.

    Attributes:
        memory_bytes: the lowest limit on the way to the root.
        memory_free_bytes: what is left below it, file cache that can be dropped counted as free.
        cpus: CPU time per time, for example 1.5.
    """

    memory_bytes: int | None = None
    memory_free_bytes: int | None = None
    cpus: float | None = None


def read_limits(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> CgroupLimits:
    """The limits of the groups that `membership` names, under `root`. Nothing where there are none (macOS, Windows)."""
    memory: list[tuple[int, int]] = []
    cpus: list[float] = []
    for folder in _folders(root, membership):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit is not None and limit < _NO_LIMIT:
            used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
            droppable = _field(folder / "memory.stat", ("inactive_file", "total_inactive_file"))
            memory.append((limit, max(0, limit - used + droppable)))
        quota = _quota(folder)
        if quota is not None:
            cpus.append(quota)
    return CgroupLimits(
        memory_bytes=min((limit for limit, _ in memory), default=None),
        memory_free_bytes=min((free for _, free in memory), default=None),
        cpus=min(cpus, default=None),
    )


def _folders(root: Path, membership: Path) -> Iterator[Path]:
    """Each group's folder and those above it. A path that only the host can see falls back to the root."""
    seen: set[Path] = set()
    for line in _text(membership).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        bases = [root] if not controllers else [root / controllers, *(root / each for each in controllers.split(","))]
        for base in bases:
            folder = base / path.lstrip("/")
            for each in (folder, *folder.parents):
                if each in seen or not each.is_relative_to(base):
                    continue
                seen.add(each)
                if each.is_dir():
                    yield each


def _quota(folder: Path) -> float | None:
    words = _text(folder / "cpu.max").split()
    if len(words) == 2:
        quota, period = words
    else:
        quota, period = (_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    try:
        share = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return None
    return share if share > 0 else None


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _field(path: Path, names: tuple[str, ...]) -> int:
    found = dict(line.split(maxsplit=1) for line in _text(path).splitlines() if " " in line)
    return max((int(found[name]) for name in names if found.get(name, "").isdigit()), default=0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # not there, or not ours to read: no limit that we could know
        return ""
