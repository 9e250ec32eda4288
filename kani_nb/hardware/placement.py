"""What people say about where a model goes, read and checked: devices' names, `max_memory` and device maps.

Pure: which devices there are is told. A device map is checked against the names of a model's modules before anything
is loaded; accelerate would say less, and later. Maps of our own are made in `hardware.spreading`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kani_nb.errors import ConfigError, did_you_mean

#: What a device map may be instead of a device or a dict.
STRATEGIES = ("auto", "balanced", "sequential")
#: Where weights can be kept that another device computes with.
SLOW = ("cpu", "disk")
_UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_MOST_SHOWN = 4


def device_name(device: Any) -> str:
    """`cuda:0` for `0`, `"0"`, `"cuda"`, `"cuda:0"` and `torch.device("cuda", 0)`; `cpu`, `mps` and `disk` as they are.

    Raises:
        ConfigError: it is no device.
    """
    if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
        return f"cuda:{device}"
    text = str(device).strip().lower()
    if text.isdigit():
        return f"cuda:{int(text)}"
    text = {"cuda": "cuda:0", "mps:0": "mps", "cpu:0": "cpu"}.get(text, text)
    if not re.fullmatch(r"cuda:\d+|mps|cpu|disk", text):
        raise ConfigError(f"{device!r} is no device", fix="a GPU's number, cuda:0, mps, cpu or disk")
    return text


def parse_max_memory(given: str | Mapping[Any, Any] | None) -> dict[str, int]:
    """Bytes by device, from `0=10GiB,cpu=30GiB` or a dict with such keys and values; whole numbers are bytes.

    Raises:
        ConfigError: it cannot be read, a device is named twice, or an amount has no unit or a wrong one.
    """
    if given is None:
        return {}
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = dict(json.loads(given))
        except ValueError:
            raise ConfigError(f"max_memory {given!r} cannot be read", why="it is no JSON", fix=_FIX) from None
    if isinstance(given, str):
        parts = [part.strip() for part in given.split(",") if part.strip()]
        pairs: list[tuple[Any, Any]] = []
        for part in parts:
            device, sign, amount = part.partition("=") if "=" in part else part.partition(":")
            if not sign or not device.strip() or not amount.strip():
                raise ConfigError(f"max_memory {given!r} cannot be read", why=f"{part!r} is no DEVICE=AMOUNT", fix=_FIX)
            pairs.append((device.strip(), amount.strip()))
    else:
        pairs = list(given.items())
    found: dict[str, int] = {}
    for device, amount in pairs:
        name = device_name(device)
        if name in found:
            raise ConfigError(f"max_memory {given!r} names {name} twice", fix=_FIX)
        found[name] = memory_amount(amount, f"max_memory of {name}")
    return found


_FIX = "for example 0=10GiB,cpu=30GiB"


def memory_amount(amount: Any, what: str) -> int:
    """Bytes of `10GiB`, `500 MB` or a whole number of bytes.

    Raises:
        ConfigError: `what` has no unit, a wrong one, or is no amount.
    """
    if isinstance(amount, int) and not isinstance(amount, bool):
        if amount < 0:
            raise ConfigError(f"{what} is {amount}", why="it must be at least 0 bytes")
        return amount
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(amount).strip())
    if match is None:
        raise ConfigError(f"{what} is {amount!r}", why="it is no amount of memory", fix="for example 10GiB or 500MB")
    number, unit = match[1], match[2]
    if not unit:
        raise ConfigError(f"{what} is {amount!r}", why="it has no unit", fix=f"{number}GiB or {number}MiB")
    is_bits = unit.endswith("b") and "i" not in unit.lower()  # accelerate reads 10Gb as gigabits
    if unit.upper() not in _UNITS or is_bits:
        meant = f"{unit[0].upper()}{'' if is_bits else 'i'}B" if unit[0].upper() in "KMGT" else "GiB"
        raise ConfigError(
            f"{what} is {amount!r}",
            why=f"{unit!r} is {'bits' if is_bits and unit.upper() in _UNITS else 'no unit of memory'}",
            fix=f"{number}{meant} (units are B, KB, MB, GB, TB and KiB, MiB, GiB, TiB)",
        )
    return int(float(number) * _UNITS[unit.upper()])


def check_device_map(
    device_map: Any, modules: Iterable[str], tensors: Iterable[str], devices: Iterable[str]
) -> str | dict[str, str]:
    """The device map with its devices' names made plain, once everything about it is right.

    Args:
        device_map: `auto`, `balanced`, `sequential`, a device, or a dict from module (or tensor) to device; the key
            `""` stands for the whole model.
        modules: names of the model's modules and blocks.
        tensors: names of its parameters and buffers, each of which must have a place.
        devices: names of the devices that are there; the disk always is.

    Raises:
        ConfigError: a key names no module, a tensor has no place, or a device is not there.
    """
    there = [*dict.fromkeys(devices)]
    if not isinstance(device_map, Mapping):
        if device_map is None:
            return "auto"
        if isinstance(device_map, str) and device_map in STRATEGIES:
            return device_map
        return _there(device_map, there, "", (*STRATEGIES, *there))
    if not device_map:
        first = json.dumps({"": there[0] if there else "cpu"})
        raise ConfigError("the device map is empty", fix=f"{first} puts the whole model there, or auto")
    names = list(tensors)
    known = {*_prefixes(names), *modules, ""}
    found: dict[str, str] = {}
    for key, device in device_map.items():
        if str(key) not in known:
            near = did_you_mean(str(key), sorted(known - set(names)))
            raise ConfigError(
                f"the device map names {str(key)!r}, which is no module of this model",
                fix=near or f"it has {', '.join(list(dict.fromkeys(modules))[:_MOST_SHOWN])}, ...",
            )
        found[str(key)] = _there(device, [*there, "disk"], f" for {str(key)!r}" if key else "", there)
    homeless = [name for name in names if device_of(name, found) is None]
    if homeless:
        places = list(dict.fromkeys(name.rpartition(".")[0] for name in homeless))
        raise ConfigError(
            f"the device map has no place for {', '.join(places[:_MOST_SHOWN])}"
            + (f" and {len(places) - _MOST_SHOWN} more modules" if len(places) > _MOST_SHOWN else ""),
            fix=f'add {places[0]!r}, or "" for all that is not named',
        )
    return found


def device_of(name: str, device_map: Mapping[str, str]) -> str | None:
    """Where the map puts a module or tensor: its longest key that is a part of the name; None where there is none."""
    key = key_of(name, device_map)
    return None if key is None else device_map[key]


def key_of(name: str, keys: Iterable[str]) -> str | None:
    """The longest of `keys` that is `name` or a module around it."""
    found = [key for key in keys if not key or name == key or name.startswith(f"{key}.")]
    return max(found, key=len, default=None)


def _prefixes(names: Iterable[str]) -> set[str]:
    """Each name and every module around it."""
    found = set()
    for name in names:
        while name and name not in found:
            found.add(name)
            name = name.rpartition(".")[0]
    return found


def there_is(device_map: Any, devices: Iterable[str]) -> str:
    """The name of the device that a device map is, instead of a strategy or a dict.

    Raises:
        ConfigError: there is none of that name, with the near misses among devices and strategies.
    """
    known = list(devices)
    return _there(device_map, known, "", (*STRATEGIES, *known))


def _there(device: Any, devices: Iterable[str], where: str, shown: Iterable[str]) -> str:
    known = list(devices)
    try:
        name = device_name(device)
    except ConfigError as error:
        near = did_you_mean(str(device), [*STRATEGIES, *known]) if not where else ""
        raise ConfigError(
            f"the device map has {device!r}{where}", why="that is no device", fix=near or str(error.fix)
        ) from None
    if name not in known:
        raise ConfigError(
            f"the device map has {device!r}{where}", why=f"there is no {name} here", fix=f"there are {', '.join(shown)}"
        )
    return name
