"""In how many bits the weights are held: what can be asked for, as one frozen record, and the names of dtypes.

What a scheme is, what it needs and what it costs stands in `kani_nb.hardware.schemes`; this only says which one was
asked for, with which settings. The settings have bitsandbytes' and transformers' names.
"""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass, fields
from typing import Any

from kani_nb.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
#: What the 4-bit codes are stored in; only sharded training (FSDP) needs another than `uint8`.
STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32")
_GROUP_SIZES = (32, 64, 128, 256)


def dtype_name(dtype: Any, what: str = "dtype") -> str:
    """The name of a dtype, given as a torch dtype, as its name, or as people abbreviate it; None is `auto`.

    Raises:
        ConfigError: `what` cannot be of it.
    """
    short = {"none": "auto", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
    name = str(dtype).removeprefix("torch.").lower()
    name = short.get(name, name)
    if name not in DTYPES:
        raise ConfigError(f"{what} is {dtype!r}", why=f"it must be one of {', '.join(DTYPES)}")
    return name


_FLAGS = ("double_quant", "llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload")


def _short_setting(word: str, scheme: str) -> tuple[str, Any]:
    """The setting that `dq` or `g64` stands for, and its value."""
    if re.sub(r"[^a-z]", "", word) in ("dq", "doublequant"):
        return "double_quant", True
    if match := re.fullmatch(r"g(?:roup_size=)?(\d+)", word):
        return "group_size", int(match[1])
    raise ConfigError(f"{word!r} in the scheme {scheme!r} is no setting", fix="nf4+dq, or cpu-int4+g32")


@dataclass(frozen=True, slots=True)
class Quantization:
    """A quantization scheme and its settings. Settings that were not given are None: the scheme then has its default.

    Attributes:
        scheme: its name, for example `nf4`; `none` leaves the weights as the checkpoint has them. Two settings may be
            said with it: `nf4+dq` (double quantization), `cpu-int4+g64` (group size).
        double_quant: quantize the scales of 4-bit weights too (bitsandbytes' nested quantization).
        compute_dtype: what 4-bit weights are multiplied in; `auto` is the model's dtype.
        quant_storage: what the 4-bit codes are stored in.
        group_size: input weights that share a scale, for `cpu-int4` and `gptq`.
        llm_int8_threshold: hidden states above it are multiplied in half precision (LLM.int8(), arXiv 2208.07339).
        llm_int8_skip_modules: modules that stay as they are, by name, suffix or regular expression; instead of the
            default, which is the head. `none` alone skips nothing.
        llm_int8_has_fp16_weight: keep half-precision weights beside the 8-bit ones, for training.
        llm_int8_enable_fp32_cpu_offload: modules that a device map puts on the CPU stay as they are there.

    Raises:
        ConfigError: a value that no scheme could use.
    """

    scheme: str = "none"
    double_quant: bool | None = None
    compute_dtype: str = "auto"
    quant_storage: str | None = None
    group_size: int | None = None
    llm_int8_threshold: float | None = None
    llm_int8_skip_modules: tuple[str, ...] | None = None
    llm_int8_has_fp16_weight: bool | None = None
    llm_int8_enable_fp32_cpu_offload: bool | None = None

    def __post_init__(self) -> None:
        """Check each value once, here."""
        self._read_scheme()
        for flag in _FLAGS:
            if (given := getattr(self, flag)) is not None and not isinstance(given, bool):
                raise ConfigError(f"{flag} is {given!r}", why="it must be true or false")
        object.__setattr__(self, "compute_dtype", dtype_name(self.compute_dtype, "compute_dtype"))
        if self.quant_storage is not None:
            storage = str(self.quant_storage).removeprefix("torch.").lower()
            if storage not in STORAGES:
                raise ConfigError(
                    f"quant_storage is {self.quant_storage!r}", why=f"it must be one of {', '.join(STORAGES)}"
                )
            object.__setattr__(self, "quant_storage", storage)
        if self.group_size is not None and self.group_size not in _GROUP_SIZES:
            sizes = ", ".join(map(str, _GROUP_SIZES))
            raise ConfigError(f"group_size is {self.group_size!r}", why=f"it must be one of {sizes}")
        value: Any = self.llm_int8_threshold
        if value is not None:
            good = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not (good and math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"llm_int8_threshold is {value!r}", why="it must be a number of at least 0 (0 is off)"
                )
            object.__setattr__(self, "llm_int8_threshold", float(value))
        names: Any = self.llm_int8_skip_modules
        if names is not None:
            names = (names,) if isinstance(names, str) else tuple(names)
            if not all(isinstance(name, str) and name for name in names):
                raise ConfigError(f"llm_int8_skip_modules is {names!r}", why="it must hold names of modules")
            object.__setattr__(self, "llm_int8_skip_modules", () if names == ("none",) else names)

    def _read_scheme(self) -> None:
        """The name, and the settings that were said with it."""
        scheme: Any = self.scheme
        if not isinstance(scheme, str) or not scheme.strip():
            raise ConfigError(f"quantization is {scheme!r}", why="it must be the name of a scheme")
        name, *words = (word.strip().lower() for word in scheme.split("+"))
        object.__setattr__(self, "scheme", name)
        for word in words:
            setting, chosen = _short_setting(word, scheme)
            if getattr(self, setting) not in (None, chosen):
                raise ConfigError(f"{setting} is given as {chosen} ({scheme}) and as {getattr(self, setting)}")
            object.__setattr__(self, setting, chosen)

    @property
    def is_none(self) -> bool:
        """Whether the weights stay as the checkpoint has them."""
        return self.scheme == "none"

    @property
    def given(self) -> dict[str, Any]:
        """The settings that were given, by name, the scheme itself left out."""
        default = Quantization()
        return {
            each.name: value
            for each in fields(self)
            if each.name != "scheme" and (value := getattr(self, each.name)) != getattr(default, each.name)
        }

    @property
    def label(self) -> str:
        """What tables call it: the scheme, and what sets it apart."""
        settings = dict(self.given)
        words = [self.scheme]
        if settings.pop("double_quant", False):
            words.append("double quant")
        words += [f"{name.removeprefix('llm_int8_')}={value}" for name, value in settings.items()]
        return " + ".join(words)
