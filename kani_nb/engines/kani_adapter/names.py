"""From what stands after `kani:` in `%load_engine` to what makes that engine.

`PROVIDER:MODEL` with the providers of kani's command line and of its extensions, or `package.module:Class:MODEL` for
any class that is an engine of kani. Names are looked up here; nothing is made before it is asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from kani_nb.engines.kani_adapter.messages import kani_module
from kani_nb.errors import ConfigError, MissingDependencyError, did_you_mean

Factory = Callable[[], Any]


def factory_of(text: str) -> Factory:
    """What makes the engine that `text` names, when it is called.

    Raises:
        ConfigError: no such provider, module or class, or no model.
        MissingDependencyError: kani, or the module, cannot be imported.
    """
    head, _, rest = text.partition(":")
    providers = _providers()
    if head in providers:
        if not rest:
            raise ConfigError(f"kani:{head} names no model", fix=f"%load_engine kani:{head}:MODEL")
        return lambda: _quiet(providers[head](rest))
    if "." in head:
        found = _class(head, rest)
        model = rest.partition(":")[2]
        return (lambda: found(model)) if model else found
    names = sorted(providers)
    raise ConfigError(
        f"kani has no provider {head!r}" if head else "kani: names no provider",
        why=f"it has {', '.join(names)}; or name a class: kani:package.module:Class:MODEL",
        fix=did_you_mean(head, names) or "%load_engine kani:PROVIDER:MODEL",
    )


def _providers() -> dict[str, Callable[[str], Any]]:
    """What makes an engine, by the provider's name and its other names; of two the first, as kani does."""
    listed = kani_module("kani.utils.cli").get_cli_providers_including_extensions()
    found: dict[str, Callable[[str], Any]] = {}
    for name, aliases, entrypoint in listed:
        for each in (name, *aliases):
            found.setdefault(each, entrypoint)
    return found


def _class(module: str, rest: str) -> Any:
    name = rest.partition(":")[0]
    try:
        found = getattr(importlib.import_module(module), name, None) if name else None
    except ImportError as error:
        raise MissingDependencyError(
            f"{module} cannot be imported", why=str(error), fix="install the package that has it"
        ) from error
    base = kani_module("kani.engines.base").BaseEngine
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ConfigError(
            f"{module} has no engine of kani called {name!r}",
            why="expected package.module:Class:MODEL, the class a subclass of kani.engines.BaseEngine",
        )
    return found


def _quiet(engine: Any) -> Any:
    """The engine without reasoning among its text: kani's terminal greys it by control characters."""
    if getattr(engine, "show_reasoning_in_stream", False):
        engine.show_reasoning_in_stream = False
    return engine
