"""From a name to an engine: which backend runs a model, and that backend's class, imported when it is asked for.

Engines of other packages register under the group `kani_nb.engines`. Only the one that is asked for is imported, so a
broken neighbour harms nobody until it is named, and then its own error is shown.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from kani_nb.config import EngineConfig
from kani_nb.engines.base import BaseEngine
from kani_nb.engines.sources_aliases import find_alias
from kani_nb.engines.typed_paths import exists
from kani_nb.errors import ConfigError, EngineError, MissingDependencyError, did_you_mean

GROUP = "kani_nb.engines"

# Needed where the package runs from its source tree, without having been installed.
_OURS = {
    "hf": "kani_nb.engines.huggingface:HuggingEngine",
    "llamacpp": "kani_nb.engines.llamacpp:LlamaCppEngine",
    "openai": "kani_nb.engines.openai:OpenAIEngine",
    "kani": "kani_nb.engines.kani_adapter:KaniEngine",
    "llama2": "kani_nb.engines.huggingface.llama2:LlamaEngine",
    "ctransformers": "kani_nb.engines.ctransformers:LlamaCTransformersEngine",
    "echo": "kani_nb.engines.echo:EchoEngine",
}
_ADDRESSES = {"http": "openai", "https": "openai", "openai": "openai", "vllm": "openai"}
#: Where programs listen that people name like an engine, and that OpenAIEngine speaks to.
_OTHERS_SERVERS = {"ollama": "http://127.0.0.1:11434/v1", "lmstudio": "http://127.0.0.1:1234/v1"}
#: What may be an address without its scheme; a cheap look before the module that reads addresses is imported.
_BARE_HOST = re.compile(r"(?i)(?:localhost|\[?[\w.:-]+\]?:\d{2,5}|\d+\.\d+\.\d+\.\d+)(?=$|[:/#?])")


class EngineSpec(NamedTuple):
    """Which engine runs a model, and what that engine is told to run."""

    engine: str
    model: str


def engine_names() -> list[str]:
    """Every engine registered here, ours and strangers'; imports none of them."""
    return sorted({*_OURS, *(each.name for each in entry_points(group=GROUP))})


def our_engine_names() -> list[str]:
    """The engines of this package."""
    return list(_OURS)


def parse_spec(model: str) -> EngineSpec:
    """The engine for `model`, and the model without the engine's own prefix. Looks at names alone, and loads nothing.

    An alias, `org/model` or a folder goes to `hf`; a `.gguf` file to `llamacpp` where that is installed, else to `hf`;
    `http(s)://`, `openai:` and `vllm:` to `openai`; `NAME` or `NAME:...` to the engine registered as NAME.

    Raises:
        ConfigError: `NAME:` is no registered engine, or an address lacks its `http://`; offers what was meant.
    """
    text = model.strip()
    prefix, colon, rest = text.partition(":")
    name = prefix.lower()
    if find_alias(text) is not None:
        return EngineSpec("hf", text)
    if colon and name in _ADDRESSES:
        return EngineSpec(_ADDRESSES[name], text)
    if _BARE_HOST.match(text) and (colon or "/" in text) and name not in engine_names() and not exists(text):
        from kani_nb.engines.openai.address import with_scheme

        if (meant := with_scheme(text)) is not None:
            raise ConfigError(
                f"{text!r} looks like a server's address",
                why="http:// is missing before it",
                fix=f"did you mean {meant}?",
            )
    if colon and re.fullmatch(r"[A-Za-z][\w.-]+", prefix) and not exists(text):
        known = engine_names()
        registered = next((each for each in (prefix, name) if each in known), None)
        if registered is None:
            hint = did_you_mean(prefix, [*known, *_ADDRESSES]) or f"registered are {', '.join(known)}"
            if (base := _OTHERS_SERVERS.get(name)) is not None:
                there = rest if rest.lower().startswith(("http://", "https://")) else f"{base}#{rest}".rstrip("#")
                hint = f"it is used by its server's address: {there}"
            raise ConfigError(f"there is no engine {prefix!r} for {text!r}", fix=hint)
        return EngineSpec(registered, rest)
    if text.lower().endswith(".gguf"):
        return EngineSpec("llamacpp" if _has_llamacpp() else "hf", text)
    if not colon and text in engine_names() and not exists(text):
        return EngineSpec(text, "")
    return EngineSpec("hf", text)


def _has_llamacpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def engine_class(name: str) -> type[BaseEngine]:
    """The class registered as `name`, imported now.

    Raises:
        ConfigError: nobody registered it, or what is registered is no engine.
        MissingDependencyError: a library that it needs is not installed.
        EngineError: importing it failed; the original exception is the cause.
    """
    point = _entry_point(name)
    if point is None:
        known = engine_names()
        raise ConfigError(
            f"there is no engine {name!r}", fix=did_you_mean(name, known) or f"registered are {', '.join(known)}"
        )
    try:
        found = point.load()
    except ImportError as error:
        raise MissingDependencyError(
            f"the engine {name!r} ({point.value}) could not be imported", why=str(error), fix=_who(point)
        ) from error
    except Exception as error:
        raise EngineError(
            f"the engine {name!r} ({point.value}) failed while it was imported",
            why=f"{type(error).__name__}: {error}",
            fix=_who(point),
        ) from error
    if not (isinstance(found, type) and issubclass(found, BaseEngine)):
        raise ConfigError(
            f"the engine {name!r} is {point.value}", why="that is not a subclass of BaseEngine", fix=_who(point)
        )
    return found


def _entry_point(name: str) -> EntryPoint | None:
    """Ours first, so that no other package takes over a name of ours."""
    points = sorted(entry_points(group=GROUP, name=name), key=lambda each: not each.value.startswith("kani_nb."))
    if points:
        return points[0]
    return EntryPoint(name, _OURS[name], GROUP) if name in _OURS else None


def _who(point: EntryPoint) -> str:
    owner = point.dist.name if point.dist is not None else "kani-nb"
    return f"the package {owner} provides it: install what it needs, or update it"


def create_engine(config: EngineConfig) -> BaseEngine:
    """The engine that `config` describes, constructed and not yet loaded.

    A class with a classmethod `from_config` gets the whole configuration, any other the model's name alone.

    Raises:
        ConfigError: no such engine, or an option that it cannot use.
        EngineError: its class could not be imported.
    """
    spec = parse_spec(config.model)
    found: Any = engine_class(spec.engine)
    if hasattr(found, "from_config"):
        is_ours = spec.engine in ("hf", "llama2") and spec.model != config.model
        engine = found.from_config(replace(config, model=spec.model) if is_ours and spec.model else config)
    else:
        engine = found(spec.model) if spec.model else found()
    if not isinstance(engine, BaseEngine):
        raise ConfigError(f"the engine {spec.engine!r} made a {type(engine).__name__}", why="that is not a BaseEngine")
    return engine
