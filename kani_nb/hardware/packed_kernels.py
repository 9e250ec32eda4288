"""Whether torch's packed 8-bit and 4-bit products can be trusted here: they are private to torch, so they are tried.

Each is tried once in a process, on a small product whose result is known. Only says so; nothing here holds weights.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

from kani_nb.hardware.packed_codes import (
    KernelLayout,
    find_layout,
    int4_codes,
    int4_weight,
    int8_codes,
    int8_weight,
    unpacked,
)


@dataclass(frozen=True, slots=True)
class KernelSupport:
    """What became of trying torch's kernel.

    Attributes:
        bits: 8 or 4.
        works: whether it is there, vectorized, and right.
        why: the reason when it is not used.
        layout: of int4, the order in which it wants its codes.
    """

    bits: int
    works: bool
    why: str = ""
    layout: KernelLayout | None = None


#: Inputs of a group in the product that int4 is tried with.
_EXAMPLE_GROUP = 32


@cache
def kernel_support(bits: int) -> KernelSupport:
    """Whether torch's packed product of `bits` bits is used here, found out once for each process. Loads torch."""
    import torch

    if (slow := _not_vectorized()) is not None:
        return KernelSupport(bits, False, slow)
    try:
        with torch.device("cpu"), torch.no_grad():  # whatever the first caller is in
            return _try_int8() if bits == 8 else _try_int4()
    except (AttributeError, RuntimeError, TypeError) as error:
        first = next(iter(str(error).strip().splitlines()), "")
        return KernelSupport(bits, False, f"torch {torch.__version__} refuses: {type(error).__name__}: {first[:200]}")


def _not_vectorized() -> str | None:
    """Why the kernels would be plain loops here, several times slower than not using them; None where they are not.

    Source: the preprocessor conditions of torch's `int8mm_kernel.cpp` and `int4mm_kernel.cpp`.
    """
    import torch

    if platform.machine().lower() in ("arm64", "aarch64"):
        return None
    if sys.platform == "win32":
        return "torch's kernel is not vectorized on Windows"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX"):
        return None
    return f"torch's kernel is not vectorized on this CPU ({capability})"


def _try_int8() -> KernelSupport:
    import torch

    rows, weight = _example()
    codes, scale = int8_codes(weight)
    product = torch._weight_int8pack_mm(rows, codes, scale)
    return _judged(KernelSupport(8, True), product, rows, int8_weight(codes, scale))


def _try_int4() -> KernelSupport:
    import torch

    rows, weight = _example()
    codes, lines = int4_codes(weight, _EXAMPLE_GROUP)
    layout = find_layout(torch._convert_weight_to_int4pack_for_cpu)
    if layout is None:
        return KernelSupport(4, False, "torch orders 4-bit codes in a way that is not known")
    ordered = torch._convert_weight_to_int4pack_for_cpu(unpacked(codes).to(torch.int32), 1)
    product = torch._weight_int4pack_mm_for_cpu(rows, ordered, _EXAMPLE_GROUP, lines)
    return _judged(KernelSupport(4, True, layout=layout), product, rows, int4_weight(codes, lines))


def _example() -> tuple[Any, Any]:
    """Rows (5, 128) and a weight (112, 128): outputs in a whole block of every kernel, and a rest."""
    import torch

    numbers = torch.randn(5 + 112, 128, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    return numbers[:5], numbers[5:].clone()


def _judged(support: KernelSupport, product: Any, rows: Any, weight: Any) -> KernelSupport:
    """`support` where the product is right within two roundings to bfloat16."""
    exact = rows.float() @ weight.float().t()
    error = float((product.float() - exact).abs().max() / exact.abs().max())
    if error <= 2**-7:  # not so either where it is not a number
        return support
    return KernelSupport(support.bits, False, f"its results are wrong here by {error:.1%}")
