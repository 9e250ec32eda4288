"""What a model's weights are held in: as was asked, or as a checkpoint has them that is quantized already.

Reads the configuration, and at most the header of one file of weights. Nothing here looks at a device.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from kani_nb.engines.huggingface.arguments import LoadRequest
from kani_nb.errors import ConfigError
from kani_nb.hardware.checkpoint_packages import check_checkpoint_packages
from kani_nb.hardware.checkpoint_schemes import checkpoint_of
from kani_nb.hardware.placement import SLOW
from kani_nb.hardware.shape_reading import prequantized_of
from kani_nb.quantization import Quantization

#: What a setting has where it is not given, which is no other than saying so.
_DEFAULTS = {"llm_int8_threshold": 6.0, "quant_storage": "uint8", "double_quant": False}


@dataclass(frozen=True, slots=True)
class Held:
    """What the weights are held in once loaded; `label` is that of a checkpoint in a method without a scheme here."""

    settings: Quantization
    is_prequantized: bool = False
    label: str | None = None


def held_weights(request: LoadRequest, config: Any) -> Held:
    """The scheme and settings of the weights once loaded, and whether the checkpoint has them already."""
    own = prequantized_of(config)
    if own is None or request.gguf_file is not None:
        return Held(request.quantization)
    checkpoint = checkpoint_of(own)
    settings, method = checkpoint.settings, checkpoint.method
    asked = request.quantization
    if request.foreign_config is not None or not (asked.is_none or _agrees(asked, settings)):
        wanted = asked.label if request.foreign_config is None else type(request.foreign_config).__name__
        raise ConfigError(
            f"{request.name} is quantized already, with {method if settings is None else settings.label}",
            why=f"it cannot be quantized again, with {wanted}",
            fix="load it as it is, without --quant, or load the model that it was made from",
        )
    check_checkpoint_packages(request.name, method)
    if settings is None:
        return Held(Quantization(), True, method)
    if settings.compute_dtype == checkpoint_dtype(request, config):
        settings = replace(settings, compute_dtype="auto")  # which is the same, and not worth a word
    return Held(settings, True)


def _agrees(asked: Quantization, own: Quantization | None) -> bool:
    """Whether what was asked for is what the checkpoint has, as far as that was said."""
    if own is None or asked.scheme != own.scheme:
        return False
    given = {name: value for name, value in asked.given.items() if value != _DEFAULTS.get(name)}
    return all(getattr(own, name) == value for name, value in given.items())


def without_offloading(config: Any, name: str, device_map: Any) -> Any:
    """The configuration of a bitsandbytes checkpoint as it must be for this map; None where it is right as it is.

    With `llm_int8_enable_fp32_cpu_offload` transformers takes all that is on the CPU for unquantized, which the weights
    in the files are not.

    Raises:
        ConfigError: a part would have to be.
    """
    places = set(device_map.values()) if isinstance(device_map, dict) else set()
    if not places.isdisjoint(SLOW) and not places <= {"cpu"}:
        raise ConfigError(
            f"{name} is quantized already, and cannot be put on {' and '.join(sorted(places))}",
            why="bitsandbytes keeps only unquantized weights on the CPU or the disk beside a GPU",
            fix="put all of it on one kind of device, or quantize the model that it was made from",
        )
    own = prequantized_of(config) or {}
    if not own.get("llm_int8_enable_fp32_cpu_offload"):
        return None
    changed = copy.deepcopy(config)
    changed.quantization_config = {**own, "llm_int8_enable_fp32_cpu_offload": False}
    return changed


def checkpoint_dtype(request: LoadRequest, config: Any) -> str | None:
    """What the configuration says, or else what most of the first file's weights are; None where neither is known."""
    named = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    if named is not None or request.gguf_file is not None or request.folder is None:
        return None if named is None else str(named).removeprefix("torch.")
    from safetensors import safe_open

    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    for path in sorted(request.folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            found = Counter(file.get_slice(key).get_dtype() for key in file.keys())  # noqa: SIM118 - it is no dict
        return names.get(found.most_common(1)[0][0]) if found else None
    return None
