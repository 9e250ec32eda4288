"""The engine panel's controls as plain values, and those values as an `EngineConfig`: the same table as the magics'.

Pure: no widget, no engine. What a person typed stays as it was typed until it can be read; each mistake is told at the
control that it was made in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kani_nb.config import EngineConfig, config_from_args
from kani_nb.errors import ConfigError, KaniNbError
from kani_nb.generation_params import GenerationParams
from kani_nb.hardware.schemes import find_scheme
from kani_nb.notebook.secrets import refuse_secrets
from kani_nb.options import LOAD_OPTIONS, Option
from kani_nb.quantization import Quantization

#: What a front end sends and shows: text, a list of texts, true, false, or null for the default.
Value = str | bool | list[str] | None
Values = dict[str, Value]

_SECTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Model", ("model",)),
    (
        "Precision",
        (
            *("scheme", "dtype", "double_quant", "compute_dtype", "quant_storage", "group_size", "llm_int8_threshold"),
            *("llm_int8_skip_modules", "llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload"),
            "cache_quantized",
        ),
    ),
    ("Place", ("device", "device_map", "max_memory", "allow_offload", "offload_folder")),
    ("Context", ("max_context_size", "cache_gib", "threads")),
    ("Answers", tuple(option.dest for option in LOAD_OPTIONS if option.of == "generation")),
    ("Files", ("revision", "local_only", "trust_remote_code", "allow_pickle")),
)
_LABELS = {
    "model": "Model",
    "scheme": "Scheme",
    "dtype": "Data type",
    "double_quant": "Double quantization",
    "compute_dtype": "Computed in",
    "quant_storage": "Stored in",
    "group_size": "Weights per scale",
    "llm_int8_threshold": "Outlier threshold",
    "llm_int8_skip_modules": "Modules to leave",
    "llm_int8_has_fp16_weight": "Keep 16-bit weights",
    "llm_int8_enable_fp32_cpu_offload": "Leave the CPU's part unquantized",
    "cache_quantized": "Keep a quantized copy",
    "device": "Device",
    "device_map": "Device map",
    "max_memory": "Memory limits",
    "allow_offload": "Allow offloading",
    "offload_folder": "Offload folder",
    "max_context_size": "Context length",
    "cache_gib": "KV cache for reuse",
    "threads": "CPU threads",
    "do_sample": "Sampling",
    "eos_token_id": "End tokens",
    "stop_strings": "Stop before",
    "revision": "Revision",
    "local_only": "Never ask the network",
    "trust_remote_code": "Trust the repository's code",
    "allow_pickle": "Allow pickled weights",
}
_BY_NAME = {option.dest: option for option in LOAD_OPTIONS}
#: Fields of an engine that is told a model, and not how to hold it.
_SERVED = {"model", "max_context_size"}
_LLAMA_CPP = {*_SERVED, "revision", "cache_gib", "threads", "local_only", "device"}


@dataclass(frozen=True, slots=True)
class Field:
    """One control.

    Attributes:
        name: the option's `dest`.
        kind: `text`, `number`, `choice`, `switch` (on or off), `choice3` (default, yes or no) or `list` of texts.
        choices: of a `choice`.
        flag: what the magic line says.
    """

    name: str
    label: str
    kind: str
    help: str
    flag: str
    choices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, for the front end."""
        return {each.name: getattr(self, each.name) for each in fields(self)} | {"choices": list(self.choices)}


def sections() -> list[dict[str, Any]]:
    """Every control in the order it is shown: `[{"title": ..., "fields": [...]}, ...]`, JSON-safe."""
    return [{"title": title, "fields": [_field(name).to_dict() for name in names]} for title, names in _SECTIONS]


def _field(name: str) -> Field:
    if name == "model":
        return Field(name, _LABELS[name], "text", "alias, org/model, folder, FILE.gguf or a server's address", "")
    option = _BY_NAME[name]
    label = _LABELS.get(name, name.replace("_", " ").capitalize())
    return Field(name, label, _kind(option), option.help.replace("%%", "%"), option.flag, option.choices)


def _kind(option: Option) -> str:
    if option.type is bool:
        return "switch" if _default(option) is False else "choice3"
    if option.choices:
        return "choice"
    if isinstance(_default(option), tuple) or option.is_repeated:
        return "list"
    return "number" if option.type in (int, float) else "text"


_DEFAULT = EngineConfig("model")


def _default(option: Option) -> Any:
    return getattr(_owner(_DEFAULT, option), option.dest)


def _owner(config: EngineConfig, option: Option) -> Any:
    return config if option.of == "engine" else getattr(config, option.of)


def values_of(config: EngineConfig) -> Values:
    """The controls as `config` sets them; the default of an option is None, or false for a switch."""
    values: Values = {"model": config.model}
    for option in LOAD_OPTIONS:
        given, default = getattr(_owner(config, option), option.dest), _default(option)
        values[option.dest] = None if given == default and not isinstance(given, bool) else _shown(given)
    return values


def _shown(value: Any) -> Value:
    if isinstance(value, tuple):
        return [str(each) for each in value] or ["none"]
    return value if isinstance(value, bool) else str(value)


@dataclass(frozen=True, slots=True)
class FormReading:
    """What the controls say.

    Attributes:
        config: None where something cannot be read.
        errors: by the name of the control, in one paragraph each.
    """

    config: EngineConfig | None
    errors: Mapping[str, str]


def read_form(values: Mapping[str, Value]) -> FormReading:
    """The configuration that the controls describe, or what is wrong, by control."""
    given: dict[str, Any] = {"model": str(values.get("model") or "")}
    errors: dict[str, str] = {}
    if refusal := refusal_of(given["model"]):
        return FormReading(None, {"model": refusal})
    if not given["model"].strip():
        errors["model"] = "no model was named: type an alias, org/model, a folder, FILE.gguf or a server's address"
        given["model"] = _DEFAULT.model  # so that what else is wrong is told too
    for option in LOAD_OPTIONS:
        value = values.get(option.dest)
        if value is None or value == "" or (isinstance(value, list) and not any(value)):
            continue
        if refusal := refusal_of(value):
            errors[option.dest] = refusal
            continue
        try:
            given[option.dest] = _read(option, value)
        except ValueError:
            kind = "a whole number" if option.type is int else "a number"
            errors[option.dest] = f"{_field(option.dest).label} is {value!r}: it must be {kind}"
        except ConfigError as error:
            errors[option.dest] = str(error)
    for name, complaint in _refused(given).items():
        errors.setdefault(name, complaint)
    if errors:
        return FormReading(None, errors)
    return FormReading(config_from_args(given), {})


def refusal_of(value: Value) -> str:
    """Why a control may not hold `value`: a token, a password; empty where it may."""
    try:
        refuse_secrets("\n".join(map(str, value)) if isinstance(value, list) else str(value), "panel")
    except ConfigError as error:
        return str(error)
    return ""


def without_foreign_knobs(before: Mapping[str, Value], values: Mapping[str, Value]) -> Values:
    """`values`, and where they choose another scheme, without the settings that only the one before had."""
    kept = dict(values)
    if values.get("scheme") == before.get("scheme"):
        return kept
    try:
        knobs = find_scheme(str(values.get("scheme") or "none")).knobs
    except KaniNbError:
        return kept
    for name in _SETTINGS - set(knobs):
        if values.get(name) == before.get(name):
            kept[name] = _UNSET[name]
    return kept


def _read(option: Option, value: Value) -> Any:
    if option.type is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{option.dest} is {value!r}", why="it must be true or false")
        return value
    if option.is_repeated:
        given = value if isinstance(value, list) else [value]
        return tuple(option.type(str(each)) for each in given if each != "")
    return option.type(str(value))


def _refused(given: Mapping[str, Any]) -> dict[str, str]:
    """What each record refuses, one after the other, so that a mistake in one hides none in another."""
    found: dict[str, str] = {}
    for of, make in (
        ("engine", lambda some: EngineConfig(given["model"], **some)),
        ("quantization", lambda some: Quantization(**some)),
        ("generation", GenerationParams.from_kwargs),
    ):
        some = {option.dest: given[option.dest] for option in LOAD_OPTIONS if option.of == of and option.dest in given}
        try:
            make(some)
        except KaniNbError as error:
            found[field_of(error, some) or next(iter(some), "model")] = str(error)
    return found


def field_of(error: KaniNbError, names: Iterable[str] = _BY_NAME) -> str:
    """The control that an error is about: the one that it names first; empty where it names none."""
    said = error.what.lower()
    found = []
    for name in names:
        option = _BY_NAME.get(name)
        words = {name, name.replace("_", " "), *([option.flag] if option else []), *_SYNONYMS.get(name, ())}
        at = min((place for word in words if (place := said.find(word)) >= 0), default=-1)
        if at >= 0:
            found.append((at, -len(name), name))
    return min(found)[2] if found else ""


_SYNONYMS = {"scheme": ("--quant", "quantization"), "device_map": ("the device map",)}


_SETTINGS = {option.dest for option in LOAD_OPTIONS if option.of == "quantization"} - {"scheme"}
_UNSET = values_of(_DEFAULT)


def fields_for(engine: str, knobs: Iterable[str]) -> set[str]:
    """The controls that mean something for an engine, and for a scheme with these knobs."""
    generation = {option.dest for option in LOAD_OPTIONS if option.of == "generation"}
    if engine in ("hf", "llama2"):
        return {"model", *_BY_NAME} - (_SETTINGS - set(knobs))
    return (_LLAMA_CPP if engine == "llamacpp" else _SERVED) | generation
