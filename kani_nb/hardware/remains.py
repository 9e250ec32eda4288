"""What of a model's memory is still taken after the model was freed, and whether a given object keeps it.

It counts storages, which live as long as any tensor that looks at them: a `state_dict`, an optimizer, a slice of one
weight. Nothing here keeps the model alive, and nothing looks for whoever does.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from typing import Any

#: Nodes of an autograd graph that are looked at.
_MOST_NODES = 20_000


class Remains:
    """The memory of one model, from before it is freed.

    Args:
        model: a torch module; of any other object only the object itself is known, of None nothing.
    """

    def __init__(self, model: Any) -> None:
        try:
            self._model: weakref.ref[Any] | None = weakref.ref(model)
        except TypeError:
            self._model = None
        self._storages: dict[int, tuple[Any, int]] = {}
        for tensor in _tensors_of(model):
            storage = tensor.untyped_storage()
            if storage.nbytes():
                from torch.multiprocessing.reductions import StorageWeakRef

                self._storages.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    @property
    def is_gone(self) -> bool:
        """Whether nothing of it is left, neither memory nor the object."""
        return self.object is None and not self._alive()

    @property
    def object(self) -> Any:
        """The model, or None when it is gone."""
        return self._model() if self._model is not None else None

    @property
    def held_bytes(self) -> int:
        """Bytes of its memory that are still taken."""
        return sum(size for _, size in self._alive().values())

    def is_part(self, value: Any) -> bool:
        """Whether `value` itself is the model, or a tensor (with its autograd graph) that keeps memory of it."""
        if self._model is not None and value is self._model():
            return True
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(value, torch.Tensor) or not self._storages:
            return False
        alive = self._alive()
        return any(each.untyped_storage()._cdata in alive for each in (value, *_in_graph(value)) if _has_storage(each))

    def _alive(self) -> dict[int, tuple[Any, int]]:
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        return self._storages


def _tensors_of(model: Any) -> Iterator[Any]:
    """Its parameters and buffers, and the tensors that quantized ones carry beside them; nothing for other objects."""
    if not callable(getattr(model, "parameters", None)) or not callable(getattr(model, "buffers", None)):
        return
    for tensor in (*model.parameters(), *model.buffers()):
        if _has_storage(tensor):
            yield tensor
        state = getattr(tensor, "quant_state", None)
        if _has_storage(scales := getattr(state, "absmax", None)):
            yield scales


def _has_storage(value: Any) -> bool:
    return hasattr(value, "untyped_storage") and not value.is_meta


def _in_graph(tensor: Any) -> Iterator[Any]:
    """The tensors that the autograd graph behind `tensor` ends in, or has saved for the way back."""
    pending: list[Any] = [tensor.grad_fn]
    seen: set[Any] = set()
    while pending and len(seen) < _MOST_NODES:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            yield variable
        for name in dir(node):
            if name.startswith("_saved_"):
                with contextlib.suppress(RuntimeError):  # freed, because the way back was taken
                    yield getattr(node, name)
        pending += [each for each, _ in node.next_functions]
