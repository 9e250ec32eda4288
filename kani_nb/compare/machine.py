"""The machine that a comparison runs on: its name and versions, memory in use now, and who else keeps it busy.

Only looks. What is measured of an answer itself is `conversation.round`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from kani_nb.config import EngineConfig
from kani_nb.hardware.devices import allowed_cpus, best_device, choose_threads, list_devices
from kani_nb.metrics.comparison import Environment
from kani_nb.metrics.sampler import MemorySampler

_LIBRARIES = ("torch", "transformers", "accelerate", "bitsandbytes")


@dataclass(frozen=True, slots=True)
class MemoryInUse:
    """Bytes in use at one moment.

    Attributes:
        total_bytes: what the allocators of the CUDA devices gave out, else the process's resident memory.
        source: `cuda` or `rss`.
        allocated_bytes: what is allocated, without what an allocator keeps for later: on a GPU the same, else what the
            C library says of its heap; None where it says nothing.
    """

    total_bytes: int
    source: str
    allocated_bytes: int | None


def memory_in_use(devices: Iterable[str]) -> MemoryInUse:
    """What is in use on `devices` now, all of them together."""
    total, source = 0, "rss"
    for device in devices:
        # A reading of the same instrument that watches the answers, so that both can be subtracted.
        with MemorySampler(device, interval_s=60) as sampler:
            pass
        total, source = total + sampler.series[-1][1], sampler.peak_source
    return MemoryInUse(total, source, total if source == "cuda" else heap_bytes())


def memory_without_leftovers(devices: Iterable[str]) -> MemoryInUse:
    """`memory_in_use` when what nobody uses is given back: an allocator's free pages would hide the next model's."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a libc without malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
    return memory_in_use(devices)


def heap_bytes() -> int | None:
    """Bytes that are allocated from the C library and not freed; None where it does not say (glibc from 2.33 does).

    Steadier than resident memory: glibc keeps up to 64 MiB of freed memory at the top of each thread's arena.
    """
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (OSError, AttributeError, TypeError):
        return None
    mallinfo2.restype = _MallInfo
    found = mallinfo2()
    return int(found.uordblks) + int(found.hblkhd)


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h: `uordblks` is in the arenas, `hblkhd` mapped by itself."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def devices_of(config: EngineConfig) -> tuple[str, ...]:
    """The devices whose memory is watched: the one that was named, or every CUDA device the model may lie on."""
    if config.device is not None:
        return (f"{config.device}:0" if config.device == "cuda" else config.device,)
    best = best_device()
    if not best.startswith("cuda"):
        return (best,)
    return tuple(each.name for each in list_devices() if each.name.startswith("cuda"))


def environment(devices: tuple[str, ...], threads: int, beside: tuple[str, ...]) -> Environment:
    """What a reader must know of this machine to repeat the figures. Loads torch."""
    import kani_nb

    versions = {"kani_nb": kani_nb.__version__, "Python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    described = {each.name: each.description for each in list_devices()}
    described["cpu"] = _cpu_name()
    return Environment(
        versions=versions,
        machine=" + ".join(f"{device} ({described.get(device, 'unknown')})" for device in devices),
        cpus=len(allowed_cpus()),
        threads=threads,
        load_average=load_average(),
        beside=beside,
    )


def _cpu_name() -> str:
    """The processor's product name, where the system says it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:  # noqa: PTH123 - read line by line
            for line in lines:
                if line.lower().startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def threads_for(config: EngineConfig) -> int:
    """CPU threads of every case: as asked for, or chosen once, since a choice for each would compare the choices."""
    return choose_threads(config.threads).threads


def load_average() -> float | None:
    """Processes that ran or wanted to, on average over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


class OthersCpus:
    """How many CPUs everything but this process keeps busy, from the making of it to `measured`."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._busy_s, self._own_s = _busy_s(), _own_s()

    def measured(self) -> float | None:
        """The mean since it was made; None where nothing can be read from so short a time."""
        took = time.perf_counter() - self._began
        if took < 0.2:  # the system counts in hundredths of a second
            return None
        return max(0.0, (_busy_s() - self._busy_s) - (_own_s() - self._own_s)) / took


def _busy_s() -> float:
    """Seconds that the CPUs of this process have worked since the system started."""
    import psutil

    counted = psutil.cpu_times(percpu=True)
    chosen = [counted[cpu] for cpu in allowed_cpus() if cpu < len(counted)]
    return float(sum(sum(times[:]) - times.idle - getattr(times, "iowait", 0.0) for times in chosen))


def _own_s() -> float:
    import psutil

    own = psutil.Process().cpu_times()
    return float(own.user + own.system)
