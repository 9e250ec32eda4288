"""From what stands after `kani:` in `%load_engine` to what makes that engine.

`PROVIDER:MODEL` with the providers of kani's command line and of its extensions, or `package.module:Class:MODEL` for
any class that is an engine of kani. Names are looked up here; nothing is made before it is asked for.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kani_nb.engines.kani_adapter.messages import kani_module
from kani_nb.engines.kani_adapter.params import is_of_a_service
from kani_nb.engines.sources_aliases import find_alias
from kani_nb.errors import ConfigError, MissingDependencyError, UnknownModelError, did_you_mean

#: kani's own providers: the class that each of them makes.
_CLASSES = {
    "openai": ("kani.engines.openai", "OpenAIEngine"),
    "anthropic": ("kani.engines.anthropic", "AnthropicEngine"),
    "google": ("kani.engines.google", "GoogleAIEngine"),
    "huggingface": ("kani.engines.huggingface", "HuggingEngine"),
}
#: What the Hub calls a repository; kani knows those of its first years, too, which have no owner (`gpt2`).
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What makes an engine of kani when it is called.

    Attributes:
        provider: in kani's own table, or None.
        engine_class: that was named, or None.
    """

    make: Callable[[], Any]
    provider: str | None = None
    engine_class: Any = None

    def __call__(self) -> Any:
        """The engine."""
        return self.make()

    def is_of_a_service(self) -> bool:
        """Whether the engine will take no memory here; imports its class, where that is known.

        Raises:
            ImportError, kani.exceptions.MissingModelDependencies: a package that it needs is not installed.
        """
        found = self.engine_class
        if self.provider in _CLASSES:
            module, name = _CLASSES[self.provider]
            found = getattr(importlib.import_module(module), name, None)
        return isinstance(found, type) and is_of_a_service(found)


def recipe_of(text: str) -> Recipe:
    """What makes the engine that `text` names.

    Raises:
        ConfigError: no such provider, module or class, no model, or one that is an alias of ours.
        UnknownModelError: a folder that is not there.
        MissingDependencyError: kani, or the module, cannot be imported.
    """
    head, _, rest = text.partition(":")
    providers = _providers()
    if head in providers:
        if not rest:
            raise ConfigError(f"kani:{head} names no model", fix=f"%load_engine kani:{head}:MODEL")
        name, entrypoint = providers[head]
        model = _local_model(head, rest) if name == "huggingface" else rest
        return Recipe(lambda: _quiet(entrypoint(model)), provider=name)
    if "." in head:
        found = _class(head, rest)
        model = rest.partition(":")[2]
        return Recipe((lambda: found(model)) if model else found, engine_class=found)
    names = sorted(providers)
    raise ConfigError(
        f"kani has no provider {head!r}" if head else "kani: names no provider",
        why=f"it has {', '.join(names)}; or name a class: kani:package.module:Class:MODEL",
        fix=did_you_mean(head, names) or "%load_engine kani:PROVIDER:MODEL",
    )


def _providers() -> dict[str, tuple[str, Callable[[str], Any]]]:
    """The name and what makes an engine, by the provider's name and its other names; of two the first, as kani does."""
    listed = kani_module("kani.utils.cli").get_cli_providers_including_extensions()
    found: dict[str, tuple[str, Callable[[str], Any]]] = {}
    for name, aliases, entrypoint in listed:
        for each in (name, *aliases):
            found.setdefault(each, (name, entrypoint))
    return found


def _local_model(provider: str, model: str) -> str:
    """A folder or a repository's name, before kani asks the Hub for what cannot be there."""
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if find_alias(model) is not None:
        raise ConfigError(
            f"kani:{provider} does not know {model}",
            why="that is an alias of kani_nb, and kani takes a folder or org/model",
            fix=f"%load_engine {model}",
        )
    if path.exists() or _REPO.fullmatch(model) is None:
        raise UnknownModelError(
            f"there is no folder {model}",
            why="it is a file" if path.exists() else f"the current folder is {Path.cwd()}",
            fix=f"%load_engine kani:{provider}:org/model, or the folder of a model",
        )
    return model


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
