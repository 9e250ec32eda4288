"""Checkpoints that are quantized already: in what, counted from their own `quantization_config`.

Covers what transformers 5 loads: bitsandbytes, GPTQ, AWQ, FP8, MXFP4, compressed-tensors, and this package's own packed
format. Where a device lacks the kernels, transformers expands the weights while loading, or at the first answer: that
is said here too, since a plan must count what is really held. Nothing here looks at a machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kani_nb.hardware.schemes import LinearBytes, Scheme, find_scheme
from kani_nb.quantization import Quantization

#: Bits of methods whose storage is not counted here, when their configuration does not say.
_KNOWN_BITS = {"bitnet": 2.0, "eetq": 8.0, "fbgemm_fp8": 8.0, "quanto": 8.0}
_BITS_KEYS = ("bits", "nbits", "num_bits", "w_bit", "weights_bits")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a quantized checkpoint's own configuration says.

    Attributes:
        method: its `quant_method`.
        settings: the scheme of ours that it is, with its settings, or None where it is none of ours.
        bits: effective bits of one quantized weight, scales included.
        scheme: what its weights take where they stay quantized; None where this cannot be counted.
        skips: modules that are not quantized; None is transformers' default, the head and what is tied to it.
        note: where its weights do not stay quantized.
    """

    method: str
    settings: Quantization | None
    bits: float
    scheme: Scheme | None
    skips: tuple[str, ...] | None = None
    note: str = ""
    _stays: frozenset[str] = field(default_factory=lambda: frozenset({"cuda", "cpu"}))
    _min_capability: tuple[int, int] | None = None

    def stays_quantized(self, device_kind: str, capability: tuple[int, int] | None = None) -> bool:
        """Whether its weights stay as they are on such a device, or are expanded to 16 bits."""
        if device_kind not in self._stays:
            return False
        return self._min_capability is None or (capability is not None and capability >= self._min_capability)

    def held(self, device_kind: str, capability: tuple[int, int] | None = None) -> tuple[Quantization, Scheme]:
        """Settings and scheme to count what the checkpoint takes on such a device, for `arithmetic.weight_bytes`."""
        if self.scheme is None or not self.stays_quantized(device_kind, capability):
            return Quantization(), find_scheme("none")
        settings = self.settings or Quantization(self.method, llm_int8_skip_modules=self.skips)
        return settings, self.scheme


def checkpoint_of(prequantized: Mapping[str, object]) -> Checkpoint:
    """What this `quantization_config` of a checkpoint means for memory."""
    config: dict[str, Any] = dict(prequantized)
    named_method = config.get("quant_method") or ""
    method = str(getattr(named_method, "value", named_method)).lower()  # transformers' own configurations have an enum
    if not method and (config.get("load_in_8bit") or config.get("load_in_4bit")):
        method = "bitsandbytes"  # as transformers reads those without a method
    reader = _READERS.get(method)
    if reader is not None:
        return reader(method, config)
    named = next((config[key] for key in _BITS_KEYS if isinstance(config.get(key), int | float)), None)
    return Checkpoint(
        method=method or "an unnamed method",
        settings=None,
        bits=float(named if named is not None else _KNOWN_BITS.get(method, 16.0)),
        scheme=None,
        note=f"what {method or 'it'} holds in memory is not known here; it is counted as 16 bits",
    )


def settings_of_checkpoint(prequantized: Mapping[str, object]) -> tuple[Quantization | None, float]:
    """The scheme of ours that a checkpoint was made with (None for others'), and bits per weight with its scales."""
    found = checkpoint_of(prequantized)
    return found.settings, found.bits


def _bitsandbytes(method: str, config: dict[str, Any]) -> Checkpoint:
    skips = _names(config.get("llm_int8_skip_modules"))
    if config.get("load_in_4bit") or config.get("_load_in_4bit"):
        settings = Quantization(
            str(config.get("bnb_4bit_quant_type") or "fp4"),
            double_quant=bool(config.get("bnb_4bit_use_double_quant")),
            compute_dtype=str(config.get("bnb_4bit_compute_dtype") or "float32"),
            quant_storage=_unless(config.get("bnb_4bit_quant_storage"), "uint8"),
            llm_int8_skip_modules=skips,
        )
    else:
        threshold = config.get("llm_int8_threshold")
        settings = Quantization(
            "int8",
            llm_int8_threshold=None if threshold == 6.0 else threshold,
            llm_int8_has_fp16_weight=config.get("llm_int8_has_fp16_weight") or None,
            llm_int8_skip_modules=skips,
        )
    return _ours(method, settings)


def _packed(method: str, config: dict[str, Any]) -> Checkpoint:
    settings = Quantization(
        "cpu-int8" if config.get("bits") == 8 else "cpu-int4",
        group_size=config.get("group_size"),
        llm_int8_skip_modules=_names(config.get("skip_modules")),
    )
    return _ours(method, settings, stays=frozenset({"cpu"}))


def _ours(method: str, settings: Quantization, stays: frozenset[str] = frozenset({"cuda", "cpu"})) -> Checkpoint:
    scheme = find_scheme(settings.scheme)
    return Checkpoint(
        method=method,
        settings=settings,
        bits=scheme.bits_per_weight(settings),
        scheme=scheme,
        skips=settings.llm_int8_skip_modules,
        _stays=stays,
    )


def _grouped(method: str, config: dict[str, Any]) -> Checkpoint:
    """GPTQ and AWQ: codes, a half-precision scale and a zero point of as many bits for each group of inputs."""
    bits = int(config.get("bits") or config.get("w_bit") or 4)
    group = int(config.get("group_size") or config.get("q_group_size") or 128)
    named = _names(config.get("modules_to_not_convert"))
    skips = None if named is None else ("lm_head", *named)  # those come on top of the default
    has_index = method == "gptq"

    def linear_bytes(outputs: int, inputs: int, settings: Quantization, dtype_bytes: int) -> int:
        groups = 1 if group < 1 else math.ceil(inputs / group)
        codes, zeros = outputs * inputs * bits // 8, groups * outputs * bits // 8
        return codes + zeros + groups * outputs * 2 + (4 * inputs if has_index else 0)

    settings = None
    if has_index and bits == 4 and group in (32, 64, 128, 256):
        settings = Quantization("gptq", group_size=group)
    return _foreign(method, linear_bytes, settings=settings, skips=skips)


def _fp8(method: str, config: dict[str, Any]) -> Checkpoint:
    block = config.get("weight_block_size") or None
    scale = 1 if config.get("scale_fmt") == "ue8m0" else 4

    def linear_bytes(outputs: int, inputs: int, settings: Quantization, dtype_bytes: int) -> int:
        blocks = math.ceil(outputs / block[0]) * math.ceil(inputs / block[1]) if block else 1
        activation = 4 if config.get("activation_scheme") == "static" else 0
        return outputs * inputs + blocks * scale + activation

    return _foreign(
        method,
        linear_bytes,
        skips=_names(config.get("modules_to_not_convert")),
        quantizes=frozenset({"linear", "experts"}),
        stays=frozenset({"cuda"}),
        min_capability=(8, 9),
        note="a CPU, and a GPU before compute capability 8.9, expand its weights to 16 bits while loading",
    )


def _mxfp4(method: str, config: dict[str, Any]) -> Checkpoint:
    def linear_bytes(outputs: int, inputs: int, settings: Quantization, dtype_bytes: int) -> int:
        return outputs * inputs // 2 + outputs * inputs // 32

    return _foreign(
        method,
        linear_bytes,
        skips=_names(config.get("modules_to_not_convert")),
        quantizes=frozenset({"experts"}),
        stays=frozenset({"cuda"}),
        min_capability=(7, 5),
        note="without triton and the package kernels, and on a CPU, its weights are expanded to 16 bits while loading",
    )


def _compressed_tensors(method: str, config: dict[str, Any]) -> Checkpoint:
    groups = config.get("config_groups") or {}
    weights = next((each.get("weights") or {} for each in groups.values() if isinstance(each, dict)), {})
    return Checkpoint(
        method=method,
        settings=None,
        bits=float(weights.get("num_bits") or 16),
        scheme=None,
        skips=_names(config.get("ignore")),
        note="compressed-tensors expands its weights to 16 bits at the first answer",
        _stays=frozenset(),
    )


def _foreign(
    method: str,
    linear_bytes: LinearBytes,
    *,
    settings: Quantization | None = None,
    skips: tuple[str, ...] | None = None,
    quantizes: frozenset[str] = frozenset({"linear"}),
    stays: frozenset[str] = frozenset({"cuda", "cpu"}),
    min_capability: tuple[int, int] | None = None,
    note: str = "",
) -> Checkpoint:
    scheme = Scheme(
        name=method,
        summary=f"as the checkpoint has it ({method})",
        backend="other",
        linear_bytes=linear_bytes,
        devices=stays,
        min_capability=min_capability,
        quantizes=quantizes,
    )
    return Checkpoint(
        method=method,
        settings=settings,
        bits=scheme.bits_per_weight(settings),
        scheme=scheme,
        skips=skips,
        note=note,
        _stays=stays,
        _min_capability=min_capability,
    )


def _names(value: object) -> tuple[str, ...] | None:
    return tuple(str(each) for each in value) if isinstance(value, list | tuple) else None


def _unless(value: object, usual: str) -> str | None:
    name = str(value).removeprefix("torch.") if value is not None else usual
    return None if name == usual else name


_READERS: dict[str, Callable[[str, dict[str, Any]], Checkpoint]] = {
    "bitsandbytes": _bitsandbytes,
    "bitsandbytes_4bit": _bitsandbytes,
    "bitsandbytes_8bit": _bitsandbytes,
    "kani_nb_packed": _packed,
    "gptq": _grouped,
    "awq": _grouped,
    "fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
}
