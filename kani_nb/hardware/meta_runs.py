"""Running a model on the meta device, where tensors have shapes and no values: what a forward pass would make.

Some models ask for a value in the middle of it. Any will do there: only shapes are looked at.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from contextlib import AbstractContextManager
from typing import Any


def run(model: Any, tokens: int, cache: Any, *modes: AbstractContextManager[Any]) -> None:
    """One forward pass of `tokens` tokens, on the meta device, within `modes`; `cache` then holds their states.

    Raises:
        Exception: whatever the model's own code raises when there are no values.
    """
    import torch

    accepted = inspect.signature(model.forward).parameters
    argument = "cache_params" if "cache_params" in accepted else "past_key_values"
    options = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    with torch.inference_mode(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mode in modes:
            mode.__enter__()
        try:
            model(input_ids=ids, use_cache=True, **{argument: cache}, **options)
        finally:
            for mode in reversed(modes):
                mode.__exit__(None, None, None)


def any_value() -> AbstractContextManager[Any]:
    """A mode in which a number that is asked of the meta device is 1, and a search there finds nothing.

    A model that loops over the experts its tokens chose then loops over none. It costs as much as the run itself.
    """
    mode: AbstractContextManager[Any] = _any_value_class()()
    return mode


class _AnyValue:
    """What a dispatch mode answers instead of the meta device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import torch

        aten = torch.ops.aten
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.device.type == "meta":
            if func in (aten._local_scalar_dense.default, aten.item.default):
                return True if first.dtype is torch.bool else 1.0 if first.dtype.is_floating_point else 1
            if func is aten.is_nonzero.default:
                return True
            if func is aten.nonzero.default:
                return torch.empty((0, first.ndim), dtype=torch.long, device="meta")
        return func(*args, **(kwargs or {}))


@functools.cache
def _any_value_class() -> Any:
    """Made when first used, since its base class is torch's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return type("AnyValue", (_AnyValue, TorchDispatchMode), {})
