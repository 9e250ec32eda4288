"""Quantization schemes: what each stores, what it needs, and where it runs.

The planner, the panels and the engines read only these records. Schemes of other packages register a `Scheme` under the
entry-point group `kani_nb.quantization`, and are imported when they are asked for: a broken neighbour harms nobody.
How a scheme is carried out is transformers' (`transformers_config`), or this package's own `hardware.packed`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from kani_nb.errors import ConfigError, did_you_mean
from kani_nb.hardware.packed_codes import group_size_for
from kani_nb.hardware.scheme_configs import bitsandbytes_config, gptq_config, packed_config
from kani_nb.quantization import Quantization

GROUP = "kani_nb.quantization"
Backend = Literal["torch", "bitsandbytes", "packed", "gptq", "gguf", "other"]

#: Weights per scale of bitsandbytes' 4-bit types, and scales per scale of their double quantization.
_BNB_BLOCK, _BNB_NESTED_BLOCK = 64, 256
#: Bytes of the 16 code values of a 4-bit type, kept by each tensor; and of what double quantization adds to them.
_BNB_CODE, _BNB_NESTED_CODE = 64, 1024 + 4
DEFAULT_GROUP_SIZE = {"cpu-int4": 32, "gptq": 128}

#: `(out_features, in_features, settings, bytes of the model's dtype)` -> bytes of one linear weight with its scales.
LinearBytes = Callable[[int, int, Quantization, int], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One way of holding weights.

    Attributes:
        name: what `--quant` says.
        summary: one sentence for tables and help.
        backend: whose code carries it out.
        linear_bytes: bytes of one quantized linear weight with its scales, measured to be so.
        needs: `(distribution, lowest version)` that must be installed.
        devices: kinds of devices that run it: `cuda`, `cpu`, `mps`.
        min_capability: lowest CUDA compute capability.
        cpu_features: flags of the CPU that it is fast with (any of them); without them it still runs.
        knobs: the settings of `Quantization` that it takes.
        quantizes: the kinds of tensors that it quantizes (`shapes.TensorKind`), the head left out.
        quantizes_head: whether the output head is quantized too; an embedding tied to it stays, beside the copy.
        head_scheme: the scheme that the output head is held in, where it is another; its bytes and multiples count.
        in_multiple: what the inputs of a quantized linear must be a multiple of; others see `leaves_odd_shapes`.
        out_multiple: the same for its outputs.
        leaves_odd_shapes: whether linears of other shapes simply stay as they are.
        transformers_config: from settings and a dtype name, the `quantization_config` of `from_pretrained`.
        engine: the engine that runs it.
    """

    name: str
    summary: str
    backend: Backend
    linear_bytes: LinearBytes
    needs: tuple[tuple[str, str], ...] = ()
    devices: frozenset[str] = field(default_factory=lambda: frozenset({"cuda", "cpu"}))
    min_capability: tuple[int, int] | None = None
    cpu_features: tuple[str, ...] = ()
    knobs: frozenset[str] = frozenset()
    quantizes: frozenset[str] = frozenset({"linear"})
    quantizes_head: bool = False
    head_scheme: str | None = None
    in_multiple: int = 1
    out_multiple: int = 1
    leaves_odd_shapes: bool = True
    transformers_config: Callable[[Quantization, str], Any] | None = None
    engine: str = "hf"

    def bits_per_weight(self, settings: Quantization | None = None, dtype_bytes: int = 2) -> float:
        """Effective bits of one weight, scales included: those of a 4096 x 4096 linear layer."""
        side = 4096
        return self.linear_bytes(side, side, settings or Quantization(self.name), dtype_bytes) * 8 / side**2

    def check_settings(self, settings: Quantization) -> None:
        """Refuse settings that this scheme does not have.

        Raises:
            ConfigError: it names the setting, and the schemes that have it.
        """
        for name, value in settings.given.items():
            if name in self.knobs or value is False:
                continue
            having = [each.name for each in our_schemes() if name in each.knobs]
            raise ConfigError(
                f"{name}={value!r} was given with the scheme {self.name}",
                why=f"only {' and '.join(having)} have it" if having else "no scheme has it",
                fix=f"--quant {having[0]}, or leave it out" if having else "leave it out",
            )


def _as_dtype(outputs: int, inputs: int, settings: Quantization, dtype_bytes: int) -> int:
    return outputs * inputs * dtype_bytes


def _int8(outputs: int, inputs: int, settings: Quantization, dtype_bytes: int) -> int:
    if settings.llm_int8_has_fp16_weight:
        return outputs * inputs * dtype_bytes
    return outputs * inputs + 4 * outputs


def _bnb_4bit(outputs: int, inputs: int, settings: Quantization, dtype_bytes: int) -> int:
    weights = outputs * inputs
    blocks = math.ceil(weights / _BNB_BLOCK)
    if settings.double_quant:
        scales = blocks + 4 * math.ceil(blocks / _BNB_NESTED_BLOCK) + _BNB_NESTED_CODE
    else:
        scales = 4 * blocks
    return math.ceil(weights / 2) + scales + _BNB_CODE


def _packed_int8(outputs: int, inputs: int, settings: Quantization, dtype_bytes: int) -> int:
    return outputs * inputs + dtype_bytes * outputs


def _packed_int4(outputs: int, inputs: int, settings: Quantization, dtype_bytes: int) -> int:
    wanted = settings.group_size or DEFAULT_GROUP_SIZE["cpu-int4"]
    groups = inputs // (group_size_for(inputs, wanted) or wanted)
    return outputs * inputs // 2 + outputs * groups * 2 * dtype_bytes


def _gptq(outputs: int, inputs: int, settings: Quantization, dtype_bytes: int) -> int:
    # Groups that do not divide the inputs are written as smaller ones, for the kernels' sake.
    groups = inputs // math.gcd(inputs, settings.group_size or DEFAULT_GROUP_SIZE["gptq"])
    return outputs * inputs // 2 + groups * outputs * 2 + groups * outputs // 2 + 4 * inputs


def _gguf(bits: float, outputs: int, inputs: int, settings: Quantization, dtype_bytes: int) -> int:
    return round(outputs * inputs * bits / 8)


_BNB = (("bitsandbytes", "0.46.1"),)
_BNB_KNOBS = frozenset({"llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload"})
_INT8_KNOBS = frozenset({"llm_int8_threshold", "llm_int8_has_fp16_weight"}) | _BNB_KNOBS
_4BIT_KNOBS = frozenset({"double_quant", "compute_dtype", "quant_storage"}) | _BNB_KNOBS
_FAST_4BIT = ("avx512_bf16",)

_OURS = (
    Scheme(
        name="none",
        summary="the weights as the checkpoint has them, or in --dtype",
        backend="torch",
        linear_bytes=_as_dtype,
        devices=frozenset({"cuda", "cpu", "mps"}),
        quantizes_head=False,
    ),
    Scheme(
        name="int8",
        summary="LLM.int8(): half the memory of 16 bits, nearly the same answers, slower",
        backend="bitsandbytes",
        linear_bytes=_int8,
        needs=_BNB,
        min_capability=(7, 5),
        knobs=_INT8_KNOBS,
        transformers_config=bitsandbytes_config,
    ),
    Scheme(
        name="nf4",
        summary="4-bit NormalFloat: the better of the 4-bit types for trained weights",
        backend="bitsandbytes",
        linear_bytes=_bnb_4bit,
        needs=_BNB,
        min_capability=(6, 0),
        cpu_features=_FAST_4BIT,
        knobs=_4BIT_KNOBS,
        in_multiple=64,
        out_multiple=32,
        leaves_odd_shapes=False,
        transformers_config=bitsandbytes_config,
    ),
    Scheme(
        name="fp4",
        summary="4-bit floating point: as small as nf4, and further from the original",
        backend="bitsandbytes",
        linear_bytes=_bnb_4bit,
        needs=_BNB,
        min_capability=(6, 0),
        cpu_features=_FAST_4BIT,
        knobs=_4BIT_KNOBS,
        in_multiple=64,
        out_multiple=32,
        leaves_odd_shapes=False,
        transformers_config=bitsandbytes_config,
    ),
    Scheme(
        name="cpu-int8",
        summary="torch's packed 8-bit products on a CPU: nothing to install, about twice as fast as bfloat16",
        backend="packed",
        linear_bytes=_packed_int8,
        devices=frozenset({"cpu"}),
        cpu_features=("avx512f", "avx2", "asimd"),
        knobs=frozenset({"llm_int8_skip_modules"}),
        quantizes_head=True,
        in_multiple=16,
        transformers_config=packed_config,
    ),
    Scheme(
        name="cpu-int4",
        summary="torch's packed 4-bit products on a CPU: the fastest there, at some cost in quality",
        backend="packed",
        linear_bytes=_packed_int4,
        devices=frozenset({"cpu"}),
        cpu_features=("avx512f", "avx2", "asimd"),
        knobs=frozenset({"group_size", "llm_int8_skip_modules"}),
        quantizes_head=True,
        head_scheme="cpu-int8",
        in_multiple=32,
        out_multiple=16,
        transformers_config=packed_config,
    ),
    Scheme(
        name="gptq",
        summary="4 bits fitted to example texts: the best answers of the 4-bit schemes, minutes to make once",
        backend="gptq",
        linear_bytes=_gptq,
        needs=(("gptqmodel", "7.7"), ("optimum", "2.3")),
        knobs=frozenset({"group_size"}),
        in_multiple=32,
        out_multiple=32,
        leaves_odd_shapes=False,
        transformers_config=gptq_config,
    ),
)

#: Effective bits of llama.cpp's types (its `ggml-common.h` blocks); the `_m` mixes are their usual averages.
_GGUF_BITS = {
    "q8_0": 8.5, "q6_k": 6.5625, "q5_k_m": 5.69, "q5_0": 5.5, "q4_k_m": 4.85, "q4_1": 5.0, "q4_0": 4.5, "q3_k_m": 3.91,
    "q2_k": 2.63,
}  # fmt: skip
_GGUF = tuple(
    Scheme(
        name=name,
        summary=f"llama.cpp's {name.upper()}, from a GGUF file",
        backend="gguf",
        linear_bytes=partial(_gguf, bits),
        needs=(("llama-cpp-python", "0.3"),),
        devices=frozenset({"cuda", "cpu", "mps"}),
        quantizes_head=True,
        engine="llamacpp",
    )
    for name, bits in _GGUF_BITS.items()
)


def our_schemes() -> tuple[Scheme, ...]:
    """The schemes of this package that transformers' engine runs, in the order tables show them."""
    return _OURS


def gguf_schemes() -> tuple[Scheme, ...]:
    """The types of GGUF files, for llama.cpp."""
    return _GGUF


def scheme_names() -> list[str]:
    """Every scheme's name, ours and strangers'; imports none of the latter."""
    return list(dict.fromkeys([*(each.name for each in (*_OURS, *_GGUF)), *_strangers_names()]))


def _strangers_names() -> list[str]:
    return sorted({each.name.lower() for each in entry_points(group=GROUP)} - {each.name for each in (*_OURS, *_GGUF)})


def find_scheme(name: str) -> Scheme:
    """The scheme of that name; one of another package is imported now. No other package takes over a name of ours.

    Raises:
        ConfigError: there is none (with the near misses), or what is registered is no scheme or cannot be imported.
    """
    wanted = name.strip().lower()
    for scheme in (*_OURS, *_GGUF):
        if scheme.name == _SYNONYMS.get(wanted, wanted):
            return scheme
    try:
        return _strangers_scheme(wanted, tuple(sys.path))
    except LookupError:
        pass
    known = [*(each.name for each in _OURS), *_strangers_names()]
    fix = did_you_mean(wanted, scheme_names()) or f"the schemes are {', '.join(known)}"
    if wanted in ("int4", "q4", "4-bit"):
        fix = "nf4 (bitsandbytes), or cpu-int4 on a CPU (torch's own)"
    raise ConfigError(f"there is no quantization scheme {name!r}", fix=fix)


#: What people call them elsewhere.
_SYNONYMS = {"8bit": "int8", "llm.int8": "int8", "llm_int8": "int8", "4bit": "nf4", "full": "none"}


@cache
def _strangers_scheme(wanted: str, _path: tuple[str, ...]) -> Scheme:
    """The scheme of another package; only what was found is kept, since a plan asks many times, and looking is slow.

    Raises:
        LookupError: nobody registered it.
        ConfigError: it cannot be imported, or is no scheme of that name.
    """
    point = next((each for each in entry_points(group=GROUP) if each.name.lower() == wanted), None)
    if point is None:
        raise LookupError(wanted)
    return _imported(point)


def _imported(point: EntryPoint) -> Scheme:
    owner = point.dist.name if point.dist is not None else "another package"
    said = f"the quantization scheme {point.name!r} of {owner}"
    fix = f"update {owner}, or take another scheme"
    try:
        found = point.load()
    except Exception as error:
        raise ConfigError(f"{said} could not be imported", why=f"{type(error).__name__}: {error}", fix=fix) from error
    if not isinstance(found, Scheme):
        raise ConfigError(f"{said} is {_short(found)}", why="that is no Scheme", fix=fix)
    if found.name.lower() != point.name.lower():  # it would be looked for by its own name later
        raise ConfigError(f"{said} calls itself {found.name!r}", why="both names must be the same", fix=fix)
    return found


def _short(found: object) -> str:
    text = " ".join(repr(found).split())
    return text if len(text) <= 80 else f"{text[:79]}…"
