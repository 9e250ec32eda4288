"""KV caches that grow in place, and the rules of cropping and copying them.

transformers' dynamic layer copies the whole cache for each token (`torch.cat`), which costs as much as the attention
itself once a conversation is long. A growing layer writes into a buffer with room to spare, and cropping it only moves
its end. Layers of other kinds (sliding windows, linear attention) stay transformers' own; which of them can go back,
and how far, is decided here: never to a wrong answer.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

#: Tokens of room that a buffer gets beyond what it holds, at least.
_SPARE_TOKENS = 64


@functools.cache
def _growing_layer_class() -> Any:  # noqa: C901 - one class and its methods
    """The layer class; made when first used, since its base class lives in transformers."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """A full-attention layer in a buffer `(B, H, capacity, D)`; `keys` and `values` are views `(B, H, T, D)`."""

        def __init__(self, limit_tokens: int | None = None) -> None:
            super().__init__()
            self._limit_tokens = limit_tokens
            self._buffers: tuple[Any, Any] | None = None

        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            """Append `(B, H, q, D)` states and return all."""
            length = self.get_seq_length()
            needed = length + key_states.shape[-2]
            if self._buffers is None or self._buffers[0].shape[-2] < needed:
                if not self.is_initialized:
                    self.lazy_initialization(key_states, value_states)
                self._grow(key_states, value_states, length, needed)
            assert self._buffers is not None
            keys, values = self._buffers
            keys[..., length:needed, :] = key_states
            values[..., length:needed, :] = value_states
            self.keys, self.values = keys[..., :needed, :], values[..., :needed, :]
            return self.keys, self.values

        def _grow(self, key_states: Any, value_states: Any, length: int, needed: int) -> None:
            capacity = needed + max(_SPARE_TOKENS, needed // 8)
            if self._limit_tokens is not None:
                capacity = max(needed, min(capacity, self._limit_tokens))
            buffers = []
            for states, old in ((key_states, self.keys), (value_states, self.values)):
                buffer = states.new_empty((*states.shape[:-2], capacity, states.shape[-1]))
                if length:
                    buffer[..., :length, :] = old
                buffers.append(buffer)
            self._buffers = (buffers[0], buffers[1])

        def reset(self) -> None:
            """Forget all states and their buffers."""
            self._buffers = None
            super().reset()

        def head_copy(self, length: int) -> GrowingLayer:
            """A new layer with a copy of the first `length` tokens."""
            other = GrowingLayer(self._limit_tokens)
            if self.is_initialized and length:
                other.update(self.keys[..., :length, :], self.values[..., :length, :])
            return other

        def nbytes(self) -> int:
            """Bytes of the buffers, the spare room included."""
            if self._buffers is None:
                return 0
            return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers)

    return GrowingLayer


def new_cache(config: Any, limit_tokens: int | None = None) -> Any:
    """An empty cache for a model: growing layers for full attention, transformers' own for the rest.

    Args:
        config: the model's.
        limit_tokens: the longest sequence it will hold. Buffers get no room beyond it, so that a full cache takes what
            the memory plan says and not an eighth more.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=config)
    growing = _growing_layer_class()
    cache.layers = [growing(limit_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def length_of(cache: Any) -> int:
    """Tokens that the cache holds states of."""
    return max((_seen(layer) for layer in cache.layers if hasattr(layer, "get_seq_length")), default=0)


def _seen(layer: Any) -> int:
    seen: int = layer.get_seq_length()
    return seen


def is_plain(cache: Any) -> bool:
    """Whether every layer is an attention layer, full or with a sliding window."""
    from transformers.cache_utils import DynamicSlidingWindowLayer

    growing = _growing_layer_class()
    return bool(cache.layers) and all(type(layer) in (growing, DynamicSlidingWindowLayer) for layer in cache.layers)


def can_go_back(cache: Any) -> bool:
    """Whether the cache can be cropped or copied to any shorter length.

    A sliding window that is full has dropped the states that an earlier position needs, and a linear-attention layer
    keeps one running state: neither can go back.
    """
    from transformers.cache_utils import DynamicSlidingWindowLayer

    growing = _growing_layer_class()
    for layer in cache.layers:
        if type(layer) is growing:
            continue
        if type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() < layer.sliding_window:
            continue
        return False
    return True


def crop(cache: Any, length: int) -> None:
    """Forget all but the first `length` tokens, in place. Only where `can_go_back`."""
    surplus = length_of(cache) - length
    if surplus > 0:
        cache.crop(-surplus)  # transformers 5 takes the number of tokens to remove, negative


def fork(cache: Any, length: int) -> Any:
    """A new cache with the first `length` tokens. Only where `can_go_back`, or at the cache's full length."""
    other = copy.copy(cache)
    surplus = length_of(cache) - length
    growing = _growing_layer_class()
    layers = []
    for layer in cache.layers:
        if type(layer) is growing:
            layers.append(layer.head_copy(length))
            continue
        twin = copy.deepcopy(layer)
        if surplus > 0:
            twin.crop(-surplus)
        layers.append(twin)
    other.layers = layers
    return other


def nbytes(cache: Any) -> int:
    """Bytes that the cache's tensors take, spare room included; storages that are shared count once."""
    growing = _growing_layer_class()
    storages: dict[int, int] = {}
    total = 0
    for layer in cache.layers:
        if type(layer) is growing:
            total += layer.nbytes()
        else:
            for value in vars(layer).values():
                _add_storages(value, storages)
    return total + sum(storages.values())


def full_context_bytes(model: Any, context_tokens: int) -> int:
    """Bytes of the states of one full context; a window's layers hold no more than the window."""
    config = model.config.get_text_config()

    def largest(value: Any) -> int:  # some architectures have a number for each layer
        return max(value) if isinstance(value, list | tuple) else int(value or 0)

    attention_heads = largest(getattr(config, "num_attention_heads", 1)) or 1
    heads = largest(getattr(config, "num_key_value_heads", None)) or attention_heads
    width = largest(getattr(config, "head_dim", None)) or largest(config.hidden_size) // attention_heads
    size: int = next(iter(model.parameters())).element_size()
    tokens = 0
    for layer in new_cache(model.config).layers or [None] * config.num_hidden_layers:
        window = getattr(layer, "sliding_window", None)
        tokens += min(context_tokens, window) if window else context_tokens
    return 2 * heads * width * max(2, size) * tokens


def bytes_per_token(cache: Any) -> int:
    """Bytes that one token's states take in all layers, without any spare room."""
    total = 0
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is not None and values is not None and keys.numel():
            total += (keys.numel() * keys.element_size() + values.numel() * values.element_size()) // keys.shape[-2]
    return total


def _add_storages(value: Any, storages: dict[int, int]) -> None:
    """The storages of the tensors in a layer's field: a tensor, or states in a list or by number in a dict."""
    if hasattr(value, "untyped_storage"):
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, dict):
        for item in value.values():
            _add_storages(item, storages)
    elif isinstance(value, list | tuple):
        for item in value:
            _add_storages(item, storages)
