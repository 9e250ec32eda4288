"""How many bytes a model takes: pure functions of its shape, a scheme, a dtype and a number of tokens.

Weights are counted as they lie in memory after loading and before the first forward pass; the KV cache as
transformers' cache classes store it; working memory is an estimate, whose error is said where it is made. Nothing here
looks at a machine, decides, or loads a library heavier than the matching rule of transformers' quantizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kani_nb.hardware.checkpoint_schemes import settings_of_checkpoint
from kani_nb.hardware.schemes import Scheme, find_scheme
from kani_nb.hardware.shapes import ModelShape, TensorShape
from kani_nb.quantization import Quantization

__all__ = [
    "WeightBytes",
    "bytes_read_per_token",
    "disk_bytes",
    "dtype_bytes",
    "host_bytes",
    "kv_bytes",
    "kv_bytes_by_block",
    "kv_bytes_per_token",
    "odd_shapes",
    "quantized_tensors",
    "settings_of_checkpoint",
    "unmatched",
    "weight_bytes",
    "working_bytes",
]

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


def dtype_bytes(dtype: str, shape: ModelShape | None = None) -> int:
    """Bytes of one number; `auto` is the checkpoint's dtype, float32 where that does not say."""
    name = dtype if dtype != "auto" else (shape.checkpoint_dtype if shape is not None else None) or "float32"
    return _BYTES.get(name, 2)


def weight_bytes(shape: ModelShape, settings: Quantization, scheme: Scheme, dtype: str) -> WeightBytes:
    """What the model takes under `scheme`, with what is not quantized in `dtype`.

    Equal to the storages after loading, before the first forward pass.
    """
    dtype = _resolved(dtype, shape)
    size = dtype_bytes(dtype)
    chosen = {tensor.name for tensor in quantized_tensors(shape, settings, scheme)}
    bits = _code_bits(settings, scheme)
    sums = dict.fromkeys(("codes", "scales", "linear", "experts", "embeddings", "head", "other"), 0)
    by_block = dict.fromkeys(shape.blocks, 0)

    def add(kind: str, count: int, block: str) -> None:
        sums[kind] += count
        by_block[block] = by_block.get(block, 0) + count

    for tensor, count, is_quantized in _counted(shape, settings, scheme, dtype, chosen):
        if is_quantized:
            codes = min(count, math.ceil(tensor.elements * bits / 8))
            add("codes", codes, tensor.block)
            add("scales", count - codes, tensor.block)
        else:
            add({"embedding": "embeddings"}.get(tensor.kind, tensor.kind), count, tensor.block)
    if (copy := _head_copy(shape, settings, scheme)) is not None:
        count = scheme.linear_bytes(copy.out_features, copy.in_features, settings, size)
        codes = min(count, math.ceil(copy.elements * bits / 8))
        add("codes", codes, copy.block)
        add("scales", count - codes, copy.block)
    return WeightBytes(**sums, by_block=by_block)


def quantized_tensors(shape: ModelShape, settings: Quantization, scheme: Scheme) -> list[TensorShape]:
    """The weights that `scheme` replaces, a tied head left out: it is an embedding."""
    if scheme.backend == "torch":
        return []
    if scheme.backend == "gguf":
        return [each for each in shape.tensors if each.out_features]
    patterns = _skips(shape, settings, scheme)
    kinds = scheme.quantizes | ({"head"} if "linear" in scheme.quantizes else set())
    found = [
        each
        for each in shape.tensors
        if each.kind in kinds and each.out_features and not _is_matched(each.module, patterns)
    ]
    return [each for each in found if not (scheme.leaves_odd_shapes and _is_odd(each, scheme))]


def odd_shapes(shape: ModelShape, settings: Quantization, scheme: Scheme) -> list[TensorShape]:
    """Quantized weights whose inputs or outputs are no multiple of what the scheme's kernels need."""
    return [each for each in quantized_tensors(shape, settings, scheme) if _is_odd(each, scheme)]


def unmatched(shape: ModelShape, patterns: Sequence[str]) -> list[str]:
    """Those of `patterns` (names, suffixes, regular expressions from the start) that are no module of the model."""
    modules = {each.module for each in shape.tensors if each.kind in ("linear", "head")}
    modules |= {"lm_head"} if shape.has_tied_head else set()
    return [each for each in patterns if not any(_is_matched(module, (each,)) for module in modules)]


def kv_bytes(shape: ModelShape, tokens: int, dtype: str, kv_bits: int | None = None) -> int:
    """The cache of one sequence of `tokens` tokens; layers with a window hold no more than it."""
    return sum(kv_bytes_by_block(shape, tokens, dtype, kv_bits).values())


def kv_bytes_by_block(shape: ModelShape, tokens: int, dtype: str, kv_bits: int | None = None) -> dict[str, int]:
    """The same, by the part of a device map that it moves with."""
    size = dtype_bytes(dtype, shape)
    found: dict[str, int] = {}
    for layer in shape.cache_layers:
        kept = tokens if layer.window is None else min(tokens, layer.window)
        count = kept * layer.elements_per_token * size
        count += layer.fixed_elements * size + layer.fixed_float32_elements * 4
        found[layer.block] = found.get(layer.block, 0) + count
    return found


def kv_bytes_per_token(shape: ModelShape, dtype: str, kv_bits: int | None = None) -> int:
    """What one more token adds, while no window is full."""
    return sum(layer.elements_per_token for layer in shape.cache_layers) * dtype_bytes(dtype, shape)


def working_bytes(
    shape: ModelShape,
    settings: Quantization,
    dtype: str,
    chunk_tokens: int,
    context_tokens: int,
    device_kind: str = "cpu",
) -> int:
    """What computing one chunk of a prompt takes for a moment, beside weights and cache."""
    size = dtype_bytes(dtype, shape)
    wide = max(shape.intermediate_size * 3, shape.hidden_size * 6)
    activations = chunk_tokens * (shape.hidden_size * 2 + wide) * size
    logits = shape.vocab_size * (size + 4)
    return activations + logits


def host_bytes(shape: ModelShape, settings: Quantization, scheme: Scheme, dtype: str, device_kind: str = "cpu") -> int:
    """Main memory that loading takes at its highest."""
    return weight_bytes(shape, settings, scheme, dtype).total


def disk_bytes(shape: ModelShape, file_bytes: int | None = None) -> int:
    """What the weight files take on the disk: as they are, or as the configuration has them."""
    if file_bytes is not None:
        return file_bytes
    return shape.parameters * dtype_bytes("auto", shape)


def bytes_read_per_token(shape: ModelShape, settings: Quantization, dtype: str, context_tokens: int) -> int:
    """What generating one token reads: the weights it needs, the head among them, and the cache of the context."""
    scheme = find_scheme(settings.scheme)
    dtype = _resolved(dtype, shape)
    chosen = {tensor.name for tensor in quantized_tensors(shape, settings, scheme)}
    weights = sum(math.ceil(count * each.active) for each, count, _ in _counted(shape, settings, scheme, dtype, chosen))
    return weights + kv_bytes(shape, context_tokens, dtype)


def _counted(
    shape: ModelShape, settings: Quantization, scheme: Scheme, dtype: str, chosen: set[str]
) -> Iterator[tuple[TensorShape, int, bool]]:
    """Each tensor with its bytes, and whether it is quantized."""
    size = dtype_bytes(dtype)
    for tensor in shape.tensors:
        if tensor.name in chosen:
            count = scheme.linear_bytes(tensor.out_features, tensor.in_features, settings, size) * tensor.matrices
            yield tensor, count, True
            continue
        yield tensor, tensor.elements * _own_size(tensor, dtype, size), False


def _own_size(tensor: TensorShape, dtype: str, size: int) -> int:
    if tensor.own_bytes:
        return tensor.own_bytes
    if tensor.is_kept_float32 or (tensor.is_kept_from_float16 and dtype == "float16"):
        return max(4, size)
    return size


def _resolved(dtype: str, shape: ModelShape) -> str:
    return dtype if dtype != "auto" else shape.checkpoint_dtype or "float32"


def _skips(shape: ModelShape, settings: Quantization, scheme: Scheme) -> tuple[str, ...]:
    """The patterns of modules that stay as they are."""
    asked = settings.llm_int8_skip_modules
    if asked is not None:
        return (*asked, *shape.constant_skips)
    if scheme.quantizes_head:
        return shape.constant_skips
    return (*shape.default_skips, *shape.constant_skips)


def _is_matched(module: str, patterns: Sequence[str]) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(module, list(patterns))


def _is_odd(tensor: TensorShape, scheme: Scheme) -> bool:
    return bool(tensor.in_features % scheme.in_multiple or tensor.out_features % scheme.out_multiple)


def _head_copy(shape: ModelShape, settings: Quantization, scheme: Scheme) -> TensorShape | None:
    """The embedding whose quantized copy serves as head, where it is tied and the scheme quantizes heads."""
    if not (scheme.quantizes_head and shape.has_tied_head) or scheme.backend == "gguf":
        return None
    return next((each for each in shape.tensors if each.kind == "embedding" and each.active), None)


def _code_bits(settings: Quantization, scheme: Scheme) -> int:
    """Bits of one quantized weight, its scales left out."""
    bits = scheme.bits_per_weight(settings)
    return math.ceil(bits) - 1 if scheme.backend == "gguf" else math.floor(bits)
