"""How many bytes a model takes: pure functions of its shape, a scheme, a dtype and a number of tokens.

Weights (counted in `hardware.weight_arithmetic`) and the KV cache are exact, which the tests hold against loaded
models. What is held for a moment only, while a prompt is computed or weights are loaded, is an estimate: its error is
said where it is made. Nothing here looks at a machine or decides.
"""

from __future__ import annotations

import math

from kani_nb.hardware.checkpoint_schemes import checkpoint_of, settings_of_checkpoint
from kani_nb.hardware.schemes import Scheme, find_scheme
from kani_nb.hardware.shapes import ModelShape
from kani_nb.hardware.weight_arithmetic import (
    WeightBytes,
    dtype_bytes,
    held_tensors,
    odd_shapes,
    quantized_tensors,
    sparing_tied_head,
    unmatched,
    weight_bytes,
)
from kani_nb.quantization import Quantization

__all__ = [
    "WeightBytes",
    "bytes_read_per_token",
    "can_quantize_kv",
    "disk_bytes",
    "dtype_bytes",
    "host_bytes",
    "kv_bytes",
    "kv_bytes_by_block",
    "kv_bytes_per_token",
    "odd_shapes",
    "quantized_tensors",
    "settings_of_checkpoint",
    "sparing_tied_head",
    "unmatched",
    "weight_bytes",
    "working_bytes",
]

#: Of a quantized KV cache: numbers that share a scale and a zero, and recent tokens that are kept as they are.
_KV_GROUP, _KV_RESIDUAL_TOKENS = 64, 128
#: Bytes of the steps of sampling for each token of the vocabulary: float32 scores, a sorted copy with places, masks.
_SAMPLING_BYTES = 32
#: LLM.int8() on top of a layer's own activations, for each number of its widest side: inputs in 16 and in 8 bits,
#: products in 32 bits, and, where the model computes in 16 bits, the products cast twice.
_INT8_BYTES, _INT8_CAST_BYTES = 8, 4
#: The packed schemes dequantize a weight in pieces of so many numbers.
_PACKED_PIECE = 1 << 20
#: Larger allocations than this are given back to Linux at once; smaller ones may stay with the process (malloc(3)).
_KEPT_BY_MALLOC = 32 * 1024**2


def can_quantize_kv(shape: ModelShape) -> bool:
    """Whether transformers has a quantized KV cache for it: it wants full attention in every layer."""
    return bool(shape.cache_layers) and all(layer.can_quantize for layer in shape.cache_layers)


def kv_bytes(shape: ModelShape, tokens: int, dtype: str, kv_bits: int | None = None) -> int:
    """The cache of one sequence of `tokens` tokens.

    Layers with a window hold no more than it. With `kv_bits` (4 or 8), at most: codes, a scale and a zero for each 64
    numbers, and the last 128 tokens as they are (transformers' `QuantizedCache`); where that cannot hold the model's
    layers, nothing is quantized.
    """
    return sum(kv_bytes_by_block(shape, tokens, dtype, kv_bits).values())


def kv_bytes_by_block(shape: ModelShape, tokens: int, dtype: str, kv_bits: int | None = None) -> dict[str, int]:
    """The same, by the part of a device map that it moves with."""
    size = dtype_bytes(dtype, shape)
    bits = kv_bits if kv_bits is not None and can_quantize_kv(shape) else None
    found: dict[str, int] = {}
    for layer in shape.cache_layers:
        kept = tokens if layer.window is None else min(tokens, layer.window)
        plain = kept if bits is None else min(kept, _KV_RESIDUAL_TOKENS)
        count = plain * layer.elements_per_token * size
        if bits is not None:
            count += _quantized_kv((kept - plain) * layer.elements_per_token, bits, size)
        count += layer.fixed_elements * size + layer.fixed_float32_elements * 4
        found[layer.block] = found.get(layer.block, 0) + count
    return found


def kv_bytes_per_token(shape: ModelShape, dtype: str, kv_bits: int | None = None) -> int:
    """What one more token adds, while no window is full."""
    size = dtype_bytes(dtype, shape)
    elements = sum(layer.elements_per_token for layer in shape.cache_layers)
    if kv_bits is None or not can_quantize_kv(shape):
        return elements * size
    return _quantized_kv(elements, kv_bits, size)


def _quantized_kv(elements: int, bits: int, size: int) -> int:
    return math.ceil(elements * bits / 8) + math.ceil(elements / _KV_GROUP) * 2 * size


def disk_bytes(shape: ModelShape, file_bytes: int | None = None) -> int:
    """What the weight files take on the disk: as they are, or as the configuration has them."""
    if file_bytes is not None:
        return file_bytes
    if shape.prequantized is None:
        return shape.parameters * dtype_bytes("auto", shape)
    checkpoint = checkpoint_of(shape.prequantized)
    dtype = shape.checkpoint_dtype or "float16"
    if checkpoint.scheme is not None:
        settings = checkpoint.settings or Quantization(checkpoint.method, llm_int8_skip_modules=checkpoint.skips)
        return weight_bytes(shape, settings, checkpoint.scheme, dtype).total
    linear = sum(each.elements for each in shape.tensors if each.kind in ("linear", "experts"))
    return int(linear * checkpoint.bits / 8) + (shape.parameters - linear) * dtype_bytes(dtype)


def bytes_read_per_token(
    shape: ModelShape,
    settings: Quantization,
    dtype: str,
    context_tokens: int,
    scheme: Scheme | None = None,
    kv_bits: int | None = None,
) -> int:
    """What generating one token reads: the weights it needs, the head among them, and the cache of the context.

    Args:
        shape: of a mixture of experts, those that one token is sent to are counted.
        settings: the scheme's.
        dtype: of what is not quantized.
        context_tokens: in the cache.
        scheme: one that has no name here, such as a checkpoint's own; by default that of `settings`.
        kv_bits: of a quantized KV cache.
    """
    found = scheme or find_scheme(settings.scheme)
    weights = sum(math.ceil(held.bytes * held.active) for held in held_tensors(shape, settings, found, dtype))
    return weights + kv_bytes(shape, context_tokens, dtype, kv_bits)


def working_bytes(
    shape: ModelShape,
    settings: Quantization,
    dtype: str,
    chunk_tokens: int,
    context_tokens: int,
    device_kind: str = "cpu",
    kv_bits: int | None = None,
) -> int:
    """What computing takes for a moment, beside weights and cache: a prompt's last chunk, or sampling.

    Against torch's own count of every allocation on a CPU while a whole prompt was computed (9 architectures, chunks of
    64 and 256 tokens, contexts of 256 to 2,048, float32 and bfloat16), weights not quantized, this was 0.95 to 1.2 of
    what was taken beside the cache. For int8 it is 1.0 to 1.6 of it, for 4-bit and packed schemes 1.1 to 1.8, and more
    where a CPU multiplies 4-bit codes directly (AVX512-BF16), which needs no copy of a weight. What a kernel takes
    inside is not seen: on a GPU, libraries take tens of MiB for themselves.

    Args:
        shape: whose `moments` were watched on the meta device; without them, a rule of thumb for a Llama's layer.
        settings: a scheme that dequantizes for a prompt needs its largest weight once in full.
        dtype: of activations and cache.
        chunk_tokens: tokens of the prompt that are computed at once; the head computes one of them.
        context_tokens: tokens in the cache after the chunk.
        device_kind: `cpu`, `cuda` or `mps`.
        kv_bits: of a quantized KV cache, which is expanded layer by layer.
    """
    size = dtype_bytes(dtype, shape)
    context = max(1, context_tokens)
    chunk = max(1, min(chunk_tokens, context))
    # The buffers of one layer's cache are there twice for a moment, when they grow: beside the layer's input, its
    # normalised input, queries, keys and values.
    growing = max((each.elements_per_token for each in shape.cache_layers if each.window is None), default=0)
    copies = 1 if kv_bits is None or not can_quantize_kv(shape) else 3  # those expanded, and joined with the rest
    grown = copies * growing * context + chunk * (5 * shape.hidden_size + growing)
    prefill = max(_activations(shape, chunk, context, size), grown * size)
    # A window's layer keeps the states of the whole chunk until the next one.
    beyond = sum(
        each.elements_per_token * min(chunk, max(0, context - each.window))
        for each in shape.cache_layers
        if each.window is not None
    )
    prefill += beyond * size + _expanded(shape, settings, chunk, size)
    sampling = shape.vocab_size * (size + _SAMPLING_BYTES)
    return int(max(prefill, sampling))


def _activations(shape: ModelShape, chunk: int, context: int, size: int) -> float:
    if shape.moments:
        return max(moment.bytes_at(chunk, context, size) for moment in shape.moments)
    inner = max(shape.intermediate_size, shape.hidden_size)
    scores = shape.attention_heads * context if shape.attention == "eager" else 0
    return chunk * ((3 * inner + 3 * shape.hidden_size + scores) * size + 4 * scores + context)


def _expanded(shape: ModelShape, settings: Quantization, chunk: int, size: int) -> int:
    """What a scheme adds to a prompt's activations."""
    if settings.is_none:
        return 0
    linear = [each for each in shape.tensors if each.kind == "linear"]
    largest = max((each.elements for each in linear), default=0)
    if settings.scheme == "int8":
        widest = max((max(each.out_features, each.in_features) for each in linear), default=0)
        return chunk * (widest * (_INT8_BYTES + (_INT8_CAST_BYTES if size < 4 else 0)) + shape.hidden_size)
    if settings.scheme in ("nf4", "fp4", "gptq"):
        return largest * size
    if settings.scheme in ("cpu-int8", "cpu-int4"):
        widest = max((each.out_features for each in linear), default=0)
        return (2 * min(largest, _PACKED_PIECE) + chunk * widest) * size
    return 0


def host_bytes(shape: ModelShape, settings: Quantization, scheme: Scheme, dtype: str, device_kind: str = "cpu") -> int:
    """Main memory that loading cannot do without, at its highest; the pages of files that are read come on top.

    Safetensors are mapped: weights that stay as they are take no copy, and what the system holds of the files it gives
    up when it must. Where bitsandbytes quantizes on the way, each weight is there in float32 a few times over, and
    small allocations stay with the process until they are trimmed. The anonymous memory of loading three models of
    135M, 514M and 869M parameters (transformers 5.23, glibc) was 0.4 to 1.05 of this: with nf4 1,276 MiB where the
    weights take 410. To a GPU tensors go one at a time; what that takes was not measured.
    """
    largest = max((each.elements // each.matrices for each in shape.tensors), default=0)
    source = dtype_bytes("auto", shape)
    if device_kind != "cpu":
        return 4 * largest * source
    weights = weight_bytes(shape, settings, scheme, dtype).total
    if scheme.backend == "torch" or shape.prequantized is not None:
        return weights
    quantized = max((each.elements for each in quantized_tensors(shape, settings, scheme)), default=0)
    if scheme.backend == "packed":  # works in pieces
        return weights + 2 * quantized * source
    in_float32 = 4 * quantized
    return weights + (4 * in_float32 if in_float32 > _KEPT_BY_MALLOC else shape.parameters * source)
