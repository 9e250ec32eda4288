"""Packages of other people, really built and installed into a folder of their own, which a test puts on the path."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.notebook.conftest import bare_shell, cells  # noqa: F401 - the fixtures

PACKAGES = Path(__file__).parent / "packages"


@pytest.fixture(scope="session")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all of `packages` installed by pip."""
    target = tmp_path_factory.mktemp("overlay") / "site"
    quietly = ["-q", "--disable-pip-version-check", "--no-cache-dir", "--no-compile"]
    alone = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    packages = [str(each) for each in sorted(PACKAGES.iterdir()) if (each / "pyproject.toml").is_file()]
    subprocess.run([sys.executable, "-m", "pip", "install", *quietly, *alone, *packages], check=True)
    return target


@pytest.fixture
def neighbours(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """They are on the path of this test."""
    monkeypatch.syspath_prepend(str(overlay))
    importlib.invalidate_caches()
    yield overlay
    importlib.invalidate_caches()
