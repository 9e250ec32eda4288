"""How GPTQ keeps a linear layer: integer codes packed along the inputs, a scale and a zero point for each group.

The format is that of GPTQ-for-LLaMa (`quant.py`), which AutoGPTQ, gptqmodel and transformers took over. For a layer of
K inputs and N outputs in B bits, with G groups of inputs:

    qweight  (K * B / 32, N)  int32    codes; 32 bits of a column are as many inputs as fit, the first one lowest
    qzeros   (G, N * B / 32)  int32    zero points, packed along the outputs
    scales   (G, N)           float16
    g_idx    (K,)             int32    the group of each input

    weight[n, k] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])

Files of the first version (`gptq`) hold each zero point minus one; those of the second (`gptq_v2`) hold it as it is.
Nothing here reads or writes a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kani_nb.errors import ModelFilesError

if TYPE_CHECKING:
    import torch

BITS = (2, 3, 4, 8)
#: What a layer's tensors are called after its name.
PARTS = ("qweight", "qzeros", "scales", "g_idx")
_WORD = 32
#: Group sizes that are in use.
USUAL_SIZES = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class GptqLayer:
    """One linear layer, its tensors as the table above has them.

    Attributes:
        zeros: the zero points themselves, `(G, N)` int32.
        g_idx: None where the groups follow each other, so that it says nothing.
    """

    name: str
    bits: int
    qweight: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor | None

    @property
    def in_features(self) -> int:
        """K."""
        return int(self.qweight.shape[0]) * _WORD // self.bits

    @property
    def groups(self) -> int:
        """G."""
        return int(self.scales.shape[0])

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is the middle of the codes, as symmetric quantization has it."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    def fits(self, group_size: int) -> bool:
        """Whether its groups can be of that many inputs; -1 is one group for all."""
        if not fits(self.in_features, self.groups, group_size):
            return False
        # Groups that do not follow each other still have their size.
        return self.g_idx is None or int(self.g_idx.bincount().max()) == min(group_size, self.in_features)

    def tensors(self, version: int, group_size: int) -> dict[str, torch.Tensor]:
        """What a file of that version of the format holds, by full name."""
        import torch

        stored = self.zeros - 1 if version == 1 else self.zeros
        kept = (self.qweight, pack(stored.T, self.bits).T, self.scales.to(torch.float16), self._group_of(group_size))
        return {f"{self.name}.{part}": each.contiguous() for part, each in zip(PARTS, kept, strict=True)}

    def dequantized(self, group_size: int) -> torch.Tensor:
        """The weight, `(N, K)` float32."""
        g_idx = self._group_of(group_size)
        codes = unpack(self.qweight, self.bits)[: self.in_features]
        return ((codes - self.zeros[g_idx]) * self.scales.float()[g_idx]).T

    def regrouped(self, group_size: int, size: int) -> GptqLayer:
        """The same weights in smaller groups, each with the scales and zero points of the group that it is a part of.

        Args:
            group_size: inputs in a group now; -1 is all of them.
            size: inputs in a group then; it must divide both `group_size` and the inputs.
        """
        import torch

        index = self._group_of(group_size).long()
        order = index.argsort(stable=True)
        parents = index[order][::size]
        g_idx = None
        if self.g_idx is not None:
            g_idx = torch.empty_like(self.g_idx)
            g_idx[order] = torch.arange(self.in_features, dtype=torch.int32) // size
        return replace(self, zeros=self.zeros[parents], scales=self.scales[parents], g_idx=g_idx)

    def _group_of(self, group_size: int) -> torch.Tensor:
        import torch

        if self.g_idx is not None:
            return self.g_idx
        size = self.in_features if group_size == -1 else group_size
        return torch.arange(self.in_features, dtype=torch.int32) // size


def read_layer(name: str, parts: dict[str, torch.Tensor], bits: int, version: int) -> GptqLayer:
    """The layer of that name from its tensors in a file, by the last word of their names.

    Raises:
        ModelFilesError: one is missing or of the wrong kind, they do not belong together, or a zero point is out of
            range.
    """
    import torch

    parts = _of_first_files(parts, bits) if "zeros" in parts else parts
    missing = [part for part in PARTS[:3] if part not in parts]
    if missing:
        raise ModelFilesError(f"{name} has no {' and no '.join(missing)}")
    qweight, qzeros, scales = (parts[part] for part in PARTS[:3])
    for part in ("qweight", "qzeros"):
        if parts[part].dtype != torch.int32 or parts[part].dim() != 2:
            raise ModelFilesError(f"{name}.{part} is {_kind(parts[part])}", why="it must be a matrix of int32")
    outputs = qweight.shape[1]
    if scales.dim() != 2 or scales.shape[1] != outputs or not scales.is_floating_point():
        raise ModelFilesError(
            f"{name}.scales is {_kind(scales)}", why=f"it must have {outputs} columns, as {name}.qweight has"
        )
    per_block, words = _block(bits)
    wanted = (scales.shape[0], math.ceil(outputs / per_block) * words)
    if tuple(qzeros.shape) != wanted:
        raise ModelFilesError(
            f"{name}.qzeros is {_kind(qzeros)}",
            why=f"{bits} bits for {outputs} outputs in {scales.shape[0]} groups take {wanted}",
        )
    zeros = unpack(qzeros.T, bits)[:outputs].T
    if version == 1:
        # One more would not fit its bits, and readers that add one to the packed words carry it into the neighbour.
        if bool((zeros == 2**bits - 1).any()):
            raise ModelFilesError(
                f"{name}.qzeros holds zero points that do not fit {bits} bits", why="the file is damaged"
            )
        zeros = zeros + 1
    inputs = qweight.shape[0] * _WORD // bits
    return GptqLayer(name, bits, qweight, zeros, scales, _order(name, parts.get("g_idx"), inputs, scales.shape[0]))


def fits(inputs: int, groups: int, group_size: int) -> bool:
    """Whether so many inputs make so many groups of that size; -1 is one group for all."""
    return groups == (1 if group_size == -1 else math.ceil(inputs / group_size))


def sizes_that_fit(layers: Iterable[GptqLayer], also: int) -> list[int]:
    """The usual group sizes, and `also`, that suit every one of `layers`."""
    sizes, layers = sorted({*USUAL_SIZES, also, -1} - {0}), list(layers)
    return [size for size in sizes if all(layer.fits(size) for layer in layers)]


def bits_of(qweight: torch.Tensor, in_features: int) -> int | None:
    """The bits that `qweight` has for so many inputs, or None where it cannot be for them."""
    return next((bits for bits in BITS if qweight.shape[0] * _WORD == in_features * bits), None)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """`(K, N)` integers below 2**bits as `(K * bits / 32, N)` int32: each column one stream of bits, the lowest first.

    For 3 bits, which do not divide 32, values run over the ends of words; GPTQ-for-LLaMa packs them in the same way.
    """
    import torch

    per_block, words = _block(bits)
    values = values.to(torch.int64)
    if rest := values.shape[0] % per_block:
        values = torch.cat([values, values.new_zeros(per_block - rest, values.shape[1])])
    blocks = values.reshape(-1, per_block, values.shape[1])
    packed = values.new_zeros(blocks.shape[0], words, values.shape[1])
    for index in range(per_block):
        word, shift = divmod(index * bits, _WORD)
        packed[:, word] |= (blocks[:, index] << shift) & 0xFFFFFFFF
        if shift + bits > _WORD:
            packed[:, word + 1] |= blocks[:, index] >> (_WORD - shift)
    packed = packed.reshape(-1, values.shape[1])
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """What `pack` was given, as int32, with the zeros that it may have added."""
    import torch

    per_block, words = _block(bits)
    blocks = (packed.to(torch.int64) & 0xFFFFFFFF).reshape(-1, words, packed.shape[1])
    values = []
    for index in range(per_block):
        word, shift = divmod(index * bits, _WORD)
        value = blocks[:, word] >> shift
        if shift + bits > _WORD:
            value = value | (blocks[:, word + 1] << (_WORD - shift))
        values.append(value & (2**bits - 1))
    return torch.stack(values, dim=1).reshape(-1, packed.shape[1]).to(torch.int32)


def _block(bits: int) -> tuple[int, int]:
    """Values and words of the shortest run that ends with both."""
    words = bits // math.gcd(bits, _WORD)
    return words * _WORD // bits, words


def _of_first_files(parts: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """The tensors of a file from before there were groups: scales and zeros times scales in floats, `(N, 1)` each."""
    import torch

    if "scales" not in parts or parts["scales"].shape != parts["zeros"].shape:
        return parts
    scales = parts["scales"].reshape(1, -1)
    zeros = (parts["zeros"].reshape(1, -1).float() / scales.float()).round().to(torch.int32)
    stored = (zeros - 1) & (2**bits - 1)
    return {"qweight": parts["qweight"], "qzeros": pack(stored.T, bits).T, "scales": scales}


def _order(name: str, g_idx: torch.Tensor | None, inputs: int, groups: int) -> torch.Tensor | None:
    """`g_idx` where it says something: not where groups follow each other, nor where a writer left it at zero."""
    import torch

    if g_idx is None or (groups > 1 and not bool(g_idx.any())):
        return None
    if g_idx.shape != (inputs,) or int(g_idx.min()) < 0 or int(g_idx.max()) >= groups:
        raise ModelFilesError(
            f"{name}.g_idx is {_kind(g_idx)}", why=f"it must give one of {groups} groups to each of {inputs} inputs"
        )
    ordered = bool((g_idx[1:] >= g_idx[:-1]).all())
    if ordered and int(g_idx.max()) == groups - 1 and _is_even(g_idx):
        return None
    return g_idx.to(torch.int32)


def _is_even(g_idx: torch.Tensor) -> bool:
    """Whether all groups but the last are of one size."""
    counts = g_idx.bincount()
    return bool((counts[:-1] == counts[0]).all()) and bool(counts[-1] <= counts[0])


def _kind(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
