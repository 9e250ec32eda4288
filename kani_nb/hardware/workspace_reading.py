"""What a forward pass holds for a moment, seen by running a few layers on the meta device and noting each allocation.

Every tensor of a forward pass has a size that is linear in the tokens of the chunk, in those of the context, and in
their product. Four runs with two chunks and two contexts therefore give the size of each for all lengths, and the sum
of what is alive at each moment. Attention is counted as a fused kernel does it, without its scores, where transformers
calls one. Nothing here looks at a machine; the numbers are used in `hardware.arithmetic`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from kani_nb.hardware import meta_runs
from kani_nb.hardware.cache_reading import Observed
from kani_nb.hardware.shapes import CacheLayer, Moment

#: Tokens of the two contexts and the two chunks that are run, where the model's own context allows it.
_CONTEXT_TOKENS, _CHUNK_TOKENS = (1024, 2048), (64, 128)
#: Lengths at which a moment must be the fullest one to be kept.
_GRID_CHUNKS, _GRID_CONTEXTS = (1, 8, 32, 128, 512, 2048), (256, 1024, 4096, 16384, 65536, 262144)


class _Kind(IntEnum):
    """Numbers in the model's dtype, others, and float32 copies of numbers in the model's dtype."""

    FOLLOWING = 0
    FIXED = 1
    RAISED = 2


@dataclass(frozen=True, slots=True)
class _Event:
    """A tensor's storage comes (`bytes` > 0) or goes."""

    number: int
    bytes: int
    kind: _Kind


class _FarEnoughError(Exception):
    """Ends a forward pass after the last layer that differs from those before."""


def read_moments(model: Any, blocks: Sequence[str], observed: Observed, context: int | None) -> tuple[Moment, ...]:
    """The fullest moments of a forward pass through the decoder's layers; empty where the model cannot be run so.

    Args:
        model: on the meta device, in bfloat16.
        blocks: its blocks in running order.
        observed: what its cache keeps, and how it can be run.
        context: the model's own window, where it has one.
    """
    last = _last_new_block(model, blocks, observed.layers)
    if last is None or not observed.order:
        return ()
    windows = [layer.window for layer in observed.layers if layer.window is not None]
    contexts, chunks = _lengths(max(windows, default=0), context)
    runs = []
    for tokens, chunk in itertools.product(contexts, chunks):
        events = _traced(model, last, chunk, tokens, with_values=observed.with_values)
        if events is None:
            return ()
        runs.append(events)
    return _fullest(_moments(runs, chunks, contexts))


def _last_new_block(model: Any, blocks: Sequence[str], layers: Sequence[CacheLayer]) -> str | None:
    """The block after which every kind of decoder layer has run, and one more: the first holds less than the others."""
    modules = dict(model.named_modules())
    kept = {layer.block: (layer.window, layer.elements_per_token) for layer in layers if _keeps(layer)}
    decoder = [block for block in blocks if block in kept and block in modules]
    seen: set[Any] = set()
    last = 0
    for place, block in enumerate(decoder):
        parameters = modules[block].named_parameters()
        kind = (type(modules[block]), kept[block], tuple((name, tuple(each.shape)) for name, each in parameters))
        if kind not in seen:
            seen.add(kind)
            last = place
    return decoder[min(last + 1, len(decoder) - 1)] if decoder else None


def _keeps(layer: CacheLayer) -> bool:
    """Whether it has states of its own; one that uses another layer's computes less than that one."""
    return bool(layer.elements_per_token or layer.fixed_elements or layer.fixed_float32_elements)


def _lengths(window: int, context: int | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two contexts, beyond a window where the model's own context is, and two chunks."""
    longest = context or 2 * _CONTEXT_TOKENS[1] + 2 * window
    low, high = _CONTEXT_TOKENS
    if window < longest // 2:
        low, high = low + window, high + window
    if high > longest:
        low, high = longest // 2, longest
    small, large = _CHUNK_TOKENS
    while large * 2 > low and small > 1:
        small, large = small // 2, large // 2
    return (low, high), (small, large)


def _traced(model: Any, last: str, chunk: int, context: int, *, with_values: bool) -> list[_Event] | None:
    """Allocations of one chunk that ends a context, the cache's own left out; None where the model cannot run so."""
    from transformers.cache_utils import DynamicCache

    modes = [meta_runs.any_value()] if with_values else []
    hook = model.get_submodule(last).register_forward_hook(_stop)
    try:
        cache = DynamicCache(config=model.config)
        with contextlib.suppress(_FarEnoughError):
            meta_runs.run(model, context - chunk, cache, *modes)
        tally = _Tally([*model.parameters(), *model.buffers(), *_tensors(cache)])
        with contextlib.suppress(_FarEnoughError):
            meta_runs.run(model, chunk, cache, *modes, _recorder_class()(tally))
        return tally.without(_tensors(cache))
    except Exception:  # noqa: BLE001 - whatever a model's own code raises when there are no values
        return None
    finally:
        hook.remove()


def _stop(*_: Any) -> None:
    raise _FarEnoughError


class _Tally:
    """Storages that come and go, in order.

    Args:
        before: tensors that were there before; held, since the key of a storage that is gone is given to another.
    """

    def __init__(self, before: list[Any]) -> None:
        self.events: list[_Event] = []
        self._before = before
        self._keys_before = {_key(tensor) for tensor in before}
        self._live: dict[int, _Event] = {}
        self._count = 0

    def note(self, tensor: Any, kind: _Kind) -> None:
        """A tensor was made, perhaps as another view of a known storage."""
        storage = tensor.untyped_storage()
        key = _key(tensor)
        if key in self._live or key in self._keys_before or not storage.nbytes():
            return
        self._live[key] = self.come(storage.nbytes(), kind)
        weakref.finalize(storage, self._gone, key).atexit = False

    def come(self, count: int, kind: _Kind) -> _Event:
        """So many bytes are there from now on."""
        event = _Event(self._count, count, kind)
        self._count += 1
        self.events.append(event)
        return event

    def go(self, event: _Event) -> None:
        """They are gone."""
        self.events.append(_Event(event.number, -event.bytes, event.kind))

    def without(self, kept: list[Any]) -> list[_Event]:
        """What was noted, but for the storages of these tensors."""
        events = list(self.events)
        numbers = {self._live[key].number for key in map(_key, kept) if key in self._live}
        return [event for event in events if event.number not in numbers]

    def _gone(self, key: int) -> None:
        if key in self._live:
            self.go(self._live.pop(key))


def _key(tensor: Any) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


class _Recording:
    """What a dispatch mode does with each operation: the tally is told which storages it made."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self._tally = tally

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import torch
        from torch.utils._pytree import tree_leaves

        aten = torch.ops.aten
        kwargs = kwargs or {}
        is_attention = func is aten.scaled_dot_product_attention.default
        is_in_steps = func is aten._scaled_dot_product_attention_math.default
        if is_in_steps or (is_attention and args[1].shape[-1] != args[2].shape[-1]):
            with self:  # type: ignore[attr-defined]  # no fused kernel takes values of another width than keys
                return func.decompose(*args, **kwargs)
        mask = (args[3] if len(args) > 3 else kwargs.get("attn_mask")) if is_attention else None
        numbers = None
        if mask is not None and mask.dtype is torch.bool:  # the kernel makes numbers of it meanwhile
            numbers = self._tally.come(mask.numel() * 2, _Kind.FOLLOWING)
        output = func(*args, **kwargs)
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._tally.note(leaf, _kind_of(func, args, leaf))
        if numbers is not None:
            self._tally.go(numbers)
        return output


def _kind_of(func: Any, args: Any, made: Any) -> _Kind:
    import torch

    if made.dtype is torch.bfloat16:
        return _Kind.FOLLOWING
    source = args[0] if args else None
    is_copy = isinstance(source, torch.Tensor) and source.dtype is torch.bfloat16 and made.shape == source.shape
    casts = (torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default)
    return _Kind.RAISED if is_copy and func in casts and made.dtype is torch.float32 else _Kind.FIXED


@functools.cache
def _recorder_class() -> Any:
    """Made when first used, since its base class is torch's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return type("Recorder", (_Recording, TorchDispatchMode), {})


def _tensors(cache: Any) -> list[Any]:
    """Every tensor that the layers of a cache hold."""
    import torch

    found: list[Any] = []
    waiting: list[Any] = [vars(layer) for layer in cache.layers]
    while waiting:
        each = waiting.pop()
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list | tuple):
            waiting += each
    return found


def _moments(runs: list[list[_Event]], chunks: tuple[int, int], contexts: tuple[int, int]) -> list[Moment]:
    """What is alive after each event, as polynomials; from the peaks alone where the runs do not match step by step.

    `runs` are the events of the short context with the small and the large chunk, then of the long one.
    """
    orders = {tuple((event.number, event.kind, event.bytes > 0) for event in events) for events in runs}
    if len(orders) > 1:
        return [_moment([[_peak(events, kind) for events in runs] for kind in _Kind], chunks, contexts)]
    found = []
    alive = [[0] * len(runs) for _ in _Kind]
    for steps in zip(*runs, strict=True):
        for place, event in enumerate(steps):
            alive[event.kind][place] += event.bytes
        if steps[0].bytes > 0:
            found.append(_moment(alive, chunks, contexts))
    return found


def _peak(events: list[_Event], kind: _Kind) -> int:
    """The most bytes of that kind that are alive at once."""
    return max(itertools.accumulate((each.bytes for each in events if each.kind is kind), initial=0))


def _moment(alive: list[list[int]], chunks: tuple[int, int], contexts: tuple[int, int]) -> Moment:
    following, fixed, raised = (_polynomial(each, chunks, contexts) for each in alive)
    return Moment(elements=tuple(each / 2 for each in following), fixed_bytes=fixed, raised_bytes=raised)


def _polynomial(values: list[int], chunks: tuple[int, int], contexts: tuple[int, int]) -> tuple[float, ...]:
    """The factors of 1, chunk, context and their product, through the values at the four corners."""
    low_small, low_large, high_small, high_large = values
    (small, large), (low, high) = chunks, contexts
    per_pair = (high_large - high_small - low_large + low_small) / ((large - small) * (high - low))
    per_chunk = (low_large - low_small) / (large - small) - per_pair * low
    per_context = (high_small - low_small) / (high - low) - per_pair * small
    return low_small - per_chunk * small - per_context * low - per_pair * small * low, per_chunk, per_context, per_pair


def _fullest(moments: list[Moment]) -> tuple[Moment, ...]:
    """Those that are the fullest at some length of a grid, in 16 or 32 bits."""
    kept: dict[Moment, None] = {}
    for chunk, context, size in itertools.product(_GRID_CHUNKS, _GRID_CONTEXTS, (2, 4)):
        if moments and chunk <= context:
            sizes = [moment.bytes_at(chunk, context, size) for moment in moments]
            kept[moments[sizes.index(max(sizes))]] = None
    return tuple(kept)
