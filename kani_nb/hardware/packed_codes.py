"""From weights to low-bit codes and back: the arithmetic of `cpu-int8` and `cpu-int4`, without any module or kernel.

Two formats, both portable between machines. N are a linear layer's outputs, K its inputs, g the weights of a group:

    int8   codes (N, K) int8; scale (N,)                           weight = code * scale
    int4   codes (N, K / 2) uint8; scale and zero (K / g, N, 2)    weight = (code - 8) * scale + zero

A byte of int4 holds the code of input j in its low half and that of input j + K / 2 in its high half. Torch's kernel
wants the same codes in an order that depends on the CPU's instruction set (`KernelLayout`): that order is never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

GROUP_SIZES = (32, 64, 128, 256)
#: Weights that are worked on at once: their float32 copy stays in a core's cache.
_CHUNK_WEIGHTS = 1 << 17
#: Where the search for a group's scale starts, as shares of its range; and how often each start is improved.
_SHRINKS, _STEPS = (1.0, 0.9, 0.8), 3


def group_size_for(inputs: int, wanted: int) -> int:
    """The largest size of a group, at most `wanted`, that divides `inputs`; 0 where none does."""
    return max((size for size in GROUP_SIZES if size <= wanted and inputs % size == 0), default=0)


def row_chunks(rows: int, columns: int, weights: int = _CHUNK_WEIGHTS) -> Iterator[tuple[int, int]]:
    """`(start, stop)` of pieces of about `weights` weights; all but the last are a multiple of 64 rows."""
    step = max(64, weights // max(1, columns) // 64 * 64)
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def int8_codes(weight: Any) -> tuple[Any, Any]:
    """Codes (N, K) int8 and scale (N,), in the weight's dtype, of a weight (N, K): nearest values, one scale a row.

    Clipping the largest weights to make the steps finer was tried, and gained nothing at 8 bits.
    """
    import torch

    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)
    for start, stop in row_chunks(*weight.shape):
        part = weight[start:stop].float()
        # The codes are those of the scale as it is stored, so that its own rounding costs nothing.
        stored = (part.abs().amax(1) / 127).to(weight.dtype)
        stored[stored == 0] = 1
        codes[start:stop] = (part / stored.float()[:, None]).round_().clamp_(-127, 127)
        scale[start:stop] = stored
    return codes, scale


def int4_codes(weight: Any, group_size: int) -> tuple[Any, Any]:
    """Codes (N, K / 2) uint8 and scale and zero (K / g, N, 2) of a weight (N, K): a least-squares line for each group.

    Rounding to the range of a group is only the start: the line through codes and weights is fitted, the codes are
    taken anew, and so on; from narrower ranges too, and the best is kept. On SmolLM2-135M with groups of 64 the mean
    KL divergence from float32 fell from .24 to .20 by it, at some 30 ns of one core a weight.
    """
    import torch

    rows, columns = weight.shape
    half = columns // 2
    codes = torch.empty(rows, half, dtype=torch.uint8, device=weight.device)
    lines = torch.empty(columns // group_size, rows, 2, dtype=weight.dtype, device=weight.device)
    for start, stop in row_chunks(rows, columns):
        values = weight[start:stop].float().view(-1, group_size)
        scale, zero = _fit_lines(values, weight.dtype)
        found = _nearest(values, scale, zero).add_(8).to(torch.uint8).view(stop - start, columns)
        codes[start:stop] = found[:, :half] | (found[:, half:] << 4)
        lines[:, start:stop, 0] = scale.view(stop - start, -1).t()
        lines[:, start:stop, 1] = zero.view(stop - start, -1).t()
    return codes, lines


def _nearest(values: Any, scale: Any, zero: Any) -> Any:
    return (values - zero).div_(scale).round_().clamp_(-8, 7)


def _fit_lines(values: Any, dtype: Any) -> tuple[Any, Any]:
    """Scale and zero (groups, 1), float32 numbers that `dtype` can hold, of `values` (groups, g)."""
    import torch

    low, high = values.aminmax(dim=1, keepdim=True)
    mean = values.mean(1, keepdim=True)
    best_scale, best_zero = torch.ones_like(low), low.clone()
    best_error = torch.full_like(low, torch.inf)
    for shrink in _SHRINKS:
        scale = (high - low) * (shrink / 15)
        zero = (high + low) / 2 + scale / 2  # codes go from -8 to 7: their middle is -1/2
        for step in range(_STEPS + 1):
            scale, zero = scale.to(dtype).float(), zero.to(dtype).float()
            scale[scale == 0] = 1  # all weights of the group are the same, and the zero says which
            codes = _nearest(values, scale, zero)
            error = torch.addcmul(zero, codes, scale).sub_(values).square_().sum(1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
            if step == _STEPS:
                break
            mean_code = codes.mean(1, keepdim=True)
            codes.sub_(mean_code)
            spread = (codes * codes).sum(1, keepdim=True)
            slope = (codes * values).sum(1, keepdim=True) / spread
            scale = torch.where((spread > 0) & (slope > 0), slope, scale)
            zero = mean - scale * mean_code
    return best_scale, best_zero


def unpacked(codes: Any) -> Any:
    """The portable int4 codes (n, K / 2), one to a byte: (n, K) uint8, 0 to 15."""
    import torch

    return torch.cat([codes & 15, codes >> 4], 1)


def packed(codes: Any) -> Any:
    """The inverse of `unpacked`."""
    half = codes.shape[1] // 2
    return codes[:, :half] | (codes[:, half:] << 4)


@dataclass(frozen=True, slots=True)
class KernelLayout:
    """Where torch's int4 kernel expects each code, which depends on the CPU's instruction set.

    Outputs come in blocks. Within a block the bytes run over the inputs, and for each input over the outputs: as pairs
    of neighbours, or, in whole blocks on AVX, as outputs `i` and `i + block / 2` in the two halves of byte `i`.
    Source: `weight_to_int4pack_kernel` in torch's `aten/src/ATen/native/cpu/int4mm_kernel.cpp`.
    """

    block: int
    has_halves: bool

    def by_input(self, packed_codes: Any, start: int, stop: int) -> Any:
        """The codes of outputs `start` to `stop` (from a whole number of blocks on): (K, stop - start) uint8."""
        import torch

        rows, half = packed_codes.shape
        inputs = 2 * half
        whole = min(stop, rows // self.block * self.block)
        flat = packed_codes.view(-1)
        parts = []
        if start < whole:
            parts.append(_spread(flat[start * half : whole * half], inputs, self.block, self.has_halves))
        if max(start, whole) < stop:
            rest = stop - max(start, whole)
            parts.append(_spread(flat[max(start, whole) * half : stop * half], inputs, rest, False))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _spread(flat: Any, inputs: int, block: int, has_halves: bool) -> Any:
    """Bytes of whole blocks as codes (inputs, outputs)."""
    import torch

    source = flat.view(-1, inputs, block // 2).permute(1, 0, 2)
    blocks = source.shape[1]
    shape = (inputs, blocks, 2, block // 2) if has_halves else (inputs, blocks, block // 2, 2)
    codes = torch.empty(shape, dtype=torch.uint8, device=flat.device)
    low, high = codes.unbind(2 if has_halves else 3)
    torch.bitwise_and(source, 15, out=low)
    torch.bitwise_right_shift(source, 4, out=high)
    return codes.view(inputs, -1)


def find_layout(pack: Callable[[Any, int], Any]) -> KernelLayout | None:
    """How `pack`, torch's `_convert_weight_to_int4pack_for_cpu`, orders codes here; None for an order not known."""
    import torch

    rows, inputs = 64 + 48, 32
    codes = torch.randint(0, 16, (rows, inputs), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    ordered = pack(codes, 1)
    if ordered.shape != (rows, inputs // 2) or ordered.dtype != torch.uint8:
        return None
    wanted = codes.t().to(torch.uint8)
    for block in (64, 32, 16):
        for has_halves in (True, False):
            layout = KernelLayout(block, has_halves)
            if torch.equal(layout.by_input(ordered, 0, rows), wanted):
                return layout
    return None
