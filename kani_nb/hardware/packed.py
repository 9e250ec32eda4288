"""Linear layers that hold their weight in 8 or 4 bits and multiply on the CPU with torch's own packed products.

`PackedInt8Linear` and `PackedInt4Linear` take the place of `torch.nn.Linear` (built when first asked for: they need
torch). One or a few rows, as in decoding, go through torch's kernels, which read the codes directly; more rows, as in a
prompt, are a matrix product with weights that are spelled out piece by piece. The kernels are private to torch, so they
are tried once on small products with known results (`kernel_support`); where they are missing, wrong, or not
vectorized, everything takes the second way: right, and slower.

How a model gets these layers is `hardware.packed_quantizer`; how codes are found is `hardware.packed_codes`.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

from kani_nb.errors import ConfigError
from kani_nb.hardware.packed_codes import (
    GROUP_SIZES,
    KernelLayout,
    find_layout,
    int4_codes,
    int8_codes,
    packed,
    row_chunks,
    unpacked,
)

#: Inputs of an int8 layer must be a multiple of it: the kernel reads 16 at a time, and past the end if they are not.
INT8_IN_MULTIPLE = 16
#: The same of an int4 layer (the smallest group), and what its outputs must be a multiple of.
INT4_IN_MULTIPLE, INT4_OUT_MULTIPLE = GROUP_SIZES[0], 16
#: Most rows that the kernels multiply faster than spelled-out weights do.
INT8_KERNEL_ROWS, INT4_KERNEL_ROWS = 20, 56
#: Weights that are spelled out at once: 2 MB in bfloat16. Larger pieces leave the cache, and from 32 MB on each
#: allocation is fetched anew from the system, which takes longer than the product.
_PIECE_WEIGHTS = 1 << 20


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


@cache
def kernel_support(bits: int) -> KernelSupport:
    """Whether torch's packed product of `bits` bits is used here, found out once for each process. Loads torch."""
    import torch

    if (slow := _not_vectorized()) is not None:
        return KernelSupport(bits, False, slow)
    try:
        return _try_int8() if bits == 8 else _try_int4()
    except (AttributeError, RuntimeError, TypeError) as error:
        first = next(iter(str(error).strip().splitlines()), "")
        return KernelSupport(bits, False, f"torch {torch.__version__} refused it: {type(error).__name__}: {first[:200]}")


def _not_vectorized() -> str | None:
    """Why the kernels would be plain loops here, several times slower than not using them; None where they are not.

    Source: the preprocessor conditions of torch's `int8mm_kernel.cpp` and `int4mm_kernel.cpp`.
    """
    import torch

    if platform.machine().lower() in ("arm64", "aarch64"):
        return None
    if sys.platform == "win32":
        return "torch's kernel for it is not vectorized on Windows"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX"):
        return None
    return f"torch's kernel for it is not vectorized on this CPU ({capability})"


def _try_int8() -> KernelSupport:
    import torch

    layer = _example(8)
    rows = _example_rows()
    product = torch._weight_int8pack_mm(rows, layer.weight, layer.scale)
    return _judged(8, product, rows, layer, None)


def _try_int4() -> KernelSupport:
    import torch

    layer = _example(4)
    layout = find_layout(torch._convert_weight_to_int4pack_for_cpu)
    if layout is None:
        return KernelSupport(4, False, "torch packs int4 weights in an order that is not known")
    rows = _example_rows()
    ordered = torch._convert_weight_to_int4pack_for_cpu(unpacked(layer.weight).to(torch.int32), 1)
    product = torch._weight_int4pack_mm_for_cpu(rows, ordered, layer.group_size, layer.scale_and_zero)
    return _judged(4, product, rows, layer, layout)


def _example_rows() -> Any:
    import torch

    return torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def _example(bits: int) -> Any:
    """A small layer with outputs in whole blocks of a kernel, and a rest."""
    import torch

    weight = torch.randn(64 + 48, 128, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    if bits == 8:
        return packed_class(8).from_weight(weight)
    return packed_class(4).from_weight(weight, group_size=32)


def _judged(bits: int, product: Any, rows: Any, layer: Any, layout: KernelLayout | None) -> KernelSupport:
    """Right within twice the rounding of a bfloat16 result, or not used."""
    exact = rows.float() @ layer.dequantized().float().t()
    error = float((product.float() - exact).abs().max() / exact.abs().max())
    if not error <= 2**-7:  # also where it is not a number
        return KernelSupport(bits, False, f"torch's kernel for it is wrong here by {error:.1%}")
    return KernelSupport(bits, True, layout=layout)


class _PackedLinear:
    """What both layers have in common. Buffers are all they hold: codes, scales, and the bias if there is one."""

    bits: int
    #: The buffers that hold the weight.
    content: tuple[str, ...]
    weight: Any
    bias: Any

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: Any, device: Any) -> None:
        super().__init__()
        import torch

        self.in_features = in_features
        self.out_features = out_features
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_buffer("bias", empty)  # type: ignore[attr-defined]

    @property
    def product(self) -> str:
        """How a row is multiplied here: `packed` through torch's kernel, or `dequantized` and why."""
        if (why := self._why_not_packed()) is not None:
            return f"dequantized: {why}"
        return "packed"

    def _why_not_packed(self) -> str | None:
        import torch

        support = kernel_support(self.bits)
        if not support.works:
            return support.why
        if self._scales().dtype is not torch.bfloat16:
            return "torch's kernel is fast in bfloat16 only"
        if self._scales().device.type != "cpu":
            return "torch's kernel runs on a CPU only"
        return None

    def _scales(self) -> Any:
        raise NotImplementedError

    def _takes_kernel(self, rows: Any, limit: int) -> bool:
        """Whether these rows (M, K) go through the kernel."""
        import torch

        scales = self._scales()
        return (
            0 < rows.shape[0] <= limit
            and rows.dtype is scales.dtype is torch.bfloat16
            and rows.device.type == scales.device.type == "cpu"
            and not (rows.requires_grad and torch.is_grad_enabled())  # the kernels have no derivative
            and kernel_support(self.bits).works
        )

    def forward(self, inputs: Any) -> Any:
        """Inputs (..., K) times the weight, plus the bias: (..., N), in the inputs' dtype."""
        rows = inputs.reshape(-1, self.in_features)
        product = self._multiply(rows.contiguous())
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.view(*inputs.shape[:-1], self.out_features)

    def _multiply(self, rows: Any) -> Any:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Int8(_PackedLinear):
    """A linear layer of 8-bit codes with one scale for each output.

    Args:
        in_features: K, a multiple of 16.
        out_features: N.
        dtype: of the scale and the bias; rows of another dtype are multiplied in their own.

    Raises:
        ConfigError: the shape does not fit.
    """

    bits = 8
    content = ("weight", "scale")
    scale: Any

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, dtype: Any = None, device: Any = None
    ) -> None:
        import torch

        if not fits_int8(in_features, out_features):
            raise _misfit(8, in_features, out_features, f"inputs must be a multiple of {INT8_IN_MULTIPLE}")
        super().__init__(in_features, out_features, bias, dtype, device)
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("weight", codes)  # type: ignore[attr-defined]
        scale = torch.empty(out_features, dtype=dtype, device=device)
        self.register_buffer("scale", scale)  # type: ignore[attr-defined]

    @classmethod
    def from_weight(cls, weight: Any, bias: Any = None) -> Any:
        """A layer that holds `weight` (N, K) as nearly as 8 bits can."""
        layer = cls(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device=weight.device)
        layer.quantize(weight)
        layer.bias = None if bias is None else bias.detach()
        return layer

    def quantize(self, weight: Any) -> None:
        """Hold `weight` (N, K) from now on."""
        self.weight, self.scale = int8_codes(weight.detach())

    def dequantized(self) -> Any:
        """The weight (N, K) that is held, in the scale's dtype."""
        return self.weight.to(self.scale.dtype) * self.scale[:, None]

    def finish(self) -> None:
        """Put the codes where the kernel may read them; a file mapped into memory has them anywhere."""
        if not _is_aligned(self.weight):
            self.weight = self.weight.clone()

    def _scales(self) -> Any:
        return self.scale

    def _multiply(self, rows: Any) -> Any:
        import torch

        # At other addresses torch 2.13's kernel ends the process.
        if self._takes_kernel(rows, INT8_KERNEL_ROWS) and _is_aligned(self.weight):
            aligned = rows if _is_aligned(rows) else rows.clone()
            return torch._weight_int8pack_mm(aligned, self.weight, self.scale)
        scale = self.scale.to(rows.dtype)
        parts = []
        for start, stop in row_chunks(self.out_features, self.in_features, _PIECE_WEIGHTS):
            codes = self.weight[start:stop].to(rows.dtype)
            if rows.dtype is torch.float16:  # sums of codes could pass its largest number
                parts.append(torch.nn.functional.linear(rows, codes.mul_(scale[start:stop, None])))
            else:
                parts.append(torch.nn.functional.linear(rows, codes) * scale[start:stop])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class _Int4(_PackedLinear):
    """A linear layer of 4-bit codes with a scale and a zero for each group of inputs of each output.

    In a state dict the codes are portable; `finish` puts them into the order of this CPU's kernel, in their place.

    Args:
        in_features: K, a multiple of the group.
        out_features: N, a multiple of 16.
        group_size: 32, 64, 128 or 256.
        dtype: of scales, zeros and the bias; rows of another dtype are multiplied in their own.

    Raises:
        ConfigError: the shape does not fit.
    """

    bits = 4
    content = ("weight", "scale_and_zero")
    scale_and_zero: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int = 32,
        bias: bool = False,
        dtype: Any = None,
        device: Any = None,
    ) -> None:
        import torch

        if group_size not in GROUP_SIZES or in_features % group_size or not fits_int4(in_features, out_features):
            why = f"inputs must be a multiple of the group of {group_size}, outputs of {INT4_OUT_MULTIPLE}"
            raise _misfit(4, in_features, out_features, why)
        super().__init__(in_features, out_features, bias, dtype, device)
        self.group_size = group_size
        #: The order the codes are in; None is the portable one.
        self.layout: KernelLayout | None = None
        codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
        self.register_buffer("weight", codes)  # type: ignore[attr-defined]
        lines = torch.empty(in_features // group_size, out_features, 2, dtype=dtype, device=device)
        self.register_buffer("scale_and_zero", lines)  # type: ignore[attr-defined]

    @classmethod
    def from_weight(cls, weight: Any, bias: Any = None, *, group_size: int = 32) -> Any:
        """A layer that holds `weight` (N, K) as nearly as 4 bits can; its codes in the portable order."""
        outputs, inputs = weight.shape
        has_bias = bias is not None
        layer = cls(
            inputs, outputs, group_size=group_size, bias=has_bias, dtype=weight.dtype, device=weight.device
        )
        layer.quantize(weight)
        layer.bias = None if bias is None else bias.detach()
        return layer

    def quantize(self, weight: Any) -> None:
        """Hold `weight` (N, K) from now on."""
        self.weight, self.scale_and_zero = int4_codes(weight.detach(), self.group_size)
        self.layout = None

    def dequantized(self) -> Any:
        """The weight (N, K) that is held, in the scales' dtype."""
        lines = self.scale_and_zero.transpose(0, 1)[:, :, None]
        codes = unpacked(self.codes()).view(self.out_features, -1, self.group_size)
        weight = (codes.to(lines.dtype) - 8) * lines[..., 0] + lines[..., 1]
        return weight.view(self.out_features, self.in_features)

    def codes(self) -> Any:
        """The codes in the portable order: (N, K / 2) uint8. A copy where the layer holds them in another."""
        import torch

        if self.layout is None:
            return self.weight
        codes = torch.empty_like(self.weight)
        for start, stop in row_chunks(self.out_features, self.in_features, _PIECE_WEIGHTS):
            codes[start:stop] = packed(self.layout.by_input(self.weight, start, stop).t())
        return codes

    def finish(self) -> None:
        """Put the codes into the order of the kernel, where it is used; for a layer that is not on a CPU, nothing."""
        import torch

        if self.layout is not None or self._why_not_packed() is not None:
            return
        ordered = torch.empty_like(self.weight)
        for start, stop in row_chunks(self.out_features, self.in_features, _PIECE_WEIGHTS):
            codes = unpacked(self.weight[start:stop]).to(torch.int32)
            ordered[start:stop] = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.weight, self.layout = ordered, kernel_support(4).layout

    def _scales(self) -> Any:
        return self.scale_and_zero

    def _multiply(self, rows: Any) -> Any:
        import torch

        if self.layout is not None and self._takes_kernel(rows, INT4_KERNEL_ROWS):
            return torch._weight_int4pack_mm_for_cpu(rows, self.weight, self.group_size, self.scale_and_zero)
        lines = self.scale_and_zero.to(rows.dtype)
        # The zeros' share is a small product of its own: the sum of each group of inputs times its zero.
        sums = rows.view(rows.shape[0], -1, self.group_size).sum(2, dtype=torch.float32).to(rows.dtype)
        parts = []
        for start, stop in row_chunks(self.out_features, self.in_features, _PIECE_WEIGHTS):
            scale, zero = lines[:, start:stop].unbind(2)
            parts.append(torch.addmm(sums @ zero, rows, self._scaled_codes(scale, start, stop)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _scaled_codes(self, scale: Any, start: int, stop: int) -> Any:
        """Codes times `scale` (K / g, n) of the outputs from `start` to `stop`: (K, n)."""
        import torch

        count = stop - start
        if self.layout is not None:
            codes = self.layout.by_input(self.weight, start, stop)
            shape: tuple[int, ...] = (-1, self.group_size, count)
            scale = scale.contiguous()[:, None]
        else:
            codes = unpacked(self.weight[start:stop])
            shape = (count, -1, self.group_size)
            scale = scale.t().contiguous()[:, :, None]
        weight = codes.view(torch.int8).sub_(8).to(scale.dtype).view(shape).mul_(scale)
        if self.layout is not None:
            return weight.view(self.in_features, count)
        return weight.view(count, self.in_features).t()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        destination[f"{prefix}weight"] = self.codes()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        was_finished = self.layout is not None
        if was_finished:
            self.weight, self.layout = self.codes(), None
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]
        if was_finished:
            self.finish()


def _is_aligned(tensor: Any) -> bool:
    return bool(tensor.data_ptr() % 64 == 0)


def fits_int8(in_features: int, out_features: int) -> bool:
    """Whether a linear layer of this shape can be held in 8 bits."""
    return in_features > 0 and out_features > 0 and in_features % INT8_IN_MULTIPLE == 0


def fits_int4(in_features: int, out_features: int) -> bool:
    """Whether a linear layer of this shape can be held in 4 bits."""
    return min(in_features, out_features) > 0 and not (
        in_features % INT4_IN_MULTIPLE or out_features % INT4_OUT_MULTIPLE
    )


def _misfit(bits: int, in_features: int, out_features: int, why: str) -> ConfigError:
    return ConfigError(f"a linear layer of {in_features} inputs and {out_features} outputs cannot be held in {bits} bits", why=why)


@cache
def packed_class(bits: int) -> Any:
    """`PackedInt8Linear` or `PackedInt4Linear`. Loads torch."""
    import torch

    body, name = (_Int8, "PackedInt8Linear") if bits == 8 else (_Int4, "PackedInt4Linear")
    return type(name, (body, torch.nn.Module), {"__module__": __name__, "__doc__": body.__doc__})


def __getattr__(name: str) -> Any:
    if name in ("PackedInt8Linear", "PackedInt4Linear"):
        return packed_class(8 if name == "PackedInt8Linear" else 4)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
