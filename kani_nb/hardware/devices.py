"""What can compute here, what memory it has, and how many CPU threads a generation should use.

Memory and CPUs are those this process may use, not the machine's: affinity and container limits count. Only looks,
decides nothing about models; torch is imported when a device other than the CPU is asked for.
"""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from kani_nb.errors import ConfigError
from kani_nb.hardware.cgroup import read_limits

_TOPOLOGY = Path("/sys/devices/system/cpu")
#: Idle time short of a whole core that still counts as one: the sampling itself, and the front end, take some.
_ALMOST_A_CORE = 0.3


@dataclass(frozen=True, slots=True)
class Device:
    """One device, as torch names it.

    Attributes:
        name: `cpu`, `cuda:0`, `mps`.
        description: the product's name.
        total_bytes: its memory, as far as this process may use it.
        free_bytes: what of that was free when it was asked.
        compute_capability: of a CUDA device, for example `(8, 0)`.
    """

    name: str
    description: str
    total_bytes: int
    free_bytes: int
    compute_capability: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ThreadChoice:
    """How many threads, and why, in words."""

    threads: int
    reason: str


def list_devices() -> tuple[Device, ...]:
    """Every device that torch can use here, the CPU last. Loads torch."""
    import torch

    found: list[Device] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            capability = None if torch.version.hip else (properties.major, properties.minor)
            found.append(Device(f"cuda:{index}", properties.name, int(total), int(free), capability))
    if torch.backends.mps.is_available():
        total = int(torch.mps.recommended_max_memory())
        free = max(0, total - int(torch.mps.driver_allocated_memory()))
        found.append(Device("mps", f"Apple {platform.machine()}", total, free))
    total, free = cpu_memory()
    found.append(Device("cpu", platform.processor() or platform.machine(), total, free))
    return tuple(found)


def best_device() -> str:
    """The device to load on where none was asked for: the CUDA device with most free memory, MPS, or the CPU."""
    devices = list_devices()
    cuda = [device for device in devices if device.name.startswith("cuda")]
    return max(cuda, key=lambda device: device.free_bytes).name if cuda else devices[0].name


def free_bytes(device: str) -> int:
    """Memory of `device` that can be allocated now. Loads torch for devices other than the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if device in ("cpu", "meta"):  # what is offloaded to disk is computed on the CPU
        return cpu_memory()[1]
    wanted = {"cuda": "cuda:0", "mps:0": "mps"}.get(device, device)
    devices = list_devices()
    for each in devices:
        if each.name == wanted:
            return each.free_bytes
    known = ", ".join(each.name for each in devices)
    raise ConfigError(f"there is no device {device!r} here", why=f"torch sees {known}")


def cpu_memory() -> tuple[int, int]:
    """Total and available bytes of main memory for this process, container limits included."""
    import psutil

    memory = psutil.virtual_memory()
    limits = read_limits()
    total = min(memory.total, limits.memory_bytes or memory.total)
    available = (
        memory.available if limits.memory_free_bytes is None else min(memory.available, limits.memory_free_bytes)
    )
    return int(total), int(available)


def allowed_cpus() -> tuple[int, ...]:
    """The logical CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def physical_cores(cpus: tuple[int, ...] | None = None, topology: Path = _TOPOLOGY) -> int:
    """Physical cores behind `cpus` (those of this process by default): two hyperthreads share one."""
    cpus = allowed_cpus() if cpus is None else cpus
    cores: set[str] = set()
    for cpu in cpus:
        try:
            cores.add((topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:  # not Linux, or hidden from the container
            import psutil

            logical, physical = psutil.cpu_count() or len(cpus), psutil.cpu_count(logical=False) or len(cpus)
            return max(1, min(len(cpus), round(len(cpus) * physical / logical)))
    return max(1, len(cores))


def idle_cpus(cpus: tuple[int, ...] | None = None, sample_s: float = 0.1) -> float:
    """How many of `cpus` were idle over the next `sample_s` seconds, for example 1.7. Blocks that long."""
    import psutil

    cpus = allowed_cpus() if cpus is None else cpus
    busy: list[float] = psutil.cpu_percent(interval=sample_s, percpu=True)
    return sum(max(0.0, 100.0 - busy[cpu]) / 100 for cpu in cpus if cpu < len(busy))


def choose_threads(requested: int | None = None, *, sample_s: float = 0.1) -> ThreadChoice:
    """CPU threads for a generation on this machine as it is now. Blocks for `sample_s`, unless told.

    One busy-waiting OpenMP thread too many makes all of them wait for a core: two on two shared cores were seen five
    times slower than one. So: physical cores of the affinity mask, at most the container's CPU quota, at most what is
    idle, at least one.

    Args:
        requested: the user's own choice, which is taken; so is `OMP_NUM_THREADS`.
        sample_s: how long to watch the CPUs' load.
    """
    if requested is not None:
        return ThreadChoice(requested, "as asked for")
    named = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if named.isdigit() and int(named) > 0:
        return ThreadChoice(int(named), "OMP_NUM_THREADS says so")
    cpus = allowed_cpus()
    cores = physical_cores(cpus)
    return limited_threads(cores, len(cpus), read_limits().cpus, idle_cpus(cpus, sample_s))


def limited_threads(cores: int, cpus: int, quota: float | None, idle: float) -> ThreadChoice:
    """The choice for `cores` physical cores behind `cpus` logical ones, a CPU quota, and `idle` CPUs."""
    limits = [(cores, f"{cores} physical core{'s' * (cores != 1)}" + (f" ({cpus} CPUs)" if cpus != cores else ""))]
    if quota is not None:
        limits.append((max(1, math.floor(quota)), f"a container's quota of {quota:g} CPUs"))
    limits.append((max(1, math.floor(idle + _ALMOST_A_CORE)), f"{idle:.1f} CPUs idle"))
    limits.sort(key=lambda limit: limit[0])  # the narrowest first: it decides
    return ThreadChoice(limits[0][0], ", ".join(words for _, words in limits))
