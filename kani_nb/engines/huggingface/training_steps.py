"""Other people's training of a loaded model: noticed when a step begins, kept apart from answers, and made right.

An engine hands out its model, and whoever trains it (peft, a `Trainer`, a loop in a cell) tells nobody. What is watched
is the model's own forward, run for a gradient. Then

- the engine knows that its weights may change, whatever the optimizer counts;
- the step waits for an answer that is running, and an answer is refused while a thread trains;
- 4-bit weights that an answer packed for the CPU are unpacked. bitsandbytes (0.50) computes no gradient through packed
  ones, so that a training after a first answer would learn nothing, without an error; and it dequantizes them as if
  they were not packed, so that merging an adapter into them would destroy the model.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from kani_nb.engines.huggingface.four_bit_packing import unpack
from kani_nb.errors import EngineError


class TrainingSteps:
    """Called before every forward of a model; looks only at those that are run for a gradient.

    A copy of the model gets a watch of its own.

    Attributes:
        count: how many there were.
    """

    def __init__(self, model: Any = None) -> None:
        self.count = 0
        self._model = None if model is None else weakref.ref(model)
        self._turn = threading.RLock()
        self._trainer: weakref.ref[threading.Thread] | None = None

    @classmethod
    def watch(cls, model: Any) -> Self:
        """Watch `model`, until it is gone."""
        steps = cls(model)
        # The part below the head: peft calls the whole's forward directly, past its hooks.
        getattr(model, "base_model", model).register_forward_pre_hook(steps)
        mend_dequantizing()
        return steps

    def __call__(self, module: Any, _arguments: Any) -> None:
        """A forward of `module` begins."""
        import torch

        if not torch.is_grad_enabled():
            return
        with self._turn:
            self.count += 1
            self._trainer = weakref.ref(threading.current_thread())
            whole = self._model() if self._model is not None else None
            unpack(module if whole is None else whole)

    def __reduce__(self) -> tuple[Any, ...]:
        """A fresh one: threads and locks are not copied, and a copied model is trained by itself."""
        return type(self), ()

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Steps of other threads wait at their beginning meanwhile."""
        with self._turn:
            yield

    def refuse_while_trained(self, model: Any, name: str) -> None:
        """Raise if a thread is in the middle of training `model`, as far as can be seen.

        That is so when it is in training mode, and the thread that ran the last step is still there: any thread but the
        main one, which also runs cells that do something else, and is looked at.

        Raises:
            EngineError: it is.
        """
        trainer = self._trainer() if self._trainer is not None else None
        if trainer is None or not trainer.is_alive() or trainer is threading.current_thread():
            return
        if not any(each.training for each in model.modules()):
            return
        if trainer is threading.main_thread() and not _is_in_torch(trainer):
            return
        raise EngineError(
            f"{name} is being trained by the thread {trainer.name!r}",
            why="an answer meanwhile would mix old and new weights",
            fix="wait until that has ended, or call engine.model.eval() if it has",
        )


def _is_in_torch(thread: threading.Thread) -> bool:
    """Whether a thread is computing with torch at this moment."""
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
            return True
        frame = frame.f_back
    return False


def mend_dequantizing() -> None:
    """Let bitsandbytes, if it is imported, dequantize weights right that it packed for the CPU; may be called again."""
    library = sys.modules.get("bitsandbytes")
    functional: Any = getattr(library, "functional", None)
    plain = getattr(functional, "dequantize_4bit", None)
    if (
        plain is None
        or hasattr(plain, "__wrapped__")
        or not hasattr(functional, "_convert_weight_packed_for_cpu_inverse")
    ):
        return

    @functools.wraps(plain)
    def dequantize_4bit(codes: Any, quant_state: Any = None, *args: Any, **options: Any) -> Any:
        if getattr(quant_state, "packing_format_for_cpu", False):
            codes, quant_state = _unpacked(functional, codes, quant_state)
        return plain(codes, quant_state, *args, **options)

    functional.dequantize_4bit = dequantize_4bit


def _unpacked(functional: Any, codes: Any, packed: Any) -> tuple[Any, Any]:
    """Copies of packed codes and their state, in the order that all other functions expect."""
    asked = copy.copy(packed)
    asked.original_nested = False  # the scales, which its own way back forgets to turn, are brought back here
    codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, asked)
    state.absmax = packed.absmax.T.contiguous().reshape(-1).float()
    return codes, state
