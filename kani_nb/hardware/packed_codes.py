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
#: Weights that are worked on at once; their float32 copies stay in the cache.
_CHUNK_WEIGHTS = 1 << 18
#: Where the search for a group's scale starts, as shares of its range; and how often the best is improved at the end.
_SHRINKS, _LAST_STEPS = (1.0, 0.9, 0.8), 2


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
    taken anew, and so on; from narrower ranges too, and the best is kept.
    """
    import torch

    rows, columns = weight.shape
    half = columns // 2
    codes = torch.empty(rows, half, dtype=torch.uint8, device=weight.device)
    lines = torch.empty(columns // group_size, rows, 2, dtype=weight.dtype, device=weight.device)
    for start, stop in row_chunks(rows, columns):
        # Groups are columns here, so that sums over a group run over whole rows of numbers.
        groups = weight[start:stop].reshape(-1, group_size).t().float().contiguous()
        scale, zero = _fit_lines(groups, weight.dtype)
        found = _nearest(groups, scale, zero).add_(8).to(torch.uint8).t().reshape(stop - start, columns)
        codes[start:stop] = packed(found)
        lines[:, start:stop, 0] = scale.view(stop - start, -1).t()
        lines[:, start:stop, 1] = zero.view(stop - start, -1).t()
    return codes, lines


def _nearest(groups: Any, scale: Any, zero: Any) -> Any:
    return (groups - zero).div_(scale).round_().clamp_(-8, 7)


def _fit_lines(groups: Any, dtype: Any) -> tuple[Any, Any]:
    """Scale and zero (n,) of `groups` (g, n) float32: numbers that `dtype` can hold, in float32."""
    import torch

    size = groups.shape[0]
    low, high, total = groups.amin(0), groups.amax(0), groups.sum(0)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.ones_like(low), low
    next_scale, next_zero = best_scale, best_zero

    def improve(scale: Any, zero: Any) -> tuple[Any, Any]:
        """Keep this line where it is the best so far; return the line fitted through the codes that it gives."""
        nonlocal best_error, best_scale, best_zero, next_scale, next_zero
        scale, zero = scale.to(dtype).float(), zero.to(dtype).float()
        scale[scale == 0] = 1  # all weights of the group are the same, and the zero says which
        codes = _nearest(groups, scale, zero)
        sum_codes, sum_products = codes.sum(0), (codes * groups).sum(0)
        sum_squares = codes.square_().sum(0)
        # The squared error, but for the sum of the squared weights, which is the same for every line.
        error = scale * (scale * sum_squares + 2 * (zero * sum_codes - sum_products)) + zero * (size * zero - 2 * total)
        slope = (sum_products - sum_codes * total / size) / (sum_squares - sum_codes.square() / size)
        fitted_scale = torch.where(slope.isfinite() & (slope > 0), slope, scale)
        fitted_zero = (total - fitted_scale * sum_codes) / size
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        next_scale = torch.where(better, fitted_scale, next_scale)
        next_zero = torch.where(better, fitted_zero, next_zero)
        return fitted_scale, fitted_zero

    for shrink in _SHRINKS:
        scale = (high - low) * (shrink / 15)
        improve(*improve(scale, (high + low + scale) / 2))  # codes go from -8 to 7: their middle is -1/2
    for _ in range(_LAST_STEPS):
        improve(next_scale, next_zero)
    return best_scale, best_zero


def int8_weight(codes: Any, scale: Any) -> Any:
    """The weight (N, K) that int8 codes and their scale stand for, in the scale's dtype."""
    return codes.to(scale.dtype) * scale[:, None]


def int4_weight(codes: Any, lines: Any) -> Any:
    """The weight (N, K) that portable int4 codes and their scales and zeros (K / g, N, 2) stand for, in their dtype."""
    groups, rows, _ = lines.shape
    scale, zero = lines.transpose(0, 1)[:, :, None].unbind(3)
    numbers = unpacked(codes).to(lines.dtype).view(rows, groups, -1)
    return ((numbers - 8) * scale + zero).view(rows, -1)


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

    def parts(self, rows: int, start: int, stop: int) -> Iterator[LayoutPart]:
        """The outputs from `start`, which begins a block, to `stop`, of `rows` in all; cut where the order changes."""
        whole = min(stop, rows // self.block * self.block)
        if start < whole:
            yield LayoutPart(start, whole, self.block, self.has_halves)
        if max(start, whole) < stop:
            yield LayoutPart(max(start, whole), stop, stop - max(start, whole), False)

    def portable(self, ordered: Any, start: int, stop: int) -> Any:
        """The codes of the outputs from `start` to `stop` in the portable order: (stop - start, K / 2) uint8."""
        import torch

        found = []
        for part in self.parts(ordered.shape[0], start, stop):
            codes = part.both(*part.halves(ordered))
            found.append(packed(codes.t()))
        return torch.cat(found)


@dataclass(frozen=True, slots=True)
class LayoutPart:
    """Outputs `start` to `stop` of a weight in the kernel's order, all in blocks of one kind."""

    start: int
    stop: int
    block: int
    has_halves: bool

    def halves(self, ordered: Any) -> tuple[Any, Any]:
        """The codes (K, n / 2) uint8 of the low and of the high halves of the bytes: each of every second output."""
        half = ordered.shape[1]
        source = ordered.view(-1)[self.start * half : self.stop * half].view(-1, 2 * half, self.block // 2)
        by_input = source.permute(1, 0, 2).reshape(2 * half, -1)
        return by_input & 15, by_input >> 4

    def split(self, values: Any) -> tuple[Any, Any]:
        """Values (m, n) of these outputs: (m, n / 2) for those in low halves, and for those in high ones."""
        count, outputs = values.shape
        low, high = values.view(count, *self._shape(outputs)).unbind(self._axis)
        return low.reshape(count, outputs // 2), high.reshape(count, outputs // 2)

    def both(self, low: Any, high: Any) -> Any:
        """The inverse of `split`."""
        import torch

        count, half = low.shape
        shape = (count, 2 * half // self.block, self.block // 2)
        return torch.stack([low.view(shape), high.view(shape)], self._axis).view(count, 2 * half)

    def _shape(self, outputs: int) -> tuple[int, int, int]:
        blocks = outputs // self.block
        return (blocks, 2, self.block // 2) if self.has_halves else (blocks, self.block // 2, 2)

    @property
    def _axis(self) -> int:
        return 2 if self.has_halves else 3


def find_layout(pack: Callable[[Any, int], Any]) -> KernelLayout | None:
    """How `pack`, torch's `_convert_weight_to_int4pack_for_cpu`, orders codes here; None for an order not known."""
    import torch

    rows, inputs = 64 + 48, 32
    codes = torch.randint(0, 16, (rows, inputs), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    ordered = pack(codes, 1)
    if ordered.shape != (rows, inputs // 2) or ordered.dtype != torch.uint8:
        return None
    wanted = packed(codes.to(torch.uint8))
    for block in (64, 32, 16):
        for has_halves in (True, False):
            layout = KernelLayout(block, has_halves)
            if torch.equal(layout.portable(ordered, 0, rows), wanted):
                return layout
    return None
