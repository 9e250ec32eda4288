"""What can be asked for, as frozen records: how an engine is loaded, and how an answer is generated.

One table of options makes the command line, its help, its completion and its printed equivalent, so that they cannot
drift apart. Magics, the panel, the planner and the engines read only these records. Nothing here loads or looks at the
machine.
"""

from __future__ import annotations

import argparse
import math
import numbers
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn

from kani_nb._arguments import in_plain_words
from kani_nb.errors import ConfigError, did_you_mean

#: New tokens per answer unless asked otherwise: visible in every stat line, and never the whole window.
DEFAULT_MAX_NEW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How one answer is generated, under transformers' names. None leaves the choice to the model's generation config.

    Raises:
        ConfigError: a value outside its range.
    """

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    seed: int | None = None
    stop_strings: tuple[str, ...] = ()
    eos_token_id: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check each value once, here."""
        if self.max_new_tokens is None:
            object.__setattr__(self, "max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
        object.__setattr__(self, "stop_strings", _tuple_of(str, "stop_strings", self.stop_strings or ()))
        if self.eos_token_id is not None:
            object.__setattr__(self, "eos_token_id", _tuple_of(int, "eos_token_id", self.eos_token_id))
        for name, (is_valid, expected) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            try:
                good = not isinstance(value, bool) and is_valid(value)
            except TypeError:
                good = False
            if not good:
                raise ConfigError(f"{name} is {value!r}", why=f"it must be {expected}")
        if any(not text for text in self.stop_strings):
            raise ConfigError("stop_strings holds an empty string", why="it would stop every answer at once")

    @classmethod
    def from_kwargs(cls, given: Mapping[str, Any], base: GenerationParams | None = None) -> GenerationParams:
        """`base` with `given` over it; names are transformers' (also `stop`, `max_tokens`, `generator_seed`).

        Raises:
            ConfigError: a name that is not known, with the near misses; or a value outside its range.
        """
        renamed = {_SYNONYMS.get(name, name): value for name, value in given.items()}
        known = [each.name for each in fields(cls)]
        for name in renamed:
            if name not in known:
                hint = did_you_mean(name, known) or f"known are {', '.join(known)}"
                raise ConfigError(f"unknown generation parameter {name!r}", fix=hint)
        return replace(base or cls(), **renamed)


def _tuple_of(kind: type, name: str, value: Any) -> tuple[Any, ...]:
    """One value of that kind, or several, as a tuple."""
    values = (value,) if isinstance(value, str | numbers.Integral) else tuple(value)
    wanted = numbers.Integral if kind is int else kind
    for each in values:
        if not isinstance(each, wanted):
            raise ConfigError(f"{name} holds {each!r}", why=f"it must be {'a token id' if kind is int else 'text'}")
    return tuple(kind(each) for each in values)


_SYNONYMS = {"stop": "stop_strings", "max_tokens": "max_new_tokens"}


def _whole(lowest: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, numbers.Integral) and int(value) >= lowest


def _real(test: Callable[[float], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, numbers.Real) and math.isfinite(value) and test(float(value))


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (_whole(1), "a whole number of at least 1"),
    "min_new_tokens": (_whole(0), "a whole number of at least 0"),
    "temperature": (_real(lambda value: value >= 0), "a number of at least 0 (0 is greedy)"),
    "top_k": (_whole(0), "a whole number of at least 0 (0 is off)"),
    "top_p": (_real(lambda value: 0 < value <= 1), "in (0, 1]"),
    "min_p": (_real(lambda value: 0 <= value <= 1), "in [0, 1]"),
    "typical_p": (_real(lambda value: 0 < value <= 1), "in (0, 1]"),
    "repetition_penalty": (_real(lambda value: value > 0), "a number above 0 (1 is off)"),
    "no_repeat_ngram_size": (_whole(0), "a whole number of at least 0 (0 is off)"),
    "seed": (
        lambda value: isinstance(value, numbers.Integral) and 0 <= int(value) < 2**63,
        "a whole number from 0 below 2**63",
    ),
}


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything `%load_engine` can say. Equal configurations are the same engine.

    Attributes:
        model: an alias, `org/model`, a folder, a `.gguf` file, or `engine:model`.
        revision: branch, tag or commit of a repository.
        dtype: `auto` (the checkpoint's), `float32`, `bfloat16` or `float16`.
        device: `cuda`, `cuda:1`, `mps`, `cpu`; None takes the best there is.
        device_map: accelerate's: `auto`, `balanced`, `sequential`, a device, or JSON of a dict.
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
    device: str | None = None
    device_map: str | None = None
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
        for name in ("max_context_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value!r}", why="it must be a whole number of at least 1")
        if self.cache_gib is not None and not (math.isfinite(self.cache_gib) and self.cache_gib >= 0):
            raise ConfigError(f"cache_gib is {self.cache_gib!r}", why="it must be a number of at least 0")

    def to_line(self) -> str:
        """The `%load_engine` line that gives an equal configuration."""
        words = ["%load_engine"]
        default = EngineConfig(self.model)
        for option in LOAD_OPTIONS:
            owner, other = (self.generation, default.generation) if option.of_generation else (self, default)
            value = getattr(owner, option.dest)
            if value != getattr(other, option.dest):
                words += option.to_words(value)
        words.insert(len(words) if self.model.startswith("-") else 1, shlex.quote(self.model))
        if self.model.startswith("-"):
            words.insert(-1, "--")
        return " ".join(words)


DTYPES = ("auto", "float32", "bfloat16", "float16")


def dtype_name(dtype: Any) -> str:
    """The name of a dtype, given as a torch dtype, as its name, or as people abbreviate it; None is `auto`.

    Raises:
        ConfigError: weights cannot be loaded in it.
    """
    short = {"none": "auto", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
    name = str(dtype).removeprefix("torch.").lower()
    name = short.get(name, name)
    if name not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}", why=f"it must be one of {', '.join(DTYPES)}")
    return name


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a magic: `--flag VALUE`, what it sets, and one line of help."""

    flag: str
    dest: str
    help: str
    type: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    of_generation: bool = False
    metavar: str = ""

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Declare the option, without a default, so that only what was said is set."""
        common: dict[str, Any] = {"dest": self.dest, "default": argparse.SUPPRESS, "help": self.help}
        if self.type is bool:
            parser.add_argument(self.flag, action=argparse.BooleanOptionalAction, **common)
        elif self.dest in ("stop_strings", "eos_token_id"):
            parser.add_argument(self.flag, action="append", type=self.type, metavar=self.metavar or "TEXT", **common)
        else:
            metavar = self.metavar or self.dest.upper()
            parser.add_argument(self.flag, type=self.type, choices=self.choices or None, metavar=metavar, **common)

    def to_words(self, value: Any) -> list[str]:
        """The words that set the option to `value`, quoted for the command line."""
        if self.type is bool:
            return [self.flag if value else f"--no-{self.flag[2:]}"]
        values = value if isinstance(value, tuple) else (value,)
        return [f"{self.flag}={shlex.quote(str(each))}" for each in values]


GENERATION_OPTIONS = (
    Option(
        "--max-new-tokens",
        "max_new_tokens",
        "most tokens of an answer (default 512)",
        int,
        of_generation=True,
        metavar="N",
    ),
    Option("--min-new-tokens", "min_new_tokens", "fewest tokens of an answer", int, of_generation=True, metavar="N"),
    Option("--sample", "do_sample", "draw tokens at random instead of taking the likeliest", bool, of_generation=True),
    Option(
        "--temperature", "temperature", "randomness of sampling; 0 is greedy", float, of_generation=True, metavar="T"
    ),
    Option("--top-k", "top_k", "sample among the K likeliest tokens", int, of_generation=True, metavar="K"),
    Option(
        "--top-p", "top_p", "sample among the likeliest tokens that sum to P", float, of_generation=True, metavar="P"
    ),
    Option(
        "--min-p", "min_p", "drop tokens less likely than P times the likeliest", float, of_generation=True, metavar="P"
    ),
    Option("--typical-p", "typical_p", "locally typical sampling", float, of_generation=True, metavar="P"),
    Option(
        "--repetition-penalty",
        "repetition_penalty",
        "above 1 discourages repetition",
        float,
        of_generation=True,
        metavar="X",
    ),
    Option(
        "--no-repeat-ngram-size",
        "no_repeat_ngram_size",
        "never repeat N tokens in a row",
        int,
        of_generation=True,
        metavar="N",
    ),
    Option("--seed", "seed", "make sampling repeatable", int, of_generation=True, metavar="N"),
    Option(
        "--eos-token-id",
        "eos_token_id",
        "token that ends an answer (may be given again)",
        int,
        of_generation=True,
        metavar="ID",
    ),
    Option("--stop", "stop_strings", "end the answer before this text (may be given again)", of_generation=True),
)

LOAD_OPTIONS = (
    Option("--revision", "revision", "branch, tag or commit of the repository"),
    Option("--dtype", "dtype", "precision of the weights", lambda text: dtype_name(text), choices=DTYPES),
    Option("--device", "device", "cuda, cuda:1, mps or cpu (default: the best there is)"),
    Option("--device-map", "device_map", "auto, balanced, sequential, a device, or JSON"),
    Option("--max-context-size", "max_context_size", "tokens of prompt and answer together", int, metavar="N"),
    Option("--cache-gib", "cache_gib", "GiB of KV cache kept for reuse; 0 turns it off", float, metavar="GIB"),
    Option("--threads", "threads", "CPU threads of a generation", int, metavar="N"),
    Option("--local-only", "local_only", "never ask the network", bool),
    Option("--trust-remote-code", "trust_remote_code", "run Python code that the repository ships", bool),
    Option("--allow-pickle", "allow_pickle", "load pickled weights, which can run code too", bool),
    *GENERATION_OPTIONS,
)


def split_words(line: str) -> list[str]:
    """The words of a line, quoted as in a shell; on Windows a backslash is a part of a path.

    Raises:
        ValueError: a quote is not closed.
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    if os.name == "nt":
        lexer.escape = ""
    return list(lexer)


class LineParser(argparse.ArgumentParser):
    """An `argparse` parser whose errors are `ConfigError`s and which never exits the process."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise ConfigError(in_plain_words(message), fix=f"{self.prog} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Raise instead of exiting."""
        raise ConfigError(message or f"exit status {status}")

    def parse_line(self, line: str) -> argparse.Namespace:
        """Parse one command line, quoted as in a shell.

        Raises:
            ConfigError: an option that is not known (with the near misses), a bad value, or an unclosed quote.
        """
        try:
            words = split_words(line)
        except ValueError as error:
            raise ConfigError(f"cannot read {line!r}", why=str(error).lower()) from None
        known = sorted(flag for action in self._actions for flag in action.option_strings if flag.startswith("--"))
        for word in words:
            flag = word.split("=", 1)[0]
            if flag == "--":
                break
            if flag.startswith("--") and flag not in known and sum(each.startswith(flag) for each in known) != 1:
                raise ConfigError(
                    f"unknown option {flag!r}", fix=did_you_mean(flag, known) or f"{self.prog} --help lists them"
                )
        return self.parse_args(words)


def load_parser(prog: str = "%load_engine") -> LineParser:
    """The parser of `%load_engine`'s line: a model and every `LOAD_OPTIONS`."""
    parser = LineParser(prog=prog, add_help=False, description="Load a model and make it the current engine.")
    parser.add_argument("model", nargs="?", help="alias (smollm2), org/model, folder, FILE.gguf, or echo")
    for option in LOAD_OPTIONS:
        option.add_to(parser)
    return parser


def split_generation(given: Mapping[str, Any], options: Iterable[Option] = GENERATION_OPTIONS) -> dict[str, Any]:
    """Of parsed arguments, those that are generation parameters."""
    names = {option.dest for option in options if option.of_generation}
    return {name: value for name, value in given.items() if name in names}


def config_from_args(given: Mapping[str, Any]) -> EngineConfig:
    """The configuration that parsed `%load_engine` arguments describe; other names in `given` are ignored.

    Raises:
        ConfigError: a value outside its range.
    """
    generation = GenerationParams.from_kwargs(split_generation(given))
    names = {option.dest for option in LOAD_OPTIONS if not option.of_generation} | {"model"}
    chosen = {name: value for name, value in given.items() if name in names}
    return EngineConfig(**chosen, generation=generation)


def parse_config(line: str) -> EngineConfig:
    """The configuration of a whole `%load_engine` line (with or without the magic's name).

    Raises:
        ConfigError: an option or a value that cannot be used.
    """
    return config_from_args(vars(load_parser().parse_line(line.strip().removeprefix("%load_engine"))))
