"""From a model's shape to what each block costs: the bytes that placing needs, and the time of a token at least.

Everything is counted by `hardware.arithmetic`; this cuts a model as a device map does and asks it for each part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kani_nb.hardware.arithmetic import (
    WeightBytes,
    bytes_read_per_token,
    dtype_bytes,
    kv_bytes_by_block,
    weight_bytes,
)
from kani_nb.hardware.placement import device_of, key_of
from kani_nb.hardware.plans import Budget
from kani_nb.hardware.schemes import Scheme, find_scheme
from kani_nb.hardware.shapes import ModelShape
from kani_nb.hardware.spreading import BlockCost
from kani_nb.quantization import Quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class Costing:
    """A model in a precision: everything about its bytes but the context and the devices.

    Attributes:
        shape: its blocks are what is placed.
        dtype: of what is not quantized.
        kv_bits: of a quantized KV cache; None keeps it in the dtype.
    """

    shape: ModelShape
    settings: Quantization
    scheme: Scheme
    dtype: str
    kv_bits: int | None = None

    @property
    def kept_aside(self) -> tuple[Quantization, Scheme]:
        """What weights are that lie on the CPU or the disk: bitsandbytes leaves those as they are."""
        if self.scheme.backend == "bitsandbytes":
            return Quantization(), find_scheme("none")
        return self.settings, self.scheme

    def weights(self) -> WeightBytes:
        """What the weights take where they are computed with."""
        return weight_bytes(self.shape, self.settings, self.scheme, self.dtype)

    def blocks(self, weights: Mapping[str, int], context_tokens: int, *, is_offloading: bool = True) -> list[BlockCost]:
        """What each block takes at that context, in running order; `weights` by block, from `weights()`."""
        shape = self.shape
        aside, streamed = weights, dict[str, int]()
        if is_offloading:
            aside = weight_bytes(shape, *self.kept_aside, self.dtype).by_block
            streamed = _largest_modules(shape, self.dtype)
        following = _following(shape)
        kv = kv_bytes_by_block(shape, context_tokens, self.dtype, self.kv_bits)
        return [
            BlockCost(
                name=name,
                weight_bytes=weights.get(name, 0),
                kv_bytes=kv.get(name, 0),
                offloaded_bytes=aside.get(name, 0),
                streamed_bytes=streamed.get(name, 0),
                follows=following.get(name, ""),
            )
            for name in shape.blocks
        ]

    def with_context(self, blocks: Sequence[BlockCost], context_tokens: int) -> list[BlockCost]:
        """The same blocks at another context."""
        kv = kv_bytes_by_block(self.shape, context_tokens, self.dtype, self.kv_bits)
        return [replace(block, kv_bytes=kv.get(block.name, 0)) for block in blocks]

    def seconds_per_token(
        self, device_map: Mapping[str, str], budgets: Sequence[Budget], context_tokens: int
    ) -> float | None:
        """The least that a token takes: what each device reads for it over that device's bandwidth, one after another.

        What is kept aside is read from there, however it then travels. None where a bandwidth is not known.
        """
        speeds = {each.name: each.bandwidth_bytes_per_s for each in budgets}
        accelerators = {each for each in device_map.values() if each not in ("cpu", "disk")}
        total = 0.0
        for device in dict.fromkeys(device_map.values()):
            speed = speeds.get(device)
            if not speed:
                return None
            is_aside = device == "disk" or (device == "cpu" and bool(accelerators))
            settings, scheme = self.kept_aside if is_aside else (self.settings, self.scheme)
            held = part(self.shape, {name for name, where in device_map.items() if where == device})
            read = bytes_read_per_token(held, settings, self.dtype, context_tokens, scheme, self.kv_bits)
            total += read / speed
        return total or None


def part(shape: ModelShape, blocks: set[str]) -> ModelShape:
    """Only what belongs to `blocks`."""
    if blocks >= set(shape.blocks):
        return shape
    return replace(
        shape,
        tensors=tuple(each for each in shape.tensors if each.block in blocks),
        cache_layers=tuple(each for each in shape.cache_layers if each.block in blocks),
        blocks=tuple(each for each in shape.blocks if each in blocks),
    )


def cut_as(shape: ModelShape, device_map: Mapping[str, str]) -> ModelShape:
    """The shape with blocks cut where the map cuts inside one, `model.layers.0` into `model.layers.0.mlp` and others.

    The cache of a layer that is cut goes with its attention.
    """
    blocks: dict[str, list[str]] = {block: [] for block in shape.blocks}
    tensors = []
    for tensor in shape.tensors:
        key = key_of(tensor.name, device_map)
        unit = key if key is not None and key.startswith(f"{tensor.block}.") else tensor.block
        blocks[tensor.block].append(unit)
        tensors.append(replace(tensor, block=unit))
    units = {block: list(dict.fromkeys(found)) or [block] for block, found in blocks.items()}
    homes = {block: next((each for each in found if "attn" in each), found[0]) for block, found in units.items()}
    return replace(
        shape,
        tensors=tuple(tensors),
        cache_layers=tuple(replace(each, block=homes.get(each.block, each.block)) for each in shape.cache_layers),
        blocks=tuple(unit for found in units.values() for unit in found),
    )


def told_places(shape: ModelShape, device_map: Mapping[str, str]) -> dict[str, str]:
    """Where a checked map puts each block of a shape that was cut for it; a tied head goes with its embedding."""
    following = _following(shape)
    first: dict[str, str] = {}
    for tensor in shape.tensors:
        where = device_of(tensor.name, device_map)
        assert where is not None, "the map was checked: it has a place for every tensor"
        first.setdefault(tensor.block, where)
    return {
        block: first.get(following.get(block, block)) or device_of(block, device_map) or "cpu" for block in shape.blocks
    }


def _following(shape: ModelShape) -> dict[str, str]:
    """Blocks that hold nothing but what is tied to the embedding, and the embedding's block."""
    if not shape.has_tied_head:
        return {}
    tied = next((each.block for each in shape.tensors if each.kind == "embedding" and each.active), "")
    holding = {each.block for each in shape.tensors}
    return {block: tied for block in shape.blocks if block not in holding and tied}


def _largest_modules(shape: ModelShape, dtype: str) -> dict[str, int]:
    """Bytes of the largest module of each block, unquantized."""
    size = dtype_bytes(dtype, shape)
    modules: dict[tuple[str, str], int] = {}
    for tensor in shape.tensors:
        key = (tensor.block, tensor.module)
        modules[key] = modules.get(key, 0) + tensor.elements * (tensor.own_bytes or size)
    found: dict[str, int] = {}
    for (block, _), count in modules.items():
        found[block] = max(found.get(block, 0), count)
    return found
