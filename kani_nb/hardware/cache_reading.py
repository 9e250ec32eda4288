"""What a model's cache keeps of each token, seen by running the model on the meta device with transformers' own cache.

Grouped-query attention, latent attention, layers that share or window their states and recurrent states all show
themselves. Where a model cannot be run there (its shapes depend on values, and there are none), the configuration's
numbers of heads are taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kani_nb.hardware import meta_runs
from kani_nb.hardware.shapes import CacheLayer

#: Tokens of the two runs whose difference shows what grows, where a cache layer is of a kind not known here; just short
#: of round numbers, where those that compress their states in blocks hold most.
_SHORT, _LONG = 127, 255


@dataclass(frozen=True, slots=True)
class Observed:
    """What a run on the meta device showed.

    Attributes:
        layers: one for each layer of the cache.
        order: block to its place in running order; empty when the model could not be run.
        with_values: it ran only in the mode that answers when a value is asked for.
    """

    layers: tuple[CacheLayer, ...]
    order: dict[str, int]
    with_values: bool


def observe(model: Any, block_of: Callable[[str], str]) -> Observed:
    """Run `model`, which is on the meta device, and look at its cache.

    Args:
        model: built on the meta device in bfloat16.
        block_of: from a module's path to the part of a device map it belongs to.
    """
    order: dict[str, int] = {}
    hooks = []
    for path, module in model.named_modules():
        if path and block_of(path) == path:
            hooks.append(module.register_forward_pre_hook(_noting(order, path)))
    try:
        cache, with_values = _run(model, 3, with_values=False), False
        if cache is None:
            cache, with_values = _run(model, 3, with_values=True), True
    finally:
        for hook in hooks:
            hook.remove()
    homes = _homes(model, block_of)
    if cache is None:
        return Observed(_from_config(model, homes), {}, with_values)
    if all(_is_known(layer) for layer in cache.layers):
        layers = [_read(layer, homes(index)) for index, layer in enumerate(cache.layers)]
    else:
        short, long = (_run(model, tokens, with_values=with_values) for tokens in (_SHORT, _LONG))
        layers = [
            _read(layer, homes(index)) if _is_known(layer) else _compared(less, more, homes(index))
            for index, (layer, less, more) in enumerate(zip(cache.layers, short.layers, long.layers, strict=True))
        ]
    return Observed(tuple(layers), order, with_values)


def _noting(order: dict[str, int], path: str) -> Callable[..., None]:
    def note(*_: Any) -> None:
        order.setdefault(path, len(order))

    return note


def _run(model: Any, tokens: int, *, with_values: bool) -> Any:
    """The model's cache after `tokens` tokens on the meta device, or None where the model cannot run there."""
    from transformers.cache_utils import DynamicCache

    with contextlib.suppress(Exception):  # whatever a model's own code raises when there are no values
        cache = DynamicCache(config=model.config)
        meta_runs.run(model, tokens, cache, *([meta_runs.any_value()] if with_values else []))
        return cache
    return None


def _homes(model: Any, block_of: Callable[[str], str]) -> Callable[[int], str]:
    """From a cache layer's index to the block of the module that fills it."""
    blocks: dict[int, str] = {}
    for path, module in model.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and block_of(path):
            blocks.setdefault(index, block_of(path))
    last = blocks[max(blocks)] if blocks else ""
    return lambda index: blocks.get(index, last)


def _is_known(layer: Any) -> bool:
    from transformers import cache_utils

    known = ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "DummyLayer")
    return type(layer).__name__ in known or isinstance(layer, cache_utils.LinearAttentionLayer)


def _read(layer: Any, block: str) -> CacheLayer:
    """A layer of keys and values, of running states, or of both."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    per_token = 0
    if keys is not None and values is not None and keys.numel():
        index = getattr(layer, "indexer_keys", None)  # of sparse attention, beside the keys
        held = [keys, values, index] if index is not None else [keys, values]
        per_token = sum(each.numel() for each in held) // keys.shape[-2]
    states = [
        state
        for name in ("conv_states", "recurrent_states")
        for state in getattr(layer, name, {}).values()
        if state is not None
    ]
    return CacheLayer(
        block=block,
        elements_per_token=per_token,
        window=getattr(layer, "sliding_window", None),
        fixed_elements=sum(state.numel() for state in states if state.element_size() < 4),
        fixed_float32_elements=sum(state.numel() for state in states if state.element_size() == 4),
        can_quantize=type(layer).__name__ == "DynamicLayer",
    )


def _compared(less: Any, more: Any, block: str) -> CacheLayer:
    """A layer of an unknown kind, from what it held after two lengths; a window of its own is full by then."""
    few, many = _numel(vars(less)), _numel(vars(more))
    per_token = max(0, round((many - few) / (_LONG - _SHORT)))
    return CacheLayer(
        block=block,
        elements_per_token=per_token,
        fixed_elements=max(0, few - per_token * _SHORT),
        can_quantize=False,
    )


def _numel(value: Any) -> int:
    """Numbers of all tensors in the fields of a layer, one that has two names once."""
    import torch

    found: dict[int, int] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.Tensor):
            found[id(each)] = each.numel()
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
    return sum(found.values())


def _from_config(model: Any, homes: Callable[[int], str]) -> tuple[CacheLayer, ...]:
    """Plain attention from the configuration's numbers of heads, windows as transformers' cache has them."""
    from transformers.cache_utils import DynamicCache

    config = model.config.get_text_config(decoder=True)
    heads = number(config, ("num_attention_heads", "n_head")) or 1
    groups = number(config, ("num_key_value_heads",)) or heads
    width = number(config, ("head_dim",)) or number(config, ("hidden_size", "n_embd", "d_model")) // heads
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # noqa: BLE001 - a configuration without what the cache asks for
        layers = []
    layers = layers or [None] * number(config, ("num_hidden_layers", "n_layer"))
    return tuple(
        CacheLayer(
            block=homes(index),
            elements_per_token=0 if type(layer).__name__ == "DummyLayer" else 2 * groups * width,
            window=getattr(layer, "sliding_window", None),
        )
        for index, layer in enumerate(layers)
    )


def number(config: Any, names: tuple[str, ...]) -> int:
    """The first of these that a configuration has, the largest where layers differ; 0 where it has none."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # noqa: BLE001 - transformers refuses to name one where layers differ
            value = [getattr(layer, name, None) for layer in config.per_layer_config]
        if isinstance(value, list | tuple):
            value = max((each for each in value if isinstance(each, int)), default=None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return 0
