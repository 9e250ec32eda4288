"""Older libraries laid over the installed ones, so that one environment can start kernels of several versions.

    python -m tests.kernels.overlays        # installs all of them, about a minute

Each set is a folder that `PYTHONPATH` puts before site-packages. They are kept in the user's cache and shared by all
runs.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

#: Name of a set -> its packages; without their dependencies, which the environment has.
OVERLAYS: dict[str, list[str]] = {
    # What Google Colab runs.
    "colab": [
        "ipython==7.34.0",
        "ipykernel==6.17.1",
        "ipywidgets==7.7.1",
        "traitlets==5.7.1",
        "plotly==5.24.1",
        "anywidget==0.9.21",
        "tenacity==9.0.0",
        "jupyter_client==7.4.9",
        "entrypoints==0.4",
        "backcall==0.2.0",
        "pickleshare==0.7.5",
        "ipython_genutils==0.2.0",
        "widgetsnbextension==3.6.6",
        "jupyterlab_widgets==1.1.7",
        "decorator==5.2.1",
        "setuptools<81",
    ],
    "ipykernel-6.31": ["ipykernel==6.31.0"],
    "ipykernel-7.3": ["ipykernel==7.3.0"],
    "ipykernel-7.4": ["ipykernel==7.4.0"],
}

#: What the engines stand on, as Google Colab has it: `PYTHONPATH=$(python -m tests.kernels.overlays models)`.
MODEL_LIBRARIES = {
    "models": [
        "transformers==5.15.0",
        "accelerate==1.14.0",
        "tokenizers==0.22.2",
        "huggingface-hub==1.33.0",
        "httpx==0.28.1",
        "httpcore==1.0.9",
        "h11==0.16.0",
        "anyio==4.9.0",
        "sniffio==1.3.1",
        "idna==3.10",
        "certifi==2025.8.3",
    ],
}


def packages(name: str) -> list[str]:
    """What the set of that name holds."""
    return (OVERLAYS | MODEL_LIBRARIES)[name]


def overlay_folder(name: str) -> Path:
    """Where the set of that name lies, whether it is installed or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kani_nb-tests"
    tag = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256("\n".join(packages(name)).encode()).hexdigest()[:8]
    return cache / f"{name}-py{tag}-{digest}"


def is_installed(name: str) -> bool:
    """Whether the set is complete."""
    return (overlay_folder(name) / ".complete").exists()


def install(name: str) -> Path:
    """Install the set of that name unless it is there; needs a package index."""
    folder = overlay_folder(name)
    if not is_installed(name):
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        subprocess.run([*command, *packages(name)], check=True)
        (folder / ".complete").touch()
    return folder


if __name__ == "__main__":
    for each in sys.argv[1:] or OVERLAYS:
        print(install(each))
