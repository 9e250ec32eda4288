"""How fast a device's memory is read: what a token costs at least, since each token reads every weight once.

Main memory is measured, a card's is computed from its clock and bus, or looked up by its name. Nothing is kept: a
caller that needs the figure twice keeps it.
"""

from __future__ import annotations

import ctypes
import itertools
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kani_nb.hardware.cards import known_card
from kani_nb.hardware.devices import Device, physical_cores

_MIB = 2**20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
#: What is read at least and at most, so that a cache cannot answer and the pages do not take long to make.
_SMALLEST_BYTES, _LARGEST_BYTES = 128 * _MIB, 256 * _MIB
_PIECE_BYTES, _SLOT_S, _MOST_THREADS = _MIB, 0.002, 16


def device_bandwidth(device: Device) -> float | None:
    """Bytes per second that `device` reads from its memory; None where that is not known. Measures a CPU."""
    if device.name == "cpu":
        return measured_bandwidth()
    computed = None
    if device.name.startswith("cuda"):
        import torch

        computed = bandwidth_of_properties(torch.cuda.get_device_properties(device.name))
    if computed is not None:
        return computed
    card = known_card(device.description)
    return card.bandwidth_bytes_per_s if card is not None else None


def bandwidth_of_properties(properties: Any) -> float | None:
    """Of what torch tells of a CUDA device: memory clock (kHz) times bus width (bits), two transfers a clock.

    None where it tells neither: older torch, and drivers that say 0.
    """
    clock_khz = getattr(properties, "memory_clock_rate", 0) or 0
    width_bits = getattr(properties, "memory_bus_width", 0) or 0
    return 2 * clock_khz * 1e3 * width_bits / 8 or None


def measured_bandwidth(seconds: float = 0.08, threads: int | None = None, caches: Path = _CACHES) -> float:
    """Bytes per second that this process reads from main memory, with all its cores unless told otherwise.

    Threads of their own read an array that no cache holds, over and over for `seconds`; the best two milliseconds
    count, since what others do meanwhile only makes it slower. Making the array takes about as long again. The
    reading is the C library's `memchr`, for a byte that is not there: torch's threads would wait for each other at
    every step, on a busy machine a hundred times longer than a step takes.
    """
    size = max(_SMALLEST_BYTES, min(_LARGEST_BYTES, 4 * _cache_bytes(caches)))
    array = ctypes.create_string_buffer(size)
    address = ctypes.addressof(array)
    ctypes.memset(address, 1, size)  # pages that nobody wrote to are all one page of zeros
    memchr = (ctypes.cdll.msvcrt if sys.platform == "win32" else ctypes.CDLL(None)).memchr
    memchr.argtypes, memchr.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    number = min(threads or physical_cores(), _MOST_THREADS)
    ends = time.perf_counter() + seconds

    def read(index: int) -> Counter[int]:
        """Bytes read in each slot of time, by one thread in its own part of the array."""
        start, end = (address + part * size // number for part in (index, index + 1))
        slots: Counter[int] = Counter()
        for piece in itertools.cycle(range(start, end - _PIECE_BYTES, _PIECE_BYTES)):
            memchr(piece, 2, _PIECE_BYTES)
            now = time.perf_counter()
            if now > ends:
                break
            slots[int(now / _SLOT_S)] += _PIECE_BYTES
        return slots

    with ThreadPoolExecutor(number) as pool:
        slots = sum(pool.map(read, range(number)), Counter[int]())
    return max(slots.values(), default=0) / _SLOT_S


def _cache_bytes(caches: Path) -> int:
    """The largest cache of the first CPU, as Linux describes it; 0 where it does not."""
    sizes = [0]
    for path in caches.glob("index*/size"):
        text = path.read_text(encoding="ascii").strip()
        number = text.rstrip("KMG")
        if number.isdigit():
            sizes.append(int(number) * {"K": 2**10, "M": _MIB, "G": 2**30}.get(text[-1], 1))
    return max(sizes)
