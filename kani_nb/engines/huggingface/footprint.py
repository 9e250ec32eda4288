"""What a loaded model really holds, counted from storages: codes, scales and quantization states, each once.

`get_memory_footprint` of transformers leaves out what bitsandbytes keeps beside a weight (its scales, 6 % of a 4-bit
model), and counts tensors that were never allocated. Nothing here changes the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

#: Attributes of a weight or a module that hold tensors which are neither parameters nor buffers (bitsandbytes' own).
_STATE_OF_WEIGHT = ("SCB", "CB", "quant_state")
_STATE_OF_MODULE = ("quant_state", "state")
_STATE_FIELDS = ("absmax", "code", "offset", "state2", "CB", "SCB", "CxB", "CxBt", "idx")


def storage_bytes(model: Any) -> dict[str, int]:
    """Bytes of a model's storages by device: `cpu`, `cuda:0`; what accelerate keeps in files is under `disk`.

    Parameters, buffers, and the scales and states of quantized ones; storages that are shared count once.
    """
    storages: dict[tuple[str, int], int] = {}
    on_disk = 0
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # in files they are two tensors, and one is read
    for module_name, module in model.named_modules():
        for name, tensor in _own_tensors(module):
            if tensor.device.type == "meta":
                kept = _kept_in_memory(module, name)
                if kept is None:
                    on_disk += tensor.numel() * tensor.element_size() if f"{module_name}.{name}" not in tied else 0
                    continue
                tensor = kept
            for each in (tensor, *_beside(tensor)):
                _add(storages, each)
        for name in _STATE_OF_MODULE:
            for each in _inside(getattr(module, name, None)):
                _add(storages, each)
    totals: dict[str, int] = {"disk": on_disk} if on_disk else {}
    for (device, _), size in storages.items():
        totals[device] = totals.get(device, 0) + size
    return totals


def _own_tensors(module: Any) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _add(storages: dict[tuple[str, int], int], tensor: Any) -> None:
    if tensor.device.type != "meta":
        storage = tensor.untyped_storage()
        storages[(str(tensor.device), storage.data_ptr())] = storage.nbytes()


def _beside(weight: Any) -> Iterator[Any]:
    """Tensors that hang on a weight: its scales, and those of its scales."""
    for name in _STATE_OF_WEIGHT:
        yield from _inside(getattr(weight, name, None))


def _inside(value: Any) -> Iterator[Any]:
    if value is None:
        return
    if hasattr(value, "untyped_storage"):
        yield value
        return
    held = getattr(value, "__dict__", {})
    for name in _STATE_FIELDS:
        if name in held:
            yield from _inside(held[name])


def _kept_in_memory(module: Any, name: str) -> Any:
    """The tensor behind an offloaded one, when accelerate keeps it in main memory; None when it lies in a file."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        weights = getattr(each, "weights_map", None)
        dataset = getattr(weights, "dataset", weights)
        held = getattr(dataset, "state_dict", dataset if isinstance(dataset, dict) else None)
        found = held.get(f"{getattr(weights, 'prefix', '')}{name}") if held else None
        if found is not None and found.device.type != "meta":
            return found
    return None
