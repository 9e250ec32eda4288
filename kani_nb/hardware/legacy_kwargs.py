"""The old ways of asking for a precision, read into the present ones: transformers 4's arguments and config objects.

`load_in_4bit=True`, `load_in_8bit=True`, `torch_dtype`, `use_auth_token`, `quantization_config=BitsAndBytesConfig(...)`
or a dict, as the documents of kani and transformers have them, wherever they were written: among the engine's own
arguments or in `model_load_kwargs`. What the caller passed is never changed. Nothing here looks at a model or a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from kani_nb.errors import ConfigError
from kani_nb.quantization import Quantization, dtype_name

#: transformers' names of our settings.
_SETTINGS = {
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_4bit_quant_storage": "quant_storage",
    "llm_int8_threshold": "llm_int8_threshold",
    "llm_int8_skip_modules": "llm_int8_skip_modules",
    "llm_int8_has_fp16_weight": "llm_int8_has_fp16_weight",
    "llm_int8_enable_fp32_cpu_offload": "llm_int8_enable_fp32_cpu_offload",
    "double_quant": "double_quant",
    "compute_dtype": "compute_dtype",
    "quant_storage": "quant_storage",
    "group_size": "group_size",
}
_FLAGS = ("load_in_4bit", "load_in_8bit")
_QUANT_TYPES = ("bnb_4bit_quant_type", "quant_type")
#: What was said about precision; `QUANTIZATION_NAMES` of the arguments are read here and nowhere else.
QUANTIZATION_NAMES = frozenset({"quantization_config", *_FLAGS, *_QUANT_TYPES, *_SETTINGS})
#: Arguments that transformers 4 took and 5 refuses, and that never changed what was loaded.
_DROPPED = frozenset({"low_cpu_mem_usage", "offload_state_dict", "_fast_init", "resume_download"})


#: Arguments of `from_pretrained` that say where files lie; they are found by `kani_nb.engines.sources`.
_OF_FILES = frozenset({"cache_dir", "subfolder", "variant", "force_download", "proxies"})


@dataclass(frozen=True, slots=True)
class Translation:
    """What the arguments of an engine say, in present terms.

    Attributes:
        quantization: the scheme and its settings.
        foreign_config: a `quantization_config` of a method that has no scheme here; passed on as it is.
        dtype: None where nothing was said.
        device_map, max_memory, offload_folder, token, revision: None where nothing was said.
        local_only, trust_remote_code: false where nothing was said.
        rest: what goes on to `from_pretrained` unchanged.
    """

    quantization: Quantization
    foreign_config: Any = None
    dtype: str | None = None
    device_map: Any = None
    max_memory: Any = None
    offload_folder: str | None = None
    token: str | None = None
    revision: str | None = None
    local_only: bool = False
    trust_remote_code: bool = False
    rest: dict[str, Any] = field(default_factory=dict)


def translate(
    quantization: Any, model_load_kwargs: Mapping[str, Any] | None, arguments: Mapping[str, Any]
) -> Translation:
    """Read `quantization=`, the `model_load_kwargs`, and further arguments with old or new names together.

    Args:
        quantization: the name of a scheme, a `Quantization`, a `Scheme`, or a `quantization_config` (object or dict).
        model_load_kwargs: as given to the engine; not changed.
        arguments: of the engine, those that concern loading: `QUANTIZATION_NAMES`, `torch_dtype`, `use_auth_token`.

    Raises:
        ConfigError: two of them contradict each other, or a value cannot be used.
    """
    load = {name: value for name, value in dict(model_load_kwargs or {}).items() if name not in _DROPPED}
    said = {name: value for name, value in arguments.items() if value is not None}
    for name in QUANTIZATION_NAMES & set(load):
        value = load.pop(name)
        if value is not None and (other := said.setdefault(name, value)) is not value and other != value:
            raise ConfigError(f"{name} is given twice: {said[name]!r}, and {value!r} in model_load_kwargs")
    dtypes = (load.pop("torch_dtype", None), load.pop("dtype", None), said.pop("torch_dtype", None))
    dtype = _agreed("dtype", *(None if each is None else dtype_name(each) for each in dtypes))
    token = _agreed(
        "token", *(_as_token(each.pop(name, None)) for each in (load, said) for name in ("use_auth_token", "token"))
    )
    settings, foreign = _quantization(quantization, said)
    folder = load.pop("offload_folder", None)
    if unused := sorted(_OF_FILES & set(load)):
        raise ConfigError(
            f"{unused[0]} in model_load_kwargs cannot be used",
            why="the files are found before transformers loads them",
            fix="give a folder instead of the repository's name",
        )
    return Translation(
        quantization=settings,
        foreign_config=foreign,
        dtype=dtype,
        device_map=load.pop("device_map", None),
        max_memory=load.pop("max_memory", None),
        offload_folder=None if folder is None else str(folder),
        token=token,
        revision=load.pop("revision", None),
        local_only=bool(load.pop("local_files_only", False)),
        trust_remote_code=bool(load.pop("trust_remote_code", False)),
        rest=load,
    )


def _agreed(name: str, *values: Any) -> Any:
    given = [value for value in values if value is not None]
    if any(value != given[0] for value in given):
        raise ConfigError(
            f"{name} is given as {' and as '.join(map(str, dict.fromkeys(given)))}", fix="give one of them"
        )
    return given[0] if given else None


def _as_token(value: Any) -> str | None:
    """A token; `True` meant the saved login, which is looked for anyway, and `False` none."""
    return value if isinstance(value, str) else None


def _quantization(quantization: Any, said: Mapping[str, Any]) -> tuple[Quantization, Any]:
    """The scheme and settings, and a foreign config."""
    given = dict(said)
    config = given.pop("quantization_config", None)
    if config is not None and _is_said(quantization):
        raise ConfigError("quantization and quantization_config are both given", fix="give one of them")
    base, foreign = _read(config if config is not None else quantization)
    words = _settings(given)
    scheme = words.pop("scheme", None)
    if scheme == "fp4" and base.scheme == "nf4" and not any(given.get(name) for name in _QUANT_TYPES):
        scheme = None  # `load_in_4bit` alone says no more than four bits
    if foreign is not None and (scheme or words):
        raise ConfigError(
            f"{', '.join(sorted(given))} cannot be given beside a {type(foreign).__name__}", fix="put them into it"
        )
    if scheme is not None and not base.is_none and base.scheme != scheme:
        raise ConfigError(f"the scheme is given as {base.scheme} and as {scheme}", fix="give one of them")
    if base.is_none and scheme is None and words:
        scheme = _implied(words)
    return replace(base, **({"scheme": scheme} if scheme else {}), **words), foreign


def _is_said(quantization: Any) -> bool:
    return quantization is not None and quantization != "none" and quantization != Quantization()


def _implied(settings: Mapping[str, Any]) -> str:
    """The scheme that settings without one belong to: the documents say `llm_int8_threshold=10` alone for 8 bits."""
    if any(name.startswith("llm_int8") for name in settings):
        return "int8"
    named = ", ".join(sorted(settings))
    raise ConfigError(f"{named} was given without a scheme", fix="say which: quantization='nf4' (--quant nf4)")


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Our names for what was said under transformers'; `scheme` among them where a flag or a type says it."""
    found: dict[str, Any] = {}
    for name, ours in _SETTINGS.items():
        if (value := given.get(name)) is None:
            continue
        if ours in found and found[ours] != value:
            raise ConfigError(f"{ours} is given as {found[ours]!r} and as {value!r}", fix="give one of them")
        found[ours] = tuple(value) if isinstance(value, list) else value
    kind = next((str(given[name]).lower() for name in _QUANT_TYPES if given.get(name) is not None), None)
    if kind is not None and kind not in ("fp4", "nf4"):
        raise ConfigError(f"bnb_4bit_quant_type is {kind!r}", why="it must be fp4 or nf4")
    if given.get("load_in_4bit") and given.get("load_in_8bit"):
        raise ConfigError("load_in_4bit and load_in_8bit are both given", fix="give one of them")
    if given.get("load_in_8bit"):
        found["scheme"] = "int8"
    elif given.get("load_in_4bit") or kind is not None:
        found["scheme"] = kind or "fp4"  # transformers' default, and the documents' title
    return found


def _read(value: Any) -> tuple[Quantization, Any]:
    """Any way of saying a scheme -> our record, and the object itself where it is of a method without a scheme here."""
    if value is None:
        return Quantization(), None
    if isinstance(value, Quantization):
        return value, None
    if isinstance(value, str):
        return Quantization(value), None
    name = getattr(value, "name", None)
    if isinstance(name, str) and hasattr(value, "linear_bytes"):  # a Scheme
        return Quantization(name), None
    if isinstance(value, Mapping):
        return _from_dict(dict(value)), None
    if type(value).__name__ == "BitsAndBytesConfig":
        return _from_dict(dict(value.to_dict()), is_complete=True), None
    if hasattr(value, "quant_method") and hasattr(value, "to_dict"):
        return Quantization(), value
    raise ConfigError(
        f"quantization is {value!r}",
        why="it must be the name of a scheme, a BitsAndBytesConfig, or a dict of its arguments",
        fix="quantization='nf4'",
    )


def _from_dict(config: dict[str, Any], *, is_complete: bool = False) -> Quantization:
    """A `BitsAndBytesConfig`'s arguments; `is_complete` when defaults are among them, which then say nothing."""
    method = config.pop("quant_method", None)
    if method is not None and "bitsandbytes" not in str(getattr(method, "value", method)):
        raise ConfigError(
            f"quant_method is {method!r} in a dict", fix="give transformers' config object for it instead"
        )
    known = {**dict.fromkeys(_SETTINGS), **dict.fromkeys(_FLAGS), **dict.fromkeys(_QUANT_TYPES)}
    unknown = sorted(set(config) - set(known) - {"_load_in_4bit", "_load_in_8bit"})
    if unknown and not is_complete:
        raise ConfigError(f"quantization_config holds {unknown[0]!r}", fix=f"known are {', '.join(known)}")
    is_4bit = bool(config.get("load_in_4bit") or config.get("_load_in_4bit"))
    if is_complete:  # what does not concern the scheme only has its default
        concerned = "bnb_4bit" if is_4bit else "llm_int8_threshold llm_int8_has_fp16_weight"
        common = ("load_in_", "llm_int8_skip", "llm_int8_enable")
        config = {
            name: value
            for name, value in config.items()
            if name.startswith((*concerned.split(), *common)) and value is not False
        }
    words = _settings(config)
    scheme = words.pop("scheme", None)
    default = {"llm_int8_threshold": 6.0, "quant_storage": "uint8"}
    words = {name: value for name, value in words.items() if not (is_complete and _same(default.get(name), value))}
    scheme = scheme or (_implied(words) if words else "none")
    return Quantization(scheme, **words)


def _same(default: Any, value: Any) -> bool:
    return default is not None and str(value).removeprefix("torch.") == str(default)


def settings_among(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of an engine's keyword arguments, those that `translate` reads."""
    names = QUANTIZATION_NAMES | {"torch_dtype", "use_auth_token"} | {each.name for each in fields(Quantization)}
    return {name: value for name, value in arguments.items() if name in names - {"scheme"}}
