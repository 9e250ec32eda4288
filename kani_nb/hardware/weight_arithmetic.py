"""The bytes of a model's weights under a scheme, tensor by tensor: what is quantized, what stays, what it then takes.

Equal to the storages of the model after loading, before its first forward pass. Nothing here looks at a machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from kani_nb.hardware.schemes import Scheme, find_scheme
from kani_nb.hardware.shapes import ModelShape, TensorShape
from kani_nb.quantization import Quantization

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBytes:
    """What a model's parameters and buffers take once loaded, by what they are.

    Attributes:
        codes: quantized weights, without their scales.
        scales: scales and other statistics of the quantization.
        linear: weights of linear layers that are not quantized.
        experts: weights of experts that are not quantized.
        embeddings: tables that are looked up in; a head tied to one is in here.
        head: an output head of its own that is not quantized.
        other: norms, biases, routers of their own kind, buffers.
        by_block: all of it, by the part of a device map it moves with.
    """

    codes: int = 0
    scales: int = 0
    linear: int = 0
    experts: int = 0
    embeddings: int = 0
    head: int = 0
    other: int = 0
    by_block: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.by_block.values())


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor as it is held in memory.

    Attributes:
        bytes: with its scales.
        codes: how many of them are codes; None where it is not quantized.
        active: the share that one token reads.
    """

    tensor: TensorShape
    bytes: int
    codes: int | None
    active: float


def dtype_bytes(dtype: str, shape: ModelShape | None = None) -> int:
    """Bytes of one number; `auto` is the checkpoint's dtype, float32 where that does not say."""
    name = dtype if dtype != "auto" else (shape.checkpoint_dtype if shape is not None else None) or "float32"
    return _BYTES.get(name, 2)


def weight_bytes(shape: ModelShape, settings: Quantization, scheme: Scheme, dtype: str) -> WeightBytes:
    """What the model takes under `scheme`, with what is not quantized in `dtype`.

    Equal to the storages after loading, before the first forward pass (bitsandbytes and the packed schemes may then
    put codes and scales into another order, of the same size or smaller).
    """
    sums = dict.fromkeys(("codes", "scales", "linear", "experts", "embeddings", "head", "other"), 0)
    by_block = dict.fromkeys(shape.blocks, 0)
    for held in held_tensors(shape, settings, scheme, dtype):
        by_block[held.tensor.block] = by_block.get(held.tensor.block, 0) + held.bytes
        if held.codes is None:
            sums["embeddings" if held.tensor.kind == "embedding" else held.tensor.kind] += held.bytes
        else:
            sums["codes"] += held.codes
            sums["scales"] += held.bytes - held.codes
    return WeightBytes(**sums, by_block=by_block)


def quantized_tensors(shape: ModelShape, settings: Quantization, scheme: Scheme) -> list[TensorShape]:
    """The weights that `scheme` replaces; a tied head is among them where it becomes a weight of its own."""
    if scheme.backend == "torch":
        return []
    if scheme.backend == "gguf":
        return [each for each in shape.tensors if each.out_features]
    patterns = _skips(shape, settings, scheme)
    kinds = scheme.quantizes | ({"head"} if "linear" in scheme.quantizes else set())
    tensors = list(shape.tensors)
    if (tied := tied_head(shape)) is not None and scheme.quantizes_head:
        tensors.append(tied)
    found = [each for each in tensors if each.kind in kinds and each.out_features]
    if scheme.backend == "packed":  # this package's own leaves more alone
        found = [each for each in found if not (each.is_conv1d or each.is_kept_float32 or each.is_kept_from_float16)]
    return [
        each
        for each in found
        if not _is_matched(each.module, patterns)
        and not (scheme.leaves_odd_shapes and _is_odd(each, _scheme_for(each, scheme)))
    ]


def odd_shapes(shape: ModelShape, settings: Quantization, scheme: Scheme) -> list[TensorShape]:
    """Quantized weights whose inputs or outputs are no multiple of what the scheme's kernels need."""
    return [each for each in quantized_tensors(shape, settings, scheme) if _is_odd(each, _scheme_for(each, scheme))]


def unmatched(shape: ModelShape, patterns: Sequence[str]) -> list[str]:
    """Those of `patterns` (names, suffixes, regular expressions from the start) that no linear layer is matched by."""
    modules = {each.module for each in shape.tensors if each.kind in ("linear", "head")} | {shape.head} - {""}

    def matches(pattern: str) -> bool:
        try:
            return any(_is_matched(module, (pattern,)) for module in modules)
        except re.error:
            return False

    return [each for each in patterns if not matches(each)]


def sparing_tied_head(shape: ModelShape, settings: Quantization, scheme: Scheme) -> Quantization:
    """`settings` with the tied head among the modules to skip, where bitsandbytes would otherwise replace it.

    A list of modules to skip replaces the default, which has the head in it. A layer that bitsandbytes put in the place
    of a tied head gets the embedding's weight back, which it cannot multiply: the first answer fails.
    """
    asked = settings.llm_int8_skip_modules
    if scheme.backend != "bitsandbytes" or asked is None or not shape.has_tied_head or _is_matched(shape.head, asked):
        return settings
    return replace(settings, llm_int8_skip_modules=(*asked, shape.head))


def tied_head(shape: ModelShape) -> TensorShape | None:
    """The head as a weight of its own, where it is the embedding; no tensor of the shape."""
    embedding = next((each for each in shape.tensors if each.kind == "embedding" and each.active), None)
    if not shape.has_tied_head or embedding is None:
        return None
    return TensorShape(
        name=f"{shape.head}.weight",
        module=shape.head,
        block=shape.head if shape.head in shape.blocks else embedding.block,
        kind="head",
        elements=embedding.elements,
        out_features=embedding.out_features,
        in_features=embedding.in_features,
    )


def held_tensors(shape: ModelShape, settings: Quantization, scheme: Scheme, dtype: str) -> Iterator[Held]:
    """Everything that is in memory after loading."""
    name = dtype if dtype != "auto" else shape.checkpoint_dtype or "float32"
    size = dtype_bytes(name)
    chosen = {each.name: each for each in quantized_tensors(shape, settings, scheme)}
    tied = tied_head(shape)
    copied = tied is not None and tied.name in chosen
    for tensor in shape.tensors:
        if tensor.name in chosen:
            yield _quantized(tensor, shape, settings, scheme, size)
            continue
        # An embedding beside a head of its own is only looked up.
        active = 0.0 if copied and tensor.kind == "embedding" else tensor.active
        own = 4 if scheme.backend == "gguf" else _number_bytes(tensor, name, size)  # norms in a GGUF are float32
        yield Held(tensor, tensor.elements * own, None, active)
    if copied and tied is not None:
        yield _quantized(tied, shape, settings, scheme, size)


def _quantized(tensor: TensorShape, shape: ModelShape, settings: Quantization, scheme: Scheme, size: int) -> Held:
    own = _scheme_for(tensor, scheme)
    if scheme.backend == "gguf" and _is_gguf_output(tensor, shape):
        own = _gguf_output_scheme(tensor, scheme)
    count = own.linear_bytes(tensor.out_features, tensor.in_features, settings, size) * tensor.matrices
    codes = min(count, math.ceil(tensor.elements * _code_bits(settings, own) / 8))
    return Held(tensor, count, codes, tensor.active)


def _number_bytes(tensor: TensorShape, dtype: str, size: int) -> int:
    if tensor.own_bytes:
        return tensor.own_bytes
    if tensor.is_kept_float32 or (tensor.is_kept_from_float16 and dtype == "float16"):
        return max(4, size)
    return size


def _skips(shape: ModelShape, settings: Quantization, scheme: Scheme) -> tuple[str, ...]:
    """The patterns of modules that stay as they are."""
    asked = settings.llm_int8_skip_modules
    if asked is not None:
        return (*asked, *shape.constant_skips)
    return shape.constant_skips if scheme.quantizes_head else (*shape.default_skips, *shape.constant_skips)


def _is_matched(module: str, patterns: Sequence[str]) -> bool:
    """Transformers' own rule: from the start up to a dot, by name or as a regular expression; or at the end."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(module, list(patterns))


def _scheme_for(tensor: TensorShape, scheme: Scheme) -> Scheme:
    """The scheme itself, or the one that it holds the head in."""
    return find_scheme(scheme.head_scheme) if tensor.kind == "head" and scheme.head_scheme else scheme


def _is_odd(tensor: TensorShape, scheme: Scheme) -> bool:
    return bool(tensor.in_features % scheme.in_multiple or tensor.out_features % scheme.out_multiple)


def _is_gguf_output(tensor: TensorShape, shape: ModelShape) -> bool:
    return tensor.kind == "head" or (shape.has_tied_head and tensor.kind == "embedding" and tensor.active > 0)


def _gguf_output_scheme(tensor: TensorShape, scheme: Scheme) -> Scheme:
    """What llama.cpp holds the head in, or an embedding that is one: Q6_K, or Q8_0 where rows do not fit its blocks."""
    own = find_scheme("q8_0" if tensor.in_features % 256 else "q6_k")
    return max(own, scheme, key=lambda each: each.bits_per_weight())


def _code_bits(settings: Quantization, scheme: Scheme) -> int:
    """Bits of one quantized weight, its scales left out."""
    bits = scheme.bits_per_weight(settings)
    return math.ceil(bits) - 1 if scheme.backend == "gguf" else math.floor(bits)
