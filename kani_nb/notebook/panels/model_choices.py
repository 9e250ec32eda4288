"""What can be chosen in the engine panel: models with their sizes, and schemes with what they are."""

from __future__ import annotations

import json
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
    """`{"models": [{"name", "group", "about"}, ...], "schemes": [{"name", "about", "knobs"}, ...]}`, JSON-safe.

    Args:
        folder: whose models are offered as local ones; the working folder by default.
    """
    return {"models": [*_aliases(), *_cached(), *_local(folder or Path())], "schemes": _schemes()}


def _schemes() -> list[dict[str, Any]]:
    return [
        {"name": each.name, "about": each.summary, "knobs": sorted(each.knobs)}
        for each in our_schemes()
        if each.engine == "hf"
    ]


def _aliases() -> list[dict[str, str]]:
    return [
        _choice(each.name, "Known models", f"{each.repo}, {count_of_parameters(each.parameters)} parameters")
        for each in ALIASES.values()
    ]


def _cached() -> list[dict[str, str]]:
    return [
        _choice(each.name, "On this disk", _about(each.folder, each.size_bytes))
        for each in cached_models()
        if each.name not in ALIASES
    ]


def _local(folder: Path) -> list[dict[str, str]]:
    found = []
    try:
        entries = sorted(folder.iterdir())[:_MOST_ENTRIES]
    except OSError:
        return []
    for path in entries:
        if path.suffix.lower() == ".gguf" and path.is_file():
            found.append(_choice(f"./{path.name}", "In this folder", f"GGUF, {in_words(path.stat().st_size)}"))
        elif (path / "config.json").is_file():
            size = sum(each.stat().st_size for each in path.iterdir() if each.is_file())
            found.append(_choice(f"./{path.name}", "In this folder", _about(path, size)))
    return found


def _about(folder: Path, size_bytes: int) -> str:
    """The architecture and the size, as far as the configuration says."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = str((config.get("architectures") or [config.get("model_type", "")])[0])
    except (OSError, ValueError, AttributeError, IndexError):
        architecture = ""
    return ", ".join(each for each in (architecture, in_words(size_bytes)) if each)


def _choice(name: str, group: str, about: str) -> dict[str, str]:
    return {"name": name, "group": group, "about": about}
