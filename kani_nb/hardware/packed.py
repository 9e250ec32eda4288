"""Linear layers that hold their weight in 8 or 4 bits and multiply on the CPU with torch's own packed products.

`PackedInt8Linear` and `PackedInt4Linear` take the place of `torch.nn.Linear` (built when first asked for: they need
torch). One or a few rows, as in decoding, go through torch's kernels, which read the codes directly; more rows, as in a
prompt, are a matrix product with the weight dequantized piece by piece. Where the kernels are not to be used
(`hardware.packed_kernels` finds out), everything takes the second way: right, and slower.

How a model gets these layers is `hardware.packed_quantizer`; how codes are found is `hardware.packed_codes`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from kani_nb.errors import ConfigError
from kani_nb.hardware.packed_codes import (
    GROUP_SIZES,
    KernelLayout,
    LayoutPart,
    int4_codes,
    int4_weight,
    int8_codes,
    int8_weight,
    row_chunks,
    unpacked,
)
from kani_nb.hardware.packed_kernels import kernel_support

#: Inputs of an int8 layer must be a multiple of it: the kernel reads 16 at a time, and past the end if they are not.
INT8_IN_MULTIPLE = 16
#: The same of an int4 layer (the smallest group), and what its outputs must be a multiple of.
INT4_IN_MULTIPLE, INT4_OUT_MULTIPLE = GROUP_SIZES[0], 16
#: From here on a layer is large: fewer rows pay for dequantizing it, since its codes are not in the cache.
_LARGE_WEIGHTS = 1 << 23
#: Weights that are dequantized at once: 2 MB in bfloat16. Larger pieces leave the cache, and from 32 MB on each
#: allocation is fetched anew from the system, which takes longer than the product.
_PIECE_WEIGHTS = 1 << 20


class _PackedLinear:
    """What both layers have in common. Buffers are all they hold: codes, scales, and the bias if there is one."""

    bits: int
    #: Most rows that the kernel multiplies faster than a product with the dequantized weight is.
    kernel_rows: int
    #: The buffer with the scales.
    scales_name: str
    codes: Any
    bias: Any

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: Any, device: Any) -> None:
        super().__init__()
        import torch

        self.in_features = in_features
        self.out_features = out_features
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_buffer("bias", empty)  # type: ignore[attr-defined]

    @property
    def weight(self) -> Any:
        """The weight (N, K) that is held, dequantized anew each time; some models look at its dtype, or use it."""
        return self.dequantized()

    def dequantized(self) -> Any:
        """The weight (N, K) that is held, in the scales' dtype."""
        raise NotImplementedError

    @property
    def product(self) -> str:
        """How a single row is multiplied here: `packed`, through torch's kernel, or `dequantized: ` and why."""
        why = self._why_not_packed()
        return "packed" if why is None else f"dequantized: {why}"

    def _why_not_packed(self) -> str | None:
        import torch

        support = kernel_support(self.bits)
        if not support.works:
            return support.why
        scales = getattr(self, self.scales_name)
        if scales.dtype is not torch.bfloat16:
            return "torch's kernel is fast in bfloat16 only"
        if scales.device.type != "cpu":
            return "torch's kernel runs on a CPU only"
        return None

    def forward(self, inputs: Any) -> Any:
        """Inputs (..., K) times the weight, plus the bias: (..., N), in the inputs' dtype."""
        buffers = self._buffers  # type: ignore[attr-defined]  # far faster to read than the attributes of a module
        codes, scales = buffers["codes"], buffers[self.scales_name]
        rows = inputs.reshape(-1, self.in_features).contiguous()
        if self._takes_kernel(rows, codes, scales):
            product = self._packed_product(rows, codes, scales)
        else:
            product = self._dequantized_product(rows)
        if (bias := buffers["bias"]) is not None:
            product = product + bias.to(product.dtype)
        return product.view(*inputs.shape[:-1], self.out_features)

    def _takes_kernel(self, rows: Any, codes: Any, scales: Any) -> bool:
        """Whether these rows (M, K) go through the kernel."""
        import torch

        return (
            0 < rows.shape[0] <= self.kernel_rows
            and rows.dtype is torch.bfloat16
            and scales.dtype is torch.bfloat16
            and rows.is_cpu
            and codes.data_ptr() % 64 == 0
            and not (rows.requires_grad and torch.is_grad_enabled())  # the kernels have no derivative
            and kernel_support(self.bits).works
        )

    def _packed_product(self, rows: Any, codes: Any, scales: Any) -> Any:
        raise NotImplementedError

    def _dequantized_product(self, rows: Any) -> Any:
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
    scales_name = "scale"
    scale: Any

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, dtype: Any = None, device: Any = None
    ) -> None:
        import torch

        if not fits_int8(in_features, out_features):
            raise _misfit(8, in_features, out_features, f"inputs must be a multiple of {INT8_IN_MULTIPLE}")
        super().__init__(in_features, out_features, bias, dtype, device)
        # Where both ways took equally long on one core of an AVX512 server CPU of 2024:
        # at 20 to 34 rows for weights of 0.1 to 4 million, at 12 to 14 for 17 and 28 million.
        self.kernel_rows = 20 if in_features * out_features < _LARGE_WEIGHTS else 12
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.register_buffer("codes", codes)  # type: ignore[attr-defined]
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
        self.codes, self.scale = int8_codes(weight.detach())

    def dequantized(self) -> Any:
        """The weight (N, K) that is held, in the scale's dtype."""
        return int8_weight(self.codes, self.scale)

    def finish(self) -> None:
        """Put the codes where the kernel may read them; a file mapped into memory has them anywhere."""
        if not _is_aligned(self.codes):
            self.codes = self.codes.clone()

    def _packed_product(self, rows: Any, codes: Any, scales: Any) -> Any:
        import torch

        # Of rows at other addresses torch 2.13's kernel reads some past their end, and the process ends.
        return torch._weight_int8pack_mm(rows if _is_aligned(rows) else rows.clone(), codes, scales)

    def _dequantized_product(self, rows: Any) -> Any:
        import torch

        scale = self.scale.to(rows.dtype)
        parts = []
        for start, stop in row_chunks(self.out_features, self.in_features, _PIECE_WEIGHTS):
            codes = self.codes[start:stop].to(rows.dtype)
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
    scales_name = "scale_and_zero"
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
        self.kernel_rows = 72  # at 67 to 76 rows for weights of 0.9 to 17 million, above 96 for smaller ones
        #: The order the codes are in; None is the portable one.
        self.layout: KernelLayout | None = None
        codes = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)  # type: ignore[attr-defined]
        lines = torch.empty(in_features // group_size, out_features, 2, dtype=dtype, device=device)
        self.register_buffer("scale_and_zero", lines)  # type: ignore[attr-defined]

    @classmethod
    def from_weight(cls, weight: Any, bias: Any = None, *, group_size: int = 32) -> Any:
        """A layer that holds `weight` (N, K) as nearly as 4 bits can; its codes in the portable order."""
        outputs, inputs = weight.shape
        has_bias = bias is not None
        layer = cls(inputs, outputs, group_size=group_size, bias=has_bias, dtype=weight.dtype, device=weight.device)
        layer.quantize(weight)
        layer.bias = None if bias is None else bias.detach()
        return layer

    def quantize(self, weight: Any) -> None:
        """Hold `weight` (N, K) from now on."""
        self.codes, self.scale_and_zero = int4_codes(weight.detach(), self.group_size)
        self.layout = None

    def dequantized(self) -> Any:
        """The weight (N, K) that is held, in the scales' dtype."""
        return int4_weight(self.portable_codes(), self.scale_and_zero)

    def portable_codes(self) -> Any:
        """The codes in the portable order: (N, K / 2) uint8. A copy where the layer holds them in another."""
        import torch

        if self.layout is None:
            return self.codes
        codes = torch.empty_like(self.codes)
        for start, stop in row_chunks(self.out_features, self.in_features, _PIECE_WEIGHTS):
            codes[start:stop] = self.layout.portable(self.codes, start, stop)
        return codes

    def finish(self) -> None:
        """Put the codes into the order of the kernel, where it is used; for a layer that is not on a CPU, nothing."""
        import torch

        if self.layout is not None or self._why_not_packed() is not None:
            return
        ordered = torch.empty_like(self.codes)
        for start, stop in row_chunks(self.out_features, self.in_features, _PIECE_WEIGHTS):
            codes = unpacked(self.codes[start:stop]).to(torch.int32)
            ordered[start:stop] = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.codes, self.layout = ordered, kernel_support(4).layout

    def _takes_kernel(self, rows: Any, codes: Any, scales: Any) -> bool:
        return self.layout is not None and super()._takes_kernel(rows, codes, scales)

    def _packed_product(self, rows: Any, codes: Any, scales: Any) -> Any:
        import torch

        return torch._weight_int4pack_mm_for_cpu(rows, codes, self.group_size, scales)

    def _dequantized_product(self, rows: Any) -> Any:
        import torch

        lines = self.scale_and_zero.to(rows.dtype)
        # The zeros are further inputs of the weight, and what comes in there is the sum of each group of inputs.
        sums = rows.unflatten(1, (-1, self.group_size)).sum(2, dtype=torch.float32).to(rows.dtype)
        rows = torch.cat([rows, sums], 1)
        found = []
        for start, stop in row_chunks(self.out_features, self.in_features, _PIECE_WEIGHTS):
            if self.layout is None:
                found.append(self._portable_piece(rows, lines[:, start:stop], start, stop))
                continue
            parts = self.layout.parts(self.out_features, start, stop)
            found += [self._ordered_piece(rows, lines[:, each.start : each.stop], each) for each in parts]
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _portable_piece(self, rows: Any, lines: Any, start: int, stop: int) -> Any:
        """The outputs from `start` to `stop` (M, n), of inputs and sums (M, K + K / g); `lines` (K / g, n, 2)."""
        import torch

        scale, zero = (each.t() for each in lines.unbind(2))
        weight = rows.new_empty(stop - start, rows.shape[1])
        codes = weight[:, : self.in_features]
        codes.copy_(unpacked(self.codes[start:stop]).view(torch.int8).sub_(8))
        codes.unflatten(1, (-1, self.group_size)).mul_(scale.contiguous()[:, :, None])
        weight[:, self.in_features :] = zero
        return torch.nn.functional.linear(rows, weight)

    def _ordered_piece(self, rows: Any, lines: Any, part: LayoutPart) -> Any:
        """The same of the outputs of `part`; each pass over their codes is over whole rows of numbers."""
        import torch

        scales, zeros = (part.split(each.contiguous()) for each in lines.unbind(2))
        found = []
        for ordered, scale, zero in zip(part.halves(self.codes), scales, zeros, strict=True):
            weight = rows.new_empty(rows.shape[1], ordered.shape[1])
            codes = weight[: self.in_features]
            codes.copy_(ordered.view(torch.int8).sub_(8))
            codes.unflatten(0, (-1, self.group_size)).mul_(scale[:, None])
            weight[self.in_features :] = zero
            found.append(rows @ weight)
        return part.both(*found)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        destination[f"{prefix}codes"] = self.portable_codes()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        was_finished = self.layout is not None
        if was_finished:
            self.codes, self.layout = self.portable_codes(), None
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
    return ConfigError(
        f"a linear layer of {in_features} inputs and {out_features} outputs cannot be held in {bits} bits", why=why
    )


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
