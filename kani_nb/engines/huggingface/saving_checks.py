"""Whether a model in memory can be saved exactly as it was loaded, and if not as it stands, then why.

Only looked at, never changed; what bitsandbytes does to its weights is in `four_bit_packing`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from kani_nb.engines.huggingface.four_bit_packing import LostWeight
from kani_nb.errors import EngineError

#: How a person gets around most refusals.
_SAVE_EARLY = "load the model again, and save it before its first answer"


def scheme_of(model: Any) -> str:
    """What the weights of `model` really are, read from the model: `nf4 + double quant`, `int8`, `none`."""
    config = quantization_settings(model)
    if not config:
        return "none"
    if config.get("load_in_8bit"):
        return "int8"
    if config.get("load_in_4bit"):
        nested = " + double quant" if config.get("bnb_4bit_use_double_quant") else ""
        return f"{config.get('bnb_4bit_quant_type', '4-bit')}{nested}"
    method = str(getattr(config.get("quant_method"), "value", config.get("quant_method", "quantized")))
    if method == "kani_nb_packed":
        return f"cpu-int{config['bits']}"
    return f"{method}, {config['bits']} bits" if config.get("bits") else method


def quantization_settings(model: Any) -> dict[str, Any]:
    """The `quantization_config` that `model` carries, as a plain dict; empty when it is not quantized."""
    config = getattr(model.config, "quantization_config", None)
    if config is None or getattr(model, "hf_quantizer", None) is None:
        return {}
    return dict(config if isinstance(config, dict) else config.to_dict())


def check_savable(model: Any) -> None:
    """Refuse what no folder could give back.

    Raises:
        EngineError: adapters are attached; or the library cannot save, or not load again, weights of this kind.
    """
    if _has_adapters(model):
        raise EngineError(
            "the model has adapters (LoRA) attached, and a folder of whole weights would not hold them",
            fix="save the adapter with `save_pretrained` of the peft model, or put it into the weights first "
            "(`merge_and_unload()`)",
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not needs_copying(model) and not quantizer.is_serializable():
        raise EngineError(
            f"transformers cannot save weights quantized by {scheme_of(model)}",
            fix="keep the folder that it was loaded from",
        )
    places = {str(each) for each in (getattr(model, "hf_device_map", None) or {}).values()}
    if scheme_of(model).startswith(("int8", "nf4", "fp4")) and len(places) > 1 and places & {"cpu", "disk"}:
        raise EngineError(
            f"{scheme_of(model)} weights with parts on {' and '.join(sorted(places & {'cpu', 'disk'}))}",
            why="those parts are not quantized, which the folder could not say",
            fix="load the model where all of it is quantized (a larger card, or --device cpu), and save it there",
        )
    if quantization_settings(model).get("llm_int8_has_fp16_weight"):
        raise EngineError(
            "int8 with llm_int8_has_fp16_weight keeps the weights in 16 bits",
            why="transformers saves them so and then cannot load the folder",
            fix="save the model unquantized, and give llm_int8_has_fp16_weight again when it is loaded",
        )


def needs_copying(model: Any) -> bool:
    """Whether the model came quantized by a library that arranges the weights anew when it loads them.

    What it holds in memory need not be what its files hold (GPTQ and AWQ kernels), so the files are what can be saved.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not quantizer.pre_quantized or not quantization_settings(model):
        return False
    is_theirs = type(quantizer).__module__.startswith("transformers.")
    return is_theirs and not scheme_of(model).startswith(("int8", "nf4", "fp4"))


def refusal(model: Any, lost: Sequence[LostWeight], further: str, fix: str = _SAVE_EARLY) -> EngineError:
    """The error for weights that cannot be had back: which, why, and `further` why not in another way."""
    first = lost[0]
    others = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
    return EngineError(
        f"the {scheme_of(model)} weights can no longer be saved as they were loaded",
        why=f"{first.name}{others}: {first.why}; {further}",
        fix=fix,
    )


def _has_adapters(model: Any) -> bool:
    if getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "peft_config"):
        return True
    layers = sys.modules.get("peft.tuners.tuners_utils")
    return layers is not None and any(isinstance(module, layers.BaseTunerLayer) for module in model.modules())
