"""Builds `js/` into `kani_nb/static/` where that is missing or stale and npm is there; else takes what is committed.

`KANI_NB_JS` says otherwise: `build` always builds, `skip` never does.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_ROOT = Path(__file__).parent


def stamp(js: Path) -> str:
    """SHA-256 of everything that the bundles are made from; `js/build.mjs` counts it alike."""
    digest = hashlib.sha256()
    sources = [path for path in (js / "src").rglob("*") if path.is_file()]
    files = [*sources, *(js / name for name in ("build.mjs", "package.json", "package-lock.json"))]
    for name, path in sorted((path.relative_to(js).as_posix(), path) for path in files):
        digest.update(name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


def is_fresh(root: Path) -> bool:
    """Whether the committed bundles were built from the sources beside them, and are as they were built."""
    stamps = _stamps(root)
    built_from = stamps.pop("sources", "")
    return built_from == stamp(root / "js") and all(
        (path := _static(root, name)).is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest
        for name, digest in stamps.items()
    )


def has_bundles(root: Path) -> bool:
    """Whether every bundle is there, from whatever sources."""
    stamps = _stamps(root)
    return bool(stamps) and all(_static(root, name).is_file() for name in stamps if name != "sources")


def _static(root: Path, name: str) -> Path:
    return root / "kani_nb" / "static" / name


def _stamps(root: Path) -> dict[str, str]:
    """SHA-256 by name, as `sha256sum` writes it: of the sources and of each bundle; empty where it cannot be read."""
    try:
        lines = _static(root, "sources.sha256").read_text(encoding="ascii").splitlines()
        return {name: digest for digest, name in (line.split() for line in lines)}
    except (OSError, ValueError):
        return {}


class FrontEndHook(BuildHookInterface):  # type: ignore[type-arg]
    """Runs before a wheel is made, an editable one too."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See to it that the bundles are there.

        Raises:
            RuntimeError: there is none, and none can be built.
        """
        wanted = os.environ.get("KANI_NB_JS", "auto")
        if wanted == "skip" or not (_ROOT / "js" / "package.json").is_file():
            return
        if wanted != "build" and is_fresh(_ROOT):
            return
        why = "npm was not found"
        if npm := shutil.which("npm"):
            try:
                for words in (("ci", "--no-audit", "--no-fund"), ("run", "build")):
                    subprocess.run([npm, *words], cwd=_ROOT / "js", check=True)
            except (subprocess.CalledProcessError, OSError) as error:
                why = str(error)
            else:
                return
        if wanted == "build" or not has_bundles(_ROOT):
            raise RuntimeError(f"kani_nb/static cannot be built from js/: {why}")
        self.app.display_warning(f"kani_nb: the committed front end is not that of js/, and is taken: {why}")
