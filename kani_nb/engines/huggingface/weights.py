"""Whether a model's weights are still those that were loaded: states computed with others must not be reused.

Others may do with `engine.model` what they like between two answers: train it, attach, switch and merge adapters,
change weights by hand. All of that shows here. It looks at which tensors there are, at torch's counters of their
changes, at what adapters say of themselves and at how often the model was run for a gradient; numbers are read only
where the counters say nothing (fused optimizers and those of bitsandbytes do not count): of adapters and of what has a
gradient.

Not seen: what is written through `tensor.data` alone into a weight that is neither (use `torch.no_grad()` instead), and
a hook that changes what a layer gives.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from kani_nb.engines.huggingface.training_steps import TrainingSteps
from kani_nb.errors import EngineError

#: Tensors of at most so many numbers are read together, which is quicker and copies them.
_SMALL = 2**16


class Weights:
    """The weights of one loaded model, as its engine knows them. Used by the thread that holds the engine's slot.

    Args:
        model: a transformers model, just loaded.
        name: what it is called in errors.
    """

    def __init__(self, model: Any, name: str) -> None:
        self._model = model
        self._name = name
        self._steps = TrainingSteps.watch(model)
        self._loaded = self._seen = Fingerprint(model, self._steps.count)

    @property
    def have_changed(self) -> bool:
        """Whether they are not those any more that were loaded."""
        return Fingerprint(self._model, self._steps.count) != self._loaded

    @contextmanager
    def in_use(self) -> Iterator[bool]:
        """For one answer: the model without its dropout, and nobody who trains it; whether it changed since the last.

        A model that was left in training mode is put into it again. A training step of another thread waits.

        Raises:
            EngineError: a thread trains them; or did so meanwhile, and what was computed is of no use.
        """
        with self._steps.held_up():
            self._steps.refuse_while_trained(self._model, self._name)
            modules = list(self._model.modules())
            in_training = [each for each in modules if each.training]
            for each in in_training:
                each.training = False
            before, self._seen = self._seen, Fingerprint(self._model, self._steps.count)
            try:
                yield self._seen != before
                now = Fingerprint(self._model, self._steps.count)
                if now.was_trained_since(self._seen) or any(each.training for each in modules):
                    raise EngineError(
                        f"the weights of {self._name} changed while it answered",
                        why="something trains them meanwhile",
                        fix="ask again when that has ended",
                    )
            finally:
                for each in in_training:
                    each.training = True


class Fingerprint:
    """Equal to a later one of the same model only if its weights did not change in between.

    Args:
        model: whose weights.
        steps: how often the model was run for a gradient.
    """

    __slots__ = ("_adapters", "_objects", "_state", "_trained")

    def __init__(self, model: Any, steps: int = 0) -> None:
        import torch

        objects: list[Any] = []
        state: list[tuple[int, int]] = []
        adapters: list[Any] = []
        read: dict[int, Any] = {}
        trainable = 0
        with torch._C.DisableTorchFunctionSubclass():  # bitsandbytes' own kind of tensor is slow to look at
            for module in model.modules():
                objects.append(weakref.ref(module))
                moves = type(module).__module__.startswith("bitsandbytes")  # arranges its tensors anew when first used
                for tensor in _tensors_of(module):
                    if tensor.is_meta:
                        state.append((0, 0))  # offloaded: another object after every use
                        continue
                    objects.append(weakref.ref(tensor))
                    version = 0 if tensor.is_inference() else tensor._version
                    state.append((version, 0 if moves else tensor.data_ptr()))
                    trainable += version if tensor.requires_grad else 0
                    if tensor.grad is not None:
                        read[id(tensor)] = tensor
                if _has_adapters(module):
                    adapters.append(_adapter_state(module))
                    read |= {id(each): each for each in _adapter_weights(module)}
            numbers = _numbers_of(read.values())
        self._objects = objects
        self._state = state
        self._adapters = adapters
        self._trained = (steps, trainable, *numbers)

    def __eq__(self, other: object) -> bool:
        """Whether nothing changed between the two."""
        return (
            isinstance(other, Fingerprint)
            and self._trained == other._trained
            and self._state == other._state
            and self._adapters == other._adapters
            and len(self._objects) == len(other._objects)
            # One object has one weak reference, so a new object at the address of an old one shows.
            and all(mine is its and mine() is not None for mine, its in zip(self._objects, other._objects, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def was_trained_since(self, earlier: Fingerprint) -> bool:
        """Whether what can be trained changed. Libraries may arrange frozen weights anew when they are first used."""
        return self._trained != earlier._trained


def _tensors_of(module: Any) -> Iterator[Any]:
    """The module's own parameters, and buffers that belong to its weights."""
    if type(module).__module__.startswith("gptqmodel."):
        return  # nobody trains these buffers, and its kernels arrange them anew when they are first used
    yield from (each for each in module._parameters.values() if each is not None)
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield buffer


def _has_adapters(module: Any) -> bool:
    """Whether this is a layer of peft: those say which adapters are active (a model of transformers can be asked)."""
    active = getattr(type(module), "active_adapters", None)
    return active is not None and not callable(active)


def _adapter_state(module: Any) -> Any:
    """What a layer says of its adapters: which are active, merged and switched off, and how strong they are."""
    scaling = getattr(module, "scaling", None)
    return (
        tuple(module.active_adapters),
        tuple(getattr(module, "merged_adapters", ())),
        bool(getattr(module, "disable_adapters", False)),
        tuple(scaling.items()) if isinstance(scaling, dict) else (),
    )


def _adapter_weights(module: Any) -> Iterator[Any]:
    """The weights of the adapters of a layer of peft."""
    names = (*getattr(module, "adapter_layer_names", ()), *getattr(module, "other_param_names", ()))
    for name in names:
        parts: Any = getattr(module, name, None)
        if callable(getattr(parts, "parameters", None)):
            yield from parts.parameters()


def _numbers_of(tensors: Iterable[Any]) -> list[int]:
    """Numbers that change when any of the tensors' does: their bit patterns, added up."""
    import torch

    of_size = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums: list[int] = []
    small: dict[Any, list[Any]] = {}
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(of_size[tensor.element_size()])
        if bits.numel() > _SMALL:
            sums.append(int(bits.sum(dtype=torch.int64)))
        else:
            small.setdefault((bits.dtype, bits.device), []).append(bits)
    return sums + [int(torch.cat(each).sum(dtype=torch.int64)) for each in small.values()]
