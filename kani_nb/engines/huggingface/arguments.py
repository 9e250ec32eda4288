"""Everything a `HuggingEngine` was told about loading, read once: old and new names, in one frozen record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kani_nb.config import EngineConfig
from kani_nb.errors import ConfigError
from kani_nb.hardware.legacy_kwargs import QUANTIZATION_NAMES, settings_among, translate
from kani_nb.quantization import Quantization, dtype_name

if TYPE_CHECKING:
    from kani_nb.engines.huggingface.multimodal import MediaOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """What to load, and how; see `HuggingEngine` for the fields.

    Attributes:
        folder: of the model's files; with `gguf_file` the name of the one in it.
        origin: which weights these are, in a sentence; known when the files have been found.
        quantization: the scheme and its settings.
        foreign_config: a `quantization_config` of a method without a scheme here.
        max_memory: as given; see `kani_nb.hardware.placement`.
    """

    name: str
    folder: Path | None = None
    gguf_file: str | None = None
    origin: str = ""
    dtype: str = "auto"
    quantization: Quantization = field(default_factory=Quantization)
    foreign_config: Any = None
    device: str | None = None
    device_map: Any = None
    max_memory: Any = None
    allow_offload: bool = False
    offload_folder: str | None = None
    cache_quantized: bool = False
    max_context_size: int | None = None
    threads: int | None = None
    token: str | None = None
    revision: str | None = None
    local_only: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    tokenizer_cls: Any = None
    model_cls: Any = None
    tokenizer_kwargs: dict[str, Any] = field(default_factory=dict)
    model_load_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> Path:
        """The folder or the file that is loaded."""
        assert self.folder is not None, "the files have not been looked for"
        return self.folder / self.gguf_file if self.gguf_file else self.folder


_FOUND_LATER = {"name", "folder", "gguf_file", "origin", "foreign_config"}
#: Names of the arguments about loading, to be offered for one that is misspelt.
KNOWN_NAMES = (
    "cache_gib",
    *(each.name for each in fields(LoadRequest) if each.name not in _FOUND_LATER),
    *sorted(QUANTIZATION_NAMES),
)


def request_of(config: EngineConfig) -> LoadRequest:
    """The request that a `%load_engine` line describes.

    Raises:
        ConfigError: an unknown scheme, a setting that it does not have, or options that exclude each other.
    """
    names = {each.name for each in fields(LoadRequest)} & {each.name for each in fields(EngineConfig)}
    same = {name: getattr(config, name) for name in names - {"quantization", "device_map"}}
    asked = LoadRequest(name=config.model, device_map=device_map_of(config.device_map), **same)
    return read_arguments(asked, config.quantization, {})


def line_of(request: LoadRequest) -> EngineConfig:
    """What was asked for, as far as a `%load_engine` line can say it."""
    maps = request.device_map
    return EngineConfig(
        request.name,
        revision=request.revision,
        dtype=request.dtype,
        quantization=request.quantization,
        device=request.device,
        device_map=json.dumps(maps, default=str) if isinstance(maps, dict) else None if maps is None else str(maps),
        max_memory=_said_memory(request.max_memory),
        allow_offload=request.allow_offload,
        offload_folder=request.offload_folder,
        cache_quantized=request.cache_quantized,
        max_context_size=request.max_context_size,
        threads=request.threads,
        local_only=request.local_only,
        trust_remote_code=request.trust_remote_code,
        allow_pickle=request.allow_pickle,
    )


def _said_memory(given: Any) -> str | None:
    if given is None or isinstance(given, str):
        return given
    return ",".join(f"{device}={amount}{'B' if isinstance(amount, int) else ''}" for device, amount in given.items())


def split_arguments(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Further keyword arguments of an engine: those about precision, and the rest (generation parameters)."""
    precision = settings_among(arguments)
    return precision, {name: value for name, value in arguments.items() if name not in precision}


_MEDIA_NAMES = {
    "audio_sample_rate": "audio_sample_rate",
    "audio_sr": "audio_sample_rate",
    "mm_audio_sample_rate": "audio_sample_rate",
    "video_fps": "video_fps",
    "mm_video_fps": "video_fps",
}


def split_media(arguments: Mapping[str, Any]) -> tuple[MediaOptions, dict[str, Any]]:
    """Further keyword arguments of an engine: how media are read, under any of the documents' names, and the rest.

    Raises:
        ConfigError: a rate that is not positive.
    """
    from kani_nb.engines.huggingface.multimodal import MediaOptions

    given = {_MEDIA_NAMES[name]: value for name, value in arguments.items() if name in _MEDIA_NAMES}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise ConfigError(f"{name} is {value!r}", why="it must be above 0")
    options = MediaOptions(**{name: value for name, value in given.items() if value is not None})
    return options, {name: value for name, value in arguments.items() if name not in _MEDIA_NAMES}


def read_arguments(request: LoadRequest, quantization: Any, precision: Mapping[str, Any]) -> LoadRequest:
    """`request` with what was said about precision, in old or new names, read into its fields.

    Raises:
        ConfigError: two of them contradict each other, a scheme or value is unknown, or a setting is not the scheme's.
    """
    said = translate(quantization, request.model_load_kwargs, precision)
    from kani_nb.hardware.schemes import find_scheme

    scheme = find_scheme(said.quantization.scheme)
    scheme.check_settings(said.quantization)
    changes: dict[str, Any] = {
        name: value
        for name in ("device_map", "max_memory", "offload_folder", "token", "revision")
        if (value := _either(name, getattr(request, name), getattr(said, name))) is not None
    }
    if said.dtype is not None and request.dtype not in ("auto", said.dtype):
        raise ConfigError(f"dtype is given as {request.dtype} and as {said.dtype}", fix="give one of them")
    if request.cache_quantized and said.quantization.llm_int8_has_fp16_weight:
        raise ConfigError(
            "cache_quantized and llm_int8_has_fp16_weight exclude each other",
            why="such weights stay in 16 bits, and transformers cannot load them again as it saves them",
            fix="leave one of them out",
        )
    device_map = changes.get("device_map")
    if request.device is not None and device_map is not None:
        raise ConfigError(
            f"device={request.device!r} and device_map={device_map!r} exclude each other", fix="give one of them"
        )
    return replace(
        request,
        quantization=replace(said.quantization, scheme=scheme.name),
        foreign_config=said.foreign_config,
        dtype=dtype_name(said.dtype or request.dtype),
        local_only=request.local_only or said.local_only,
        trust_remote_code=request.trust_remote_code or said.trust_remote_code,
        model_load_kwargs=said.rest,
        **changes,
    )


def device_map_of(text: str | None) -> Any:
    """A device map as a command line says it: a word, or a dict as JSON.

    Raises:
        ConfigError: it is not JSON.
    """
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"device_map is {text!r}",
            why=f"it is not JSON: {error}",
            fix="""in a line it stands in single quotes: --device-map '{"model.layers.0": "cpu", ...}'""",
        ) from None


def _either(name: str, one: Any, other: Any) -> Any:
    if one is not None and other is not None and one != other:
        raise ConfigError(f"{name} is given twice: {one!r}, and {other!r} in model_load_kwargs")
    return other if one is None else one
