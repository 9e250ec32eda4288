"""Whether a model's weights are still those that were loaded: states computed with others must not be reused.

Training steps, merged or switched adapters and replaced modules all show here. It looks at counters, never at numbers.
"""

from __future__ import annotations

from typing import Any


def fingerprint(model: Any) -> tuple[int, ...]:
    """A value that changes when the weights of `model` do: by training, by an adapter, or by hand.

    torch counts the in-place changes of each tensor (`Tensor._version`). Of adapters (peft), which are active, merged
    and disabled counts too. A change through `tensor.data` alone is not counted by torch, and so not seen.
    """
    versions = count = adapters = 0
    for parameter in model.parameters():
        count += 1
        versions += 0 if parameter.is_inference() else parameter._version
    for module in model.modules():
        active = getattr(module, "active_adapters", None)
        if isinstance(active, list) and hasattr(module, "base_layer"):
            merged = tuple(getattr(module, "merged_adapters", ()))
            state = (tuple(active), merged, bool(getattr(module, "disable_adapters", False)))
            adapters = hash((adapters, state))
    return count, versions, adapters, hash(bool(model.training))
