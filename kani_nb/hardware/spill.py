"""Whether the graphics driver may move a model into main memory by itself, and how much of it is there.

On Windows, and in WSL on it, NVIDIA's driver answers a full card with "shared memory": nothing fails, and every token
waits for the bus. A LLaMA-2 7B in full precision on a 12 GB card was so seen at 1,216 ms per token, and at 24 ms once
it fitted. Linux itself has no such thing. What is computed here takes the facts as arguments; only `driver_may_spill`
and `spilled_bytes` look.
"""

from __future__ import annotations

import platform
import sys
from functools import cache
from pathlib import Path
from typing import Any

#: What turns it off, in the words of NVIDIA's control panel.
CONTROL_PANEL_SETTING = (
    'NVIDIA Control Panel > Manage 3D settings > "CUDA - Sysmem Fallback Policy": "Prefer No Sysmem Fallback"'
)
#: 1215.6 ms per token against 23.6 ms: kani's documents, LLaMA-2 7B on an RTX 4070 Ti with 12 GB.
SEEN_SLOWDOWN = 51
_PROC_VERSION = Path("/proc/version")


def is_wsl(system: str, kernel_version: str) -> bool:
    """Whether this Linux runs on Windows' kernel interface: Microsoft signs its name into `/proc/version`."""
    return system == "Linux" and "microsoft" in kernel_version.lower()


def may_spill(system: str, kernel_version: str = "") -> bool:
    """Whether the driver may answer a full card with main memory.

    Args:
        system: as `platform.system` says it.
        kernel_version: the text of `/proc/version`.
    """
    return system == "Windows" or is_wsl(system, kernel_version)


def spilled(reserved_bytes: int, dedicated_bytes: int, others_bytes: int = 0) -> int:
    """What of `reserved_bytes` cannot be on the card, since it has only `dedicated_bytes`.

    A lower bound: the driver may also spill while there still is room.

    Args:
        reserved_bytes: what this process holds of the device, by its allocator.
        dedicated_bytes: the card's own memory.
        others_bytes: what other programs hold of that.
    """
    return min(reserved_bytes, max(0, reserved_bytes + others_bytes - dedicated_bytes))


@cache
def driver_may_spill() -> bool:
    """`may_spill` of this machine."""
    system = platform.system()
    try:
        kernel_version = _PROC_VERSION.read_text(encoding="utf-8", errors="replace") if system == "Linux" else ""
    except OSError:
        kernel_version = ""
    return may_spill(system, kernel_version)


def spilled_bytes(*devices: str) -> int:
    """What of this process's memory on `devices` lies in main memory instead, at least; 0 where nothing can spill.

    Imports nothing: where torch is not there, nothing is held either.
    """
    torch = sys.modules.get("torch")
    cards = [device for device in devices if device.startswith("cuda")]
    if torch is None or not cards or not driver_may_spill():
        return 0
    return sum(_spilled_on(torch, card) for card in cards)


def _spilled_on(torch: Any, card: str) -> int:
    free, total = torch.cuda.mem_get_info(card)
    reserved = int(torch.cuda.memory_reserved(card))
    others = max(0, int(total) - int(free) - reserved)
    return spilled(reserved, int(total), others)
