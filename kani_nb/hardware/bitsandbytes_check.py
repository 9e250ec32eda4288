"""Whether bitsandbytes can be used here, seen before it is imported: installed, new enough, its CUDA library found.

bitsandbytes itself tells of a missing library only when a weight is first multiplied, in forty lines. Here it is one
error with the path that was looked at and the line that mends it. On a machine without a CUDA device its own CPU code
is used, and no such library is needed.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kani_nb.errors import MissingDependencyError
from kani_nb.hardware.schemes import find_scheme

_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
#: Since then a library of the same major CUDA version is taken where the exact one is not there.
_TAKES_ANY_MINOR = (0, 50)
_INSTALL = "%pip install -U bitsandbytes, then restart the kernel"


def check_bitsandbytes(device: str = "") -> MissingDependencyError | None:
    """What keeps bitsandbytes from working, ready to be raised; None where nothing does. Imports torch, not it.

    Args:
        device: where it is to run; its CUDA library is looked at for a CUDA device, or, by default, where torch sees
            one.
    """
    installed = installed_version("bitsandbytes")
    if installed is None:
        return MissingDependencyError("bitsandbytes is not installed", fix=_INSTALL)
    lowest = dict(find_scheme("nf4").needs)["bitsandbytes"]
    if release(installed) < release(lowest):
        return MissingDependencyError(
            f"bitsandbytes is {installed}", why=f"{lowest} is the first that runs these schemes", fix=_INSTALL
        )
    folder = _package_folder()
    if folder is None:
        return MissingDependencyError("bitsandbytes cannot be imported", why="its folder is gone", fix=_INSTALL)
    toolkit = _toolkit(device)
    return None if toolkit is None else library_problem(folder, installed, *toolkit, os.environ)


def _toolkit(device: str) -> tuple[str, str] | None:
    """`("cuda", "12.8")` that torch was built with, where a device of that kind is to be used."""
    import torch

    kind = "rocm" if torch.version.hip else "cuda"
    built_with = torch.version.hip or torch.version.cuda
    is_used = device.startswith("cuda") if device else torch.cuda.is_available()
    return (kind, str(built_with)) if built_with and is_used else None


def library_problem(
    folder: Path, installed: str, kind: str, toolkit: str, environ: Mapping[str, str]
) -> MissingDependencyError | None:
    """What is wrong with the library in `folder` for that version of CUDA or ROCm; None where it can be opened.

    Args:
        folder: of the package bitsandbytes.
        installed: its version.
        kind: `cuda` or `rocm`.
        toolkit: the version that torch was built with, `12.8`.
        environ: `BNB_CUDA_VERSION`, `CUDA_HOME` and others are read from it.
    """
    path = library_path(folder, installed, kind, toolkit, environ)
    name = f"{kind.upper() if kind == 'cuda' else 'ROCm'} {toolkit}"
    if not path.is_file():
        there = ", ".join(sorted(each.name for each in folder.glob(f"libbitsandbytes_{kind}*{_SUFFIX}"))) or "none"
        return MissingDependencyError(
            f"bitsandbytes {installed} has no library for {name}",
            why=f"torch was built with that, and {path} is not there (there are: {there})",
            fix=f"{_INSTALL}; or choose one that is there (BNB_{kind.upper()}_VERSION=128 for 12.8), and where it then "
            f"does not open, {library_path_line(_toolkit_folder(kind, toolkit, environ))} before the kernel starts",
        )
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return _not_opened(path, name, str(error), kind, toolkit, environ)
    return None


def _not_opened(
    path: Path, name: str, reason: str, kind: str, toolkit: str, environ: Mapping[str, str]
) -> MissingDependencyError:
    missing = re.match(r"(\S+): cannot open shared object file", reason)
    looked = list(_library_folders(environ))
    where = next((each for each in looked if missing is not None and (each / missing[1]).exists()), None)
    found = (
        f"; it is in {where}" if where is not None else f"; it is not in {', '.join(map(str, looked))}" * bool(looked)
    )
    line = library_path_line(where or _toolkit_folder(kind, toolkit, environ))
    install = "" if where is not None else f"install {name}'s runtime, then "
    return MissingDependencyError(
        f"bitsandbytes' library {path} cannot be opened",
        why=f"{missing[1]} was not found{found}" if missing is not None else reason,
        fix=f"{install}{line} before the kernel starts",
    )


def library_path(folder: Path, installed: str, kind: str, toolkit: str, environ: Mapping[str, str]) -> Path:
    """The file that bitsandbytes would open, whether or not it is there."""
    chosen = environ.get(f"BNB_{kind.upper()}_VERSION", "")
    wanted = chosen if chosen.isdigit() else "".join(toolkit.split(".")[:2])
    exact = folder / f"libbitsandbytes_{kind}{wanted}{_SUFFIX}"
    if exact.is_file() or chosen or release(installed) < _TAKES_ANY_MINOR:
        return exact
    major_digits = 2 if kind == "cuda" else 1
    packaged = {
        int(found[1]): path
        for path in folder.glob(f"libbitsandbytes_{kind}*{_SUFFIX}")
        if (found := re.search(rf"_{kind}(\d+)$", path.stem)) and found[1][:major_digits] == wanted[:major_digits]
    }
    lower = [number for number in packaged if number < int(wanted)]
    if lower:
        return packaged[max(lower)]
    return packaged[min(packaged)] if packaged else exact


def library_path_line(folder: Path | str) -> str:
    """The shell's line that lets the loader look in `folder` too."""
    if sys.platform == "win32":
        return f"set PATH={folder};%PATH%"
    return f"export LD_LIBRARY_PATH={folder}:$LD_LIBRARY_PATH"


def _toolkit_folder(kind: str, toolkit: str, environ: Mapping[str, str]) -> str:
    """Where that version's libraries usually lie."""
    if kind == "rocm":
        return f"{environ.get('ROCM_PATH', '/opt/rocm')}/lib"
    return f"{environ.get('CUDA_HOME') or environ.get('CUDA_PATH') or f'/usr/local/cuda-{toolkit}'}/lib64"


def _library_folders(environ: Mapping[str, str]) -> Iterator[Path]:
    """The folders that exist and may hold CUDA's libraries: the toolkit's, conda's, and those of nvidia's packages."""
    homes = [Path(home) for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX") if (home := environ.get(name))]
    homes += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    places = [each / name for each in homes for name in ("lib64", "lib")]
    for entry in sys.path:
        places += sorted(Path(entry or ".").glob("nvidia/*/lib"))
    yield from dict.fromkeys(place for place in places if place.is_dir())


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec("bitsandbytes")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return Path(places[0]) if places else None


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, or None. Imports nothing of it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """The numbers of a version, for comparing: `0.46.1.post2` is `(0, 46, 1)`."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
