"""Memory while something runs: the allocator's peak on a GPU, the process's resident memory elsewhere.

A daemon thread reads it twenty times a second and is gone when the context is left. Nothing here draws or keeps
records.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_SERIES_LIMIT = 600
_STATM = Path("/proc/self/statm")


class MemorySampler:
    """A context that watches memory.

    Args:
        device: `cpu`, `cuda`, `cuda:1`, `mps`: whose memory.
        interval_s: time between two readings.

    Attributes:
        peak_source: `cuda` (the allocator's own peak, which no reading can miss) or `rss` (highest reading).
        device_total_peak_bytes: highest use of the whole GPU by all processes (NVML), or None where that is not known.
    """

    def __init__(self, device: str = "cpu", interval_s: float = 0.05) -> None:
        self.device = device
        self.interval_s = interval_s
        self.peak_source = "cuda" if _has_cuda(device) else "rss"
        self.device_total_peak_bytes: int | None = None
        self._highest = 0
        self._series: list[tuple[float, int]] = []
        self._stride = 1
        self._readings = 0
        self._leave = threading.Event()
        self._has_left = threading.Event()
        self._thread: threading.Thread | None = None
        self._nvml: _Nvml | None = None
        self._started_at = 0.0

    @property
    def peak_bytes(self) -> int:
        """The highest seen so far; of what, says `peak_source`."""
        return self._highest

    @property
    def series(self) -> list[tuple[float, int]]:
        """`(seconds since the start, bytes)`, oldest first; at most 600, evenly thinned. Safe from any thread."""
        return list(self._series)

    def __enter__(self) -> Self:
        """Start reading."""
        if self.peak_source == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self.device)
            self._nvml = _Nvml.open(torch.device(self.device).index or 0)
        self._leave.clear()
        self._has_left.clear()
        self._started_at = time.perf_counter()
        self._read()
        self._thread = threading.Thread(target=self._watch, name="kani-nb-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Take a last reading and end the thread."""
        self._leave.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            # An interrupt inside a long `join` corrupts the thread's record on CPython up to 3.12; not inside `wait`.
            self._has_left.wait(timeout=5)
            thread.join(timeout=1)
        self._read()
        if self._nvml is not None:
            self._nvml.close()
            self._nvml = None

    def _watch(self) -> None:
        while not self._leave.wait(self.interval_s):
            self._read()
        self._has_left.set()

    def _read(self) -> None:
        if self.peak_source == "cuda":
            import torch

            current = int(torch.cuda.memory_allocated(self.device))
            self._highest = max(self._highest, current, int(torch.cuda.max_memory_allocated(self.device)))
            if self._nvml is not None:
                self.device_total_peak_bytes = max(self.device_total_peak_bytes or 0, self._nvml.used_bytes())
        else:
            current = resident_bytes()
            self._highest = max(self._highest, current)
        if self._readings % self._stride == 0:
            self._series.append((time.perf_counter() - self._started_at, current))
            if len(self._series) >= _SERIES_LIMIT:
                self._series = self._series[::2]
                self._stride *= 2
        self._readings += 1


def resident_bytes() -> int:
    """Resident memory of this process, in bytes."""
    if sys.platform == "linux":
        import resource

        return int(_STATM.read_bytes().split()[1]) * resource.getpagesize()
    import psutil

    return int(psutil.Process().memory_info().rss)


def _has_cuda(device: str) -> bool:
    if not device.startswith("cuda"):
        return False
    import torch

    return bool(torch.cuda.is_available())


class _Nvml:
    """The driver's own count of one GPU's memory, where its Python binding is installed and works."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library = library
        self._handle = handle

    @classmethod
    def open(cls, index: int) -> _Nvml | None:
        """The device with CUDA's number `index`, matched by its UUID; None where there is no NVML."""
        try:
            import pynvml
        except ImportError:
            return None
        import torch

        try:
            pynvml.nvmlInit()
            uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
            handle = (
                pynvml.nvmlDeviceGetHandleByIndex(index)
                if uuid is None
                else pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
            )
        except pynvml.NVMLError:
            return None
        return cls(pynvml, handle)

    def used_bytes(self) -> int:
        """Bytes in use on the device, by all processes."""
        return int(self._library.nvmlDeviceGetMemoryInfo(self._handle).used)

    def close(self) -> None:
        """Let the driver go."""
        self._library.nvmlShutdown()
