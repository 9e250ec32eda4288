"""What a model may use of each device: of those of this machine, or of cards that were only named.

A part of each is left to others. Of a card of this machine, whose driver's own share is not free any more, a quarter
of a GiB for the libraries' kernels and workspaces; of a named one the driver's share (a fiftieth: see `hardware.cards`)
and half a GiB, which a process with torch takes before its first tensor; of main memory a twentieth, at most one GiB.
These are allowances, chosen on the safe side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kani_nb.errors import ConfigError
from kani_nb.hardware.bandwidth import device_bandwidth
from kani_nb.hardware.cards import find_cards
from kani_nb.hardware.devices import list_devices
from kani_nb.hardware.placement import parse_max_memory
from kani_nb.hardware.plans import Budget
from kani_nb.hardware.precision import cpu_features

_GIB = 2**30
#: What a process with torch takes of a card before its first tensor, and libraries after it.
PROCESS_BYTES, LIBRARIES_BYTES = _GIB // 2, _GIB // 4
_DRIVERS_SHARE = 0.02
_MAIN_MEMORY_SHARE, _MAIN_MEMORY_BYTES = 0.05, _GIB


def budgets_here(
    max_memory: str | Mapping[Any, Any] | None = None,
    *,
    with_bandwidth: bool = False,
    also_free: Mapping[str, int] | None = None,
) -> tuple[Budget, ...]:
    """The devices of this machine with what is free of them now, the CPU last. Loads torch.

    Args:
        max_memory: most of each device, as `0=10GiB,cpu=30GiB` or a dict; `disk` adds one.
        with_bandwidth: find out how fast each is read too, which takes about 0.2 s for main memory.
        also_free: bytes by device that are held now and will have been given back.

    Raises:
        ConfigError: `max_memory` cannot be read, or names a device that is not there.
    """
    limits = parse_max_memory(max_memory)
    devices = list_devices()
    names = [device.name for device in devices]
    for name in limits:
        if name not in (*names, "disk"):
            raise ConfigError(
                f"max_memory names {name}", why="there is no such device here", fix=f"there are {', '.join(names)}"
            )
    found = []
    for device in devices:
        left = LIBRARIES_BYTES if device.name.startswith("cuda") else 0
        if device.name == "cpu":
            left = min(_MAIN_MEMORY_BYTES, int(device.total_bytes * _MAIN_MEMORY_SHARE))
        free = min(device.total_bytes, device.free_bytes + (also_free or {}).get(device.name, 0))
        usable = max(0, free - left)
        found.append(
            Budget(
                name=device.name,
                description=device.description,
                total_bytes=device.total_bytes,
                usable_bytes=min(usable, limits.get(device.name, usable)),
                bandwidth_bytes_per_s=device_bandwidth(device) if with_bandwidth else None,
                compute_capability=device.compute_capability,
                cpu_features=cpu_features() if device.name == "cpu" else (),
            )
        )
    return (*found, *_disk(limits, is_here=True))


def budgets_of(cards: str) -> tuple[Budget, ...]:
    """Cards by name, as if they were alone in a machine: `3090`, `2x3090`, `t4, cpu=64GiB`.

    Args:
        cards: names, each with how many of it; and what main memory and disk there would be, for offloading.

    Raises:
        ConfigError: a card that the table does not have, or an amount that cannot be read.
    """
    parts = [part.strip() for part in cards.split(",") if part.strip()]
    limits = parse_max_memory(",".join(part for part in parts if "=" in part))
    if wrong := [name for name in limits if name not in ("cpu", "disk")]:
        raise ConfigError(f"{cards!r} gives {wrong[0]} an amount", fix="name the card, as in: 3090, cpu=64GiB")
    found = find_cards(",".join(part for part in parts if "=" not in part))
    if any(card.kind == "mps" for card in found) and len(found) > 1:
        raise ConfigError(f"{cards!r} joins an Apple chip with others", why="it has the machine for itself")
    named = [
        Budget(
            name=f"cuda:{index}" if card.kind == "cuda" else "mps",
            description=card.name,
            total_bytes=card.memory_bytes,
            usable_bytes=usable_of_card(card.memory_bytes, card.kind),
            bandwidth_bytes_per_s=card.bandwidth_bytes_per_s,
            compute_capability=card.capability,
            is_here=False,
        )
        for index, card in enumerate(found)
    ]
    if "cpu" in limits:
        named.append(
            Budget(
                name="cpu",
                description="main memory",
                total_bytes=limits["cpu"],
                usable_bytes=limits["cpu"] - min(_MAIN_MEMORY_BYTES, int(limits["cpu"] * _MAIN_MEMORY_SHARE)),
                is_here=False,
            )
        )
    return (*named, *_disk(limits, is_here=False))


def usable_of_card(memory_bytes: int, kind: str = "cuda") -> int:
    """What a model may take of a named card; of Apple's, Metal's own recommendation is the limit already."""
    if kind == "mps":
        return memory_bytes
    return max(0, int(memory_bytes * (1 - _DRIVERS_SHARE)) - PROCESS_BYTES)


def _disk(limits: Mapping[str, int], *, is_here: bool) -> tuple[Budget, ...]:
    if "disk" not in limits:
        return ()
    size = limits["disk"]
    return (Budget(name="disk", description="the disk", total_bytes=size, usable_bytes=size, is_here=is_here),)
