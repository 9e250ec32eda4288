"""Which scheme this CPU multiplies fastest, found out by multiplying for half a second.

What is timed is what decoding does, one row times weights that no cache holds, with as many threads as torch has now.
A whole model gains less: its norms, its attention and Python take the same time under every scheme.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from kani_nb.hardware.packed_kernels import kernel_support
from kani_nb.hardware.schemes import DEFAULT_GROUP_SIZE

#: Outputs and inputs of one weight, and how many of them: 67 million weights, 134 MB in bfloat16.
_SIDE, _COPIES = 2048, 16
_FEWEST_ROUNDS = 1


@dataclass(frozen=True, slots=True)
class CpuProbe:
    """What was measured.

    Attributes:
        seconds: by scheme, of one row times 67 million weights; `none` is bfloat16.
        left_out: by scheme, why it was not measured.
        threads: how many torch had.
    """

    seconds: Mapping[str, float]
    left_out: Mapping[str, str]
    threads: int

    @property
    def speeds(self) -> dict[str, float]:
        """By scheme, times bfloat16; for `planner.make_plan`."""
        return {name: self.seconds["none"] / seconds for name, seconds in self.seconds.items()}

    @property
    def fastest(self) -> str:
        """The scheme that multiplies fastest."""
        return min(self.seconds, key=lambda name: self.seconds[name])

    def to_text(self) -> str:
        """One sentence with the figures."""
        speeds = sorted(self.speeds.items(), key=lambda each: -each[1])
        listed = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds if name != "none")
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        others = listed or "nothing else runs"
        return f"{self.fastest} multiplies fastest on this CPU ({threads}; times bfloat16: {others})"


@cache
def cpu_speeds() -> Mapping[str, float]:
    """`probe_cpu().speeds`, measured once in a process."""
    return probe_cpu().speeds


def probe_cpu(seconds: float = 0.1) -> CpuProbe:
    """Time bfloat16 and torch's packed 8-bit and 4-bit products on this CPU. Blocks, loads torch.

    They take turns, and the shortest time of each counts, so that others' load harms none of them more than another.
    What needs bitsandbytes is left to the figures of another machine: its import alone takes seconds.

    Args:
        seconds: of measuring; making the weights takes a third of a second more.
    """
    import torch

    row = torch.randn(1, _SIDE).to(torch.bfloat16)
    weight = (torch.randn(_SIDE, _SIDE) / 50).to(torch.bfloat16)
    left_out: dict[str, str] = {}
    makers: dict[str, Callable[[Any], Any]] = {"none": _plain, "cpu-int8": _packed_8, "cpu-int4": _packed_4}
    layers: dict[str, list[Any]] = {}
    with torch.inference_mode():
        for name, make in makers.items():
            if name != "none" and not (support := kernel_support(8 if name == "cpu-int8" else 4)).works:
                left_out[name] = support.why
                continue
            layer = make(weight)
            layers[name] = [layer, *(copy.deepcopy(layer) for _ in range(_COPIES - 1))]
        found = _shortest(layers, row, seconds)
    return CpuProbe(found, left_out, torch.get_num_threads())


def _shortest(layers: Mapping[str, list[Any]], row: Any, seconds: float) -> dict[str, float]:
    """For each scheme the shortest time of a product, times their number; all schemes and all weights take turns."""
    found = dict.fromkeys(layers, float("inf"))
    for copies in layers.values():  # the first product of some rearranges their weights
        for layer in copies:
            layer(row)
    ends, rounds = time.perf_counter() + seconds, 0
    while rounds < _FEWEST_ROUNDS or time.perf_counter() < ends:
        for name, copies in layers.items():
            for layer in copies:
                started = time.perf_counter()
                layer(row)
                found[name] = min(found[name], time.perf_counter() - started)
        rounds += 1
    return {name: shortest * _COPIES for name, shortest in found.items()}


def _plain(weight: Any) -> Any:
    import torch

    layer = torch.nn.Linear(_SIDE, _SIDE, bias=False, dtype=weight.dtype, device="meta")
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def _packed_8(weight: Any) -> Any:
    import torch

    from kani_nb.hardware.packed import packed_class

    layer = packed_class(8)(_SIDE, _SIDE, dtype=weight.dtype)
    layer.codes = torch.randint_like(layer.codes, -127, 128)
    layer.scale = torch.full_like(layer.scale, 1 / 5000)
    layer.finish()
    return layer


def _packed_4(weight: Any) -> Any:
    import torch

    from kani_nb.hardware.packed import packed_class

    layer = packed_class(4)(_SIDE, _SIDE, group_size=DEFAULT_GROUP_SIZE["cpu-int4"], dtype=weight.dtype)
    layer.codes = torch.randint_like(layer.codes, 0, 256)
    layer.scale_and_zero = torch.full_like(layer.scale_and_zero, 1 / 500)
    layer.finish()
    return layer
