"""Which scheme this CPU multiplies fastest, found out by multiplying: about a second, and nothing is downloaded.

What is timed is what decoding does, one row times weights that no cache holds, with as many threads as torch has now.
A whole model gains less: its norms, its attention and Python take the same time under every scheme.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kani_nb.hardware.precision import missing_packages
from kani_nb.hardware.schemes import find_scheme

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


def best_cpu_scheme(seconds: float = 0.4) -> CpuProbe:
    """Time bfloat16, torch's packed 8-bit and 4-bit products and bitsandbytes' nf4 on this CPU. Blocks, loads torch.

    They take turns, and the shortest time of each counts, so that others' load harms none of them more than another.

    Args:
        seconds: of measuring; making the weights takes as long again, and importing bitsandbytes for the first time
            two seconds more.
    """
    import torch

    row = torch.randn(1, _SIDE).to(torch.bfloat16)
    weight = (torch.randn(_SIDE, _SIDE) / 50).to(torch.bfloat16)
    left_out = {name: why for name in ("nf4",) if (why := missing_packages(find_scheme(name)))}
    makers: dict[str, Callable[[Any], Any]] = {
        "none": _plain,
        "cpu-int8": _packed_8,
        "cpu-int4": _packed_4,
        "nf4": _nf4,
    }
    layers: dict[str, list[Any]] = {}
    with _without_warnings_of_bitsandbytes(), torch.inference_mode():
        for name, make in makers.items():
            if name in left_out:
                continue
            try:
                layer = make(weight)
            except (ImportError, RuntimeError, AttributeError, AssertionError) as error:
                left_out[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
                continue
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


@contextlib.contextmanager
def _without_warnings_of_bitsandbytes() -> Iterator[None]:
    """It tells of an optional package of kernels that is not installed."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


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

    layer = packed_class(4)(_SIDE, _SIDE, group_size=64, dtype=weight.dtype)
    layer.codes = torch.randint_like(layer.codes, 0, 256)
    layer.scale_and_zero = torch.full_like(layer.scale_and_zero, 1 / 500)
    layer.finish()
    return layer


def _nf4(weight: Any) -> Any:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(_SIDE, _SIDE, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to("cpu").eval()
