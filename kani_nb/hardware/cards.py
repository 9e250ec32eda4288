"""Cards by name: how much memory each has, how fast it is read, and what it can compute, for planning without one.

Only a table and a way to look things up in it; what a card leaves for a model is the planner's to decide.

Where the figures come from:

- Memory of NVIDIA cards: the total that `nvidia-smi` of a recent driver shows (in MiB), as quoted in public reports.
  Torch sees up to 1.7 % less of it, since the driver keeps some for itself: 15,102 of a T4's 15,360 MiB, 44.40 GiB of
  an L40's 46,068 MiB, 178.35 GiB of a B200's 183,359 MiB. AMD: what `rocm-smi` shows.
- Memory of Apple's chips: Metal's `recommendedMaxWorkingSetSize`, two thirds of the memory up to 32 GB and three
  quarters above (10,922 MiB of 16 GB, 21,845 MiB of 32 GB, 73,728 MiB of 96 GB).
- Bandwidth: the makers' public data sheets, which is memory clock times bus width (GDDR and HBM move two bits a clock).
- Compute capability: NVIDIA's table at developer.nvidia.com/cuda-gpus. AMD's and Apple's have none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from kani_nb.errors import ConfigError, near_misses

_MIB = 2**20
#: More of one card than this is a typing error.
_MOST_CARDS = 64
#: Words that makers put before or after what tells two cards apart.
_NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|amd|radeon|instinct|apple|generation|rtx|gtx|\bgpu\b|(?<=\d)\s*gi?b\b"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One product.

    Attributes:
        name: what tables call it, `RTX 3090`.
        memory_bytes: the total that the driver shows.
        bandwidth_bytes_per_s: how fast that memory is read, at best.
        capability: CUDA compute capability; None for AMD and Apple.
        has_bfloat16: it multiplies bfloat16 at full speed.
        kind: what torch calls such a device; its builds for AMD say `cuda` too.
        also: other names, those of drivers among them.
    """

    name: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    capability: tuple[int, int] | None = None
    has_bfloat16: bool = False
    kind: Literal["cuda", "mps"] = "cuda"
    also: tuple[str, ...] = ()


def _nvidia(name: str, mib: int, gb_per_s: float, capability: tuple[int, int], *also: str) -> Card:
    return Card(
        name=name,
        memory_bytes=mib * _MIB,
        bandwidth_bytes_per_s=gb_per_s * 1e9,
        capability=capability,
        has_bfloat16=capability >= (8, 0),
        also=also,
    )


def _amd(name: str, mib: int, gb_per_s: float, *also: str, has_bfloat16: bool = False) -> Card:
    return Card(
        name=name,
        memory_bytes=mib * _MIB,
        bandwidth_bytes_per_s=gb_per_s * 1e9,
        has_bfloat16=has_bfloat16,
        also=also,
    )


def _apple(chip: str, gb: int, gb_per_s: float) -> Card:
    share = 2 / 3 if gb <= 32 else 3 / 4
    return Card(
        name=f"{chip} {gb}GB",
        memory_bytes=int(gb * 1024 * share) * _MIB,
        bandwidth_bytes_per_s=gb_per_s * 1e9,
        has_bfloat16=True,
        kind="mps",
    )


_CARDS = (
    # Data centres, oldest first.
    _nvidia("P100", 16280, 732, (6, 0), "P100-PCIE-16GB", "P100-SXM2-16GB"),
    _nvidia("V100-16", 16384, 900, (7, 0), "V100", "V100-SXM2-16GB", "V100-PCIE-16GB", "V100-FHHL-16GB"),
    _nvidia("V100-32", 32768, 900, (7, 0), "V100-SXM2-32GB", "V100-PCIE-32GB", "V100-SXM3-32GB"),
    _nvidia("T4", 15360, 320, (7, 5)),
    _nvidia("A100-40", 40960, 1555, (8, 0), "A100", "A100-SXM4-40GB", "A100-PCIE-40GB"),
    _nvidia("A100-80", 81920, 2039, (8, 0), "A100-SXM4-80GB"),
    _nvidia("A100-80 PCIe", 81920, 1935, (8, 0), "A100 80GB PCIe"),
    _nvidia("A10", 23028, 600, (8, 6)),
    _nvidia("A10G", 23028, 600, (8, 6)),
    _nvidia("A40", 46068, 696, (8, 6)),
    _nvidia("L4", 23034, 300, (8, 9)),
    _nvidia("L40S", 46068, 864, (8, 9), "L40"),
    _nvidia("H100", 81559, 3350, (9, 0), "H100 80GB HBM3", "H100 SXM", "H100-80"),
    _nvidia("H100 PCIe", 81559, 2000, (9, 0)),
    _nvidia("H200", 143771, 4800, (9, 0), "H200 SXM"),
    _nvidia("B200", 183359, 8000, (10, 0)),
    _amd("MI300X", 196592, 5300, has_bfloat16=True),
    # Workstations.
    _nvidia("Titan V", 12288, 653, (7, 0)),
    _nvidia("Titan RTX", 24576, 672, (7, 5), "Titan"),
    _nvidia("Quadro RTX 6000", 24576, 672, (7, 5)),
    _nvidia("Quadro RTX 8000", 49152, 672, (7, 5)),
    _nvidia("A2000", 6138, 288, (8, 6), "A2000-6"),
    _nvidia("A2000-12", 12282, 288, (8, 6)),
    _nvidia("A4000", 16376, 448, (8, 6)),
    _nvidia("A4500", 20470, 640, (8, 6)),
    _nvidia("A5000", 24564, 768, (8, 6)),
    _nvidia("A6000", 49140, 768, (8, 6), "A6000-48"),
    _nvidia("RTX 6000 Ada", 49140, 960, (8, 9)),
    # Desktops.
    _nvidia("GTX 1660", 6144, 192, (7, 5)),
    _nvidia("RTX 2060", 6144, 336, (7, 5), "2060-6"),
    _nvidia("RTX 2060-12", 12288, 336, (7, 5)),
    _nvidia("RTX 2070", 8192, 448, (7, 5)),
    _nvidia("RTX 2080 Ti", 11264, 616, (7, 5)),
    _nvidia("RTX 3050", 8192, 224, (8, 6), "3050-8"),
    _nvidia("RTX 3060-12", 12288, 360, (8, 6), "3060"),
    _nvidia("RTX 3070", 8192, 448, (8, 6)),
    _nvidia("RTX 3080-10", 10240, 760, (8, 6), "3080"),
    _nvidia("RTX 3080-12", 12288, 912, (8, 6)),
    _nvidia("RTX 3080-20", 20480, 760, (8, 6)),
    _nvidia("RTX 3090", 24576, 936, (8, 6), "3090-24"),
    _nvidia("RTX 3090 Ti", 24564, 1008, (8, 6)),
    _nvidia("RTX 4060", 8188, 272, (8, 9)),
    _nvidia("RTX 4060 Ti", 8188, 288, (8, 9), "4060 Ti-8"),
    _nvidia("RTX 4060 Ti-16", 16380, 288, (8, 9)),
    _nvidia("RTX 4070 Ti", 12282, 504, (8, 9)),
    _nvidia("RTX 4080", 16376, 717, (8, 9)),
    _nvidia("RTX 4090", 24564, 1008, (8, 9), "4090-24"),
    _nvidia("RTX 5090", 32607, 1792, (12, 0)),
    _amd("RX 5700 XT", 8176, 448, "5700XT"),
    _amd("RX 6900 XT", 16368, 512, "6900XT"),
    # Apple's, whose memory is the machine's.
    _apple("M1", 8, 68.25),
    _apple("M1", 16, 68.25),
    _apple("M1 Max", 32, 400),
    _apple("M2", 16, 100),
    _apple("M2 Max", 96, 400),
    _apple("M2 Ultra", 192, 800),
    _apple("M3 Max", 64, 400),
    _apple("M4", 16, 120),
    _apple("M4 Pro", 48, 273),
    _apple("M4 Max", 128, 546),
)


def all_cards() -> tuple[Card, ...]:
    """The whole table."""
    return _CARDS


def known_card(name: str) -> Card | None:
    """The card that a person or a driver calls `name` (`3090`, `NVIDIA A100-SXM4-80GB`); None where there is none."""
    wanted = _key(name)
    return next((card for card in _CARDS if wanted in map(_key, (card.name, *card.also))), None)


def find_card(name: str) -> Card:
    """The one card of that name.

    Raises:
        ConfigError: the table has none (with the near misses).
    """
    card = known_card(name)
    if card is None:
        names = {_key(each): card.name for card in _CARDS for each in (card.name, *card.also)}
        near = list(dict.fromkeys(names[each] for each in near_misses(_key(name), list(names))))
        examples = "T4, L4, RTX 3090, A100-80, H100"
        raise ConfigError(
            f"there is no card {name.strip()!r} in the table",
            fix=f"did you mean {' or '.join(near)}?" if near else f"it has {examples} and {len(_CARDS) - 5} more",
        )
    return card


def find_cards(text: str) -> tuple[Card, ...]:
    """The cards that `text` names: `3090`, `2x3090`, `a100-80, t4`.

    Raises:
        ConfigError: a name that the table does not have, a number that makes no sense, or no name at all.
    """
    found: list[Card] = []
    for part in re.split(r"[,+]", text):
        if not part.strip():
            continue
        number, name = _counted(part.strip())
        if not 1 <= number <= _MOST_CARDS:
            raise ConfigError(f"{number} cards of {name!r}", why=f"it must be 1 to {_MOST_CARDS}")
        found += [find_card(name)] * number
    if not found:
        raise ConfigError("no card was named", fix="for example 3090, 2x3090 or a100-80")
    return tuple(found)


def _counted(part: str) -> tuple[int, str]:
    """`2x3090`, `2 x RTX 3090` and `3090 x2` in number and name; the numbers of cards themselves are longer."""
    if match := re.fullmatch(r"(\d{1,3})\s*[x\u00d7*]\s*(.+)", part, re.IGNORECASE):
        return int(match[1]), match[2]
    if match := re.fullmatch(r"(.+?)(?:\s+x|\s*[\u00d7*])\s*(\d{1,3})", part, re.IGNORECASE):
        return int(match[2]), match[1]
    return 1, part


def _key(name: str) -> str:
    """What is left of a name when only what tells cards apart is compared."""
    return re.sub(r"[^a-z0-9]", "", _NOISE.sub(" ", name.lower()))
