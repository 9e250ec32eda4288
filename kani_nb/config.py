"""What can be asked for when an engine is loaded, as one frozen record.

Magics, the panel, the planner and the engines read only this. Nothing here loads or looks at the machine.
"""

from __future__ import annotations

import math
import numbers
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kani_nb.errors import ConfigError
from kani_nb.generation_params import GenerationParams
from kani_nb.options import LOAD_OPTIONS, LineParser
from kani_nb.quantization import Quantization, dtype_name


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything `%load_engine` can say. Equal configurations are the same engine.

    Attributes:
        model: an alias, `org/model`, a folder, a `.gguf` file, or `engine:model`.
        revision: branch, tag or commit of a repository.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.
        quantization: the scheme of the weights and its settings; the name of a scheme is one with its defaults.
        device: `cuda`, `cuda:1`, `mps`, `cpu`; None takes the best there is.
        device_map: accelerate's: `auto`, `balanced`, `sequential`, a device, or JSON of a dict.
        max_memory: most of each device, as `0=10GiB,cpu=30GiB`.
        allow_offload: let what does not fit run from main memory or the disk.
        offload_folder: where weights go that are offloaded to the disk.
        cache_quantized: keep a quantized copy of the weights on the disk, and take it the next time.
        max_context_size: tokens of prompt and answer; None is the model's own window.
        cache_gib: GiB of KV cache kept for reuse; None is one full context, 0 turns reuse off.
        threads: CPU threads of a generation; None chooses for the machine and its load.
        local_only: never ask the network.
        trust_remote_code: run Python code that the repository ships.
        allow_pickle: load pickled weights, which can run code too.
        generation: defaults of every answer.
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    quantization: Quantization = field(default_factory=Quantization)
    device: str | None = None
    device_map: str | None = None
    max_memory: str | None = None
    allow_offload: bool = False
    offload_folder: str | None = None
    cache_quantized: bool = False
    max_context_size: int | None = None
    cache_gib: float | None = None
    threads: int | None = None
    local_only: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    generation: GenerationParams = field(default_factory=GenerationParams)

    def __post_init__(self) -> None:
        """Check each value once, here."""
        if not self.model or not self.model.strip():
            raise ConfigError("no model was named", fix="%load_engine smollm2")
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if isinstance(self.quantization, str):
            object.__setattr__(self, "quantization", Quantization(self.quantization))
        check_limits(max_context_size=self.max_context_size, threads=self.threads, cache_gib=self.cache_gib)

    def to_line(self) -> str:
        """The `%load_engine` line that gives an equal configuration."""
        words = ["%load_engine"]
        default = EngineConfig(self.model)
        for option in LOAD_OPTIONS:
            owner, other = (
                (self, default) if option.of == "engine" else (getattr(each, option.of) for each in (self, default))
            )
            value = getattr(owner, option.dest)
            if value != getattr(other, option.dest):
                words += option.to_words(value)
        words.insert(len(words) if self.model.startswith("-") else 1, shlex.quote(self.model))
        if self.model.startswith("-"):
            words.insert(-1, "--")
        return " ".join(words)


def check_limits(*, max_context_size: Any, threads: Any, cache_gib: Any) -> None:
    """Refuse limits that nothing could keep; None is no limit of one's own.

    Raises:
        ConfigError: the first that is wrong.
    """
    for name, value in (("max_context_size", max_context_size), ("threads", threads)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{name} is {value!r}", why="it must be a whole number of at least 1")
    is_number = isinstance(cache_gib, numbers.Real) and not isinstance(cache_gib, bool)
    if cache_gib is not None and not (is_number and math.isfinite(cache_gib) and cache_gib >= 0):
        raise ConfigError(f"cache_gib is {cache_gib!r}", why="it must be a number of at least 0")


_MODEL_HELP = "alias (smollm2), org/model, folder, FILE.gguf, http://host:8000/v1, or ENGINE:MODEL (%%engine kinds)"


def load_parser(prog: str = "%load_engine") -> LineParser:
    """The parser of `%load_engine`'s line: a model and every `LOAD_OPTIONS`."""
    parser = LineParser(prog=prog, add_help=False, description="Load a model and make it the current engine.")
    parser.add_argument("model", nargs="?", help=_MODEL_HELP)
    for option in LOAD_OPTIONS:
        option.add_to(parser)
    return parser


def split_options(given: Mapping[str, Any], of: str) -> dict[str, Any]:
    """Of parsed arguments, those that belong to one of the records: `engine`, `generation` or `quantization`."""
    names = {option.dest for option in LOAD_OPTIONS if option.of == of}
    return {name: value for name, value in given.items() if name in names}


def config_from_args(given: Mapping[str, Any]) -> EngineConfig:
    """The configuration that parsed `%load_engine` arguments describe; other names in `given` are ignored.

    Raises:
        ConfigError: a value outside its range.
    """
    return EngineConfig(
        **{name: value for name, value in given.items() if name == "model"},
        **split_options(given, "engine"),
        quantization=Quantization(**split_options(given, "quantization")),
        generation=GenerationParams.from_kwargs(split_options(given, "generation")),
    )


def parse_config(line: str) -> EngineConfig:
    """The configuration of a whole `%load_engine` line (with or without the magic's name).

    Raises:
        ConfigError: an option or a value that cannot be used.
    """
    return config_from_args(vars(load_parser().parse_line(line.strip().removeprefix("%load_engine"))))
