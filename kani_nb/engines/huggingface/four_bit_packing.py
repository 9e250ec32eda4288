"""What bitsandbytes does to 4-bit weights at their first use on a CPU, and how to read them as they were loaded.

Where the processor has AVX512_BF16, the first answer re-orders the codes of each 4-bit layer, rounds its scales to
bfloat16 and turns them around; double-quantized scales are expanded before. bitsandbytes (0.50) undoes this when it
makes a state dict, forgets to turn the scales back, and so destroys both what is saved and the running model
(its issue 2078). So a running model may be asked for its state dict only within `exact_state_dict`, or after
`guard_state_dict`. They read copies: the codes come back bit for bit, and so do scales that were bfloat16 from the
start, which those of bfloat16 weights are, each being the magnitude of one of them. What cannot be read back is named
by `lost_weights`.

Biases are looked at too: a quantized layer turns its bias into the precision that it computes in.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from kani_nb.errors import EngineError

#: What packing leaves on a quantization state, and what this module leaves on one whose scales were rounded.
_MARKS = ("packing_format_for_cpu", "original_nested", "original_dtype", "original_qshape", "original_storage_type")
_ROUNDED = "scales_were_rounded"


@dataclass(frozen=True, slots=True)
class LostWeight:
    """A tensor that the running model no longer holds as it was loaded: its name, and what happened to it."""

    name: str
    why: str


def is_packed(module: Any) -> bool:
    """Whether the codes or the scales of this layer stand in bitsandbytes' order for CPUs."""
    state = _state_of(module)
    return state is not None and (
        getattr(state, "packing_format_for_cpu", False)
        or state.absmax.dim() == 2  # its own way back forgets the scales
    )


def lost_weights(model: Any) -> list[LostWeight]:
    """The tensors of `model` that cannot be read back as they were loaded; most often there are none."""
    lost = []
    for name, module in _quantized_linears(model):
        if why := _scales_lost(module):
            lost.append(LostWeight(f"{name}.weight", why))
        if why := _bias_lost(module, model.dtype):
            lost.append(LostWeight(f"{name}.bias", why))
    return lost


def guard_state_dict(model: Any) -> None:
    """From now on `model.state_dict()`, and all that saves through it, gives the weights as they were loaded or raises.

    It changes neither the weights nor the answers. Safe to call twice.
    """
    _guard(model)


@contextlib.contextmanager
def exact_state_dict(model: Any) -> Iterator[None]:
    """What `guard_state_dict` does, for the time of the block.

    Raises:
        EngineError: from `state_dict`, for a layer whose weights cannot be read back.
    """
    guarded = _guard(model)
    try:
        yield
    finally:
        for module in guarded:
            del module._save_to_state_dict


def unpack(model: Any) -> None:
    """Turn packed layers of `model` back in place, so that they can be merged or dequantized.

    Answers stay the same: the next one packs them again. Scales that were rounded stay so, and are still `lost`.

    Raises:
        EngineError: this bitsandbytes packs in an order of its own.
    """
    for name, module in _quantized_linears(model):
        if is_packed(module):
            why = _scales_lost(module)
            codes, state = _unpacked(name, module)
            if why:
                setattr(state, _ROUNDED, why)
            module.weight.data = codes
            module.weight.quant_state = module.quant_state = state


def _quantized_linears(model: Any) -> list[tuple[str, Any]]:
    """The layers of bitsandbytes in `model`, with their names; none where it is not imported."""
    library = sys.modules.get("bitsandbytes")
    if library is None:
        return []
    kinds = (library.nn.Linear4bit, library.nn.Linear8bitLt)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def _state_of(module: Any) -> Any:
    return getattr(module.weight, "quant_state", None)


def _scales_lost(module: Any) -> str:
    """Why the scales of this layer are not those that were loaded, or an empty string."""
    import torch

    state = _state_of(module)
    if state is None:
        return ""
    if module.weight.compress_statistics and (not state.nested or getattr(state, "original_nested", False)):
        return "its double-quantized scales were expanded and rounded by the first answer on this CPU"
    original = getattr(state, "original_dtype", torch.bfloat16)
    if getattr(state, "packing_format_for_cpu", None) is not None and original != torch.bfloat16:
        return f"its scales, made from {_name(original)} weights, were rounded to bfloat16 by the first answer here"
    return str(getattr(state, _ROUNDED, ""))


def _bias_lost(module: Any, dtype: Any) -> str:
    """Why the bias of this layer is not the one that was loaded in `dtype`, or an empty string."""
    import torch

    bias = module.bias
    if bias is None or bias.dtype in (dtype, torch.float32) or bias.device.type == "meta":
        return ""
    if dtype == torch.bfloat16 and bias.dtype == torch.float16:
        size = bias.detach().abs()
        # Within this range float16 holds every bfloat16 number exactly; a zero may have been too small for it.
        if bool((torch.isfinite(size) & (size >= torch.finfo(torch.float16).tiny)).all()):
            return ""
    return f"it was rounded from {_name(dtype)} to {_name(bias.dtype)}, which its layer computes in"


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _guard(model: Any) -> list[Any]:
    """Take over the writing of each layer of bitsandbytes; those where this was not so yet."""
    guarded = []
    for name, module in _quantized_linears(model):
        if "_save_to_state_dict" not in vars(module):
            module._save_to_state_dict = partial(_write, module, name, model.dtype)
            guarded.append(module)
    return guarded


def _write(module: Any, name: str, dtype: Any, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """What takes the place of a layer's own `_save_to_state_dict`."""
    why = _scales_lost(module) or _bias_lost(module, dtype)
    if why:
        raise EngineError(f"the weights of {name} are not what was loaded", why=why, fix="load the model again")
    if is_packed(module):
        codes, state = _unpacked(name, module)
        destination[f"{prefix}weight"] = codes
        if module.bias is not None:
            destination[f"{prefix}bias"] = module.bias.detach()
        for key, value in state.as_dict(packed=True).items():
            destination[f"{prefix}weight.{key}"] = value
    else:
        type(module)._save_to_state_dict(module, destination, prefix, keep_vars)
    if module.bias is not None:
        destination[f"{prefix}bias"] = _as_loaded(destination[f"{prefix}bias"], dtype)


def _as_loaded(bias: Any, dtype: Any) -> Any:
    """`bias` in `dtype` again, when that is where it came from."""
    if bias.dtype == dtype or bias.device.type == "meta":
        return bias
    narrow = bias.to(dtype)
    return narrow if bool((narrow.to(bias.dtype) == bias).all()) else bias


def _unpacked(name: str, module: Any) -> tuple[Any, Any]:
    """Copies of a packed layer's codes and quantization state, in the order in which they were loaded.

    Raises:
        EngineError: packing them again does not give what the layer holds, so they were not understood.
    """
    import torch
    from bitsandbytes import functional

    live, codes = _state_of(module), module.weight.data
    state = copy.copy(live)
    for mark in _MARKS:
        vars(state).pop(mark, None)
    state.absmax = live.absmax.T.contiguous().reshape(-1).float()
    state.dtype = live.original_dtype
    if not live.packing_format_for_cpu:
        return codes, state
    asked = copy.copy(live)
    asked.original_nested = False  # the scales are brought back above
    codes, _ = functional._convert_weight_packed_for_cpu_inverse(codes, asked)
    again, packed = functional._convert_weight_packed_for_cpu(codes, copy.copy(state))
    if not (torch.equal(again, module.weight.data) and torch.equal(packed.absmax, live.absmax)):
        raise EngineError(
            f"{name} could not be read back", why="this bitsandbytes packs 4-bit weights in an order of its own"
        )
    return codes, state
