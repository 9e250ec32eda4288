"""What can be chosen in the engine panel: models with their sizes, and schemes with what they are."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from kani_nb._amounts import in_words
from kani_nb.engines.hub import cached_models
from kani_nb.engines.sources_aliases import ALIASES
from kani_nb.hardware.schemes import our_schemes
from kani_nb.plan_text import count_of_parameters

#: Entries of a working folder that are looked at; a folder of datasets has many.
_MOST_ENTRIES = 500


def known_choices() -> dict[str, Any]:
    """`list_choices` without what lies on the disk."""
    return {"models": _aliases(), "schemes": _schemes()}


def list_choices(folder: Path | None = None) -> dict[str, Any]:
    """`{"models": [{"name", "about"}, ...], "schemes": [{"name", "about"}, ...]}`, JSON-safe.

    Args:
        folder: whose models are offered as local ones; the working folder by default.
    """
    return {"models": [*_aliases(), *_cached(), *_local(folder or Path())], "schemes": _schemes()}


def _schemes() -> list[dict[str, Any]]:
    return [{"name": each.name, "about": each.summary} for each in our_schemes() if each.engine == "hf"]


def _aliases() -> list[dict[str, str]]:
    return [
        _choice(each.name, f"{each.repo}, {count_of_parameters(each.parameters)} parameters")
        for each in ALIASES.values()
    ]


def _cached() -> list[dict[str, str]]:
    return [
        _choice(each.name, f"on this disk, {_about(each.folder, each.size_bytes)}")
        for each in cached_models()
        if each.name not in ALIASES
    ]


def _local(folder: Path) -> list[dict[str, str]]:
    found = []
    with suppress(OSError):
        for path in sorted(folder.iterdir())[:_MOST_ENTRIES]:
            with suppress(OSError):  # one that cannot be read hides no other
                about = _of_path(path)
                found += [_choice(f"./{path.name}", f"in this folder, {about}")] if about else []
    return found


def _of_path(path: Path) -> str:
    """What a file or a folder holds; empty where that is no model."""
    if path.suffix.lower() == ".gguf" and path.is_file():
        return f"GGUF, {in_words(path.stat().st_size)}"
    if not (path / "config.json").is_file():
        return ""
    return _about(path, sum(each.stat().st_size for each in path.iterdir() if each.is_file()))


def _about(folder: Path, size_bytes: int) -> str:
    """The architecture and the size, as far as the configuration says."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    given = config.get("architectures") or config.get("model_type") if isinstance(config, dict) else None
    first = given[0] if isinstance(given, list) and given else given
    architecture = first if isinstance(first, str) else ""
    return ", ".join(each for each in (architecture, in_words(size_bytes)) if each)


def _choice(name: str, about: str) -> dict[str, str]:
    return {"name": name, "about": about}
