"""What is compared with what: schemes and values of one setting, as said on a line or in code, one case for each.

Everything that can be refused before a model is loaded is refused here. Nothing here loads or measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from kani_nb.config import EngineConfig, split_options
from kani_nb.errors import ConfigError, did_you_mean
from kani_nb.options import LOAD_OPTIONS
from kani_nb.quantization import Quantization, dtype_name

DEFAULT_SCHEMES = "none,int8,fp4,nf4"
#: About the model's quality at a glance: every wrong answer to it is seen at once.
DEFAULT_PROMPT = "What is the capital of France, and what is it known for?"
DEFAULT_RUNS = 3
DEFAULT_MAX_NEW_TOKENS = 64

#: Prefixes that may be left out of a setting's name.
_SHORT = ("llm_int8_", "bnb_4bit_")
#: Options of loading that would make the times of a comparison those of something else.
_NOT_COMPARED = ("cache_gib", "cache_quantized")
_TEXT_LIMIT_BYTES = 2**20


class Sweep(NamedTuple):
    """Values of one setting: of `Quantization`, by its name there, or of `dtype`."""

    knob: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One row to measure."""

    label: str
    config: EngineConfig


def parse_sweep(text: str) -> Sweep:
    """The setting and the values of `llm_int8_threshold=3,6,10`; a prefix like `llm_int8_` may be left out.

    Raises:
        ConfigError: it is not of that form, or there is no such setting (with the near misses), or a value is not one.
    """
    name, equals, listed = text.partition("=")
    values = [value.strip() for value in listed.split(",") if value.strip()]
    if not equals or not values:
        raise ConfigError(f"a sweep is {text!r}", why="it must name a setting and its values", fix=_EXAMPLE)
    knob = _knob(name.strip())
    return Sweep(knob, tuple(dict.fromkeys(_value(knob, value) for value in values)))


_EXAMPLE = "--sweep llm_int8_threshold=3,6,10"


def _knob(name: str) -> str:
    """The setting's own name."""
    known = [each.name for each in fields(Quantization) if each.name != "scheme"] + ["dtype"]
    meant = name.lower().lstrip("-").replace("-", "_")
    full = next((each for each in (meant, *(prefix + meant for prefix in _SHORT)) if each in known), None)
    bare = next((meant.removeprefix(prefix) for prefix in _SHORT if meant.removeprefix(prefix) in known), None)
    if (found := full or bare) is not None:
        return found
    short = [each.removeprefix(prefix) for each in known for prefix in _SHORT[:1]]
    guess = did_you_mean(meant, [*known, *short])
    raise ConfigError(f"there is no setting {name!r} to sweep", fix=guess or f"there are {', '.join(known)}")


def _value(knob: str, text: str) -> Any:
    """A value of `knob`, of the kind that its option has."""
    if knob == "dtype":
        return dtype_name(text)
    option = next(each for each in LOAD_OPTIONS if each.of == "quantization" and each.dest == knob)
    if option.type is bool:
        meanings = {"true": True, "on": True, "yes": True, "1": True, "false": False, "off": False, "no": False}
        meanings["0"] = False
        if text.lower() not in meanings:
            raise ConfigError(f"{knob} is {text!r}", why="it must be true or false")
        return meanings[text.lower()]
    try:
        value = option.type(text)
    except ValueError:
        kind = "a whole number" if option.type is int else "a number"
        raise ConfigError(f"{knob} is {text!r}", why=f"it must be {kind}") from None
    return (value,) if knob == "llm_int8_skip_modules" else value


def expand(config: EngineConfig, quantizations: Sequence[Quantization], sweep: Sweep | None = None) -> list[Case]:
    """The cases: each scheme, and where it has the setting that is swept, once for each value.

    Schemes without the setting stay one case, to compare with.

    Raises:
        ConfigError: there is nothing to compare, a setting is not the scheme's, no scheme has the one that is swept, or
            a value of it cannot be used.
    """
    from kani_nb.hardware.schemes import find_scheme

    if not quantizations:
        raise ConfigError("there is nothing to compare", why="no scheme was named", fix=f"--schemes {DEFAULT_SCHEMES}")
    knob = None if sweep is None else _knob(sweep.knob)
    cases: list[Case] = []
    is_swept = False
    for settings in quantizations:
        scheme = find_scheme(settings.scheme)
        scheme.check_settings(settings)
        if sweep is None or knob is None or (knob != "dtype" and knob not in scheme.knobs):
            cases.append(_case(config, settings))
            continue
        is_swept = True
        for value in sweep.values:
            if knob == "dtype":
                cases.append(_case(replace(config, dtype=value), settings, f" + {dtype_name(value)}"))
            else:
                changed = replace(settings, **{knob: value})
                is_told = (
                    knob.removeprefix(_SHORT[0]).replace("_", " ") in changed.label or f"={value}" in changed.label
                )
                cases.append(_case(config, changed, "" if is_told else f" + {knob.removeprefix(_SHORT[0])}={value}"))
    if sweep is not None and not is_swept:
        raise ConfigError(f"none of {', '.join(each.scheme for each in quantizations)} has {knob}", fix=_having(knob))
    return list({case.config: case for case in cases}.values())


def _case(config: EngineConfig, settings: Quantization, more: str = "") -> Case:
    return Case(settings.label + more, replace(config, quantization=settings))


def _having(knob: str | None) -> str:
    from kani_nb.hardware.schemes import our_schemes

    names = [scheme.name for scheme in our_schemes() if knob in scheme.knobs]
    return f"compare one that has it: --schemes {','.join(names)}" if names else ""


def read_text(path: str) -> str:
    """The text of a file.

    Raises:
        ConfigError: it is not there, cannot be read, is no text in UTF-8, or is larger than 1 MiB.
    """
    found = Path(path).expanduser()
    try:
        if found.stat().st_size > _TEXT_LIMIT_BYTES:
            raise ConfigError(
                f"the text {path} has {found.stat().st_size / 2**20:,.1f} MiB", why="at most 1 MiB is read"
            )
        return found.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"the text {path} cannot be read", why=f"it is not UTF-8 ({error.reason})") from None
    except OSError as error:
        raise ConfigError(f"the text {path} cannot be read", why=error.strerror or str(error)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what a comparison is told on a line: its own options, and those of loading that it takes."""
    add = parser.add_argument
    add(
        "--schemes",
        default=DEFAULT_SCHEMES,
        metavar="A,B",
        help=f"what to compare (default {DEFAULT_SCHEMES}); nf4+dq is double quantization",
    )
    add("--sweep", metavar="SETTING=V,V", help="once for each value of one setting: llm_int8_threshold=3,6,10")
    add("--runs", type=int, default=DEFAULT_RUNS, metavar="N", help=f"timed answers of each (default {DEFAULT_RUNS})")
    add(
        "--max-new-tokens",
        type=int,
        default=DEFAULT_MAX_NEW_TOKENS,
        metavar="N",
        help=f"most tokens of an answer (default {DEFAULT_MAX_NEW_TOKENS})",
    )
    add("--prompt", metavar="TEXT", help="what each is asked")
    add("--text", metavar="FILE", help="measure the quality on this text instead of our own")
    for option in LOAD_OPTIONS:
        if option.of == "engine" and option.dest not in _NOT_COMPARED:
            option.add_to(parser)


def compare_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """From parsed `add_arguments`, the arguments of `compare`.

    Raises:
        ConfigError: a value that cannot be used, or a text that cannot be read.
    """
    from kani_nb.planning import read_schemes

    path = given.get("text")
    return {
        "config": EngineConfig(given["model"], **split_options(given, "engine")),
        "quantizations": read_schemes(given["schemes"]),
        "sweep": None if given.get("sweep") is None else parse_sweep(given["sweep"]),
        "runs": given["runs"],
        "max_new_tokens": given["max_new_tokens"],
        "prompt": given.get("prompt"),
        "text": None if path is None else read_text(path),
        "text_name": "our own text" if path is None else Path(path).name,
    }
