"""What a scheme needs and this environment lacks, said with the line that installs it; seen without importing anything.

GPTQ is the case that needs care: gptqmodel wants a newer torch than the rest of this package, and pip then replaces the
torch that is there, several gigabytes of it, without a word. Whether what is installed works is not tried here.
"""

from __future__ import annotations

from importlib.metadata import requires

from kani_nb.errors import MissingDependencyError
from kani_nb.hardware.bitsandbytes_check import installed_version, release
from kani_nb.hardware.schemes import find_scheme

#: The lowest torch of gptqmodel 7.7, and what that torch takes on a disk with its CUDA libraries (measured on Linux).
_GPTQ_TORCH, _GPTQ_DISK = "2.14.1", "5.6 GB"


def needs_of(scheme: str) -> MissingDependencyError | None:
    """What must be installed before `scheme` can be used, ready to be raised or shown; None where nothing is missing.

    Raises:
        ConfigError: there is no such scheme.
    """
    found = find_scheme(scheme)
    lacking = [
        (name, lowest, have) for name, lowest in found.needs if _is_below(have := installed_version(name), lowest)
    ]
    if not lacking:
        return _torch_too_old() if found.backend == "gptq" else None
    wanted = " and ".join(f"{name} {lowest} or newer" for name, lowest, _ in lacking)
    absent = [name for name, _, have in lacking if have is None]
    reasons = [f"{name} is {have}" for name, _, have in lacking if have is not None]
    if absent:
        reasons.insert(0, f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed")
    packages = " ".join(f'"{name}>={lowest}"' for name, lowest, _ in lacking)
    return MissingDependencyError(
        f"{found.name} needs {wanted}", why="; ".join(reasons), fix=f"pip install {packages}{_replacing(found.backend)}"
    )


def _is_below(installed: str | None, lowest: str) -> bool:
    return installed is None or release(installed) < release(lowest)


def _replacing(backend: str) -> str:
    """What that pip line does to the torch that is there."""
    have = installed_version("torch")
    if backend != "gptq" or have is None or not _is_below(have, _GPTQ_TORCH):
        return ""
    return (
        f", in an environment of its own: it replaces torch {have} by {_GPTQ_TORCH} or newer, {_GPTQ_DISK} on the disk "
        "with its CUDA libraries"
    )


def _torch_too_old() -> MissingDependencyError | None:
    """The error where torch is older than the metadata of gptqmodel asks for, which pip allows when told to."""
    from packaging.requirements import Requirement

    wanted = [each for line in requires("gptqmodel") or () if (each := Requirement(line)).name == "torch"]
    have = installed_version("torch")
    bad = next((each for each in wanted if have and not each.specifier.contains(have, prereleases=True)), None)
    if bad is None:
        return None
    return MissingDependencyError(
        f"gptqmodel {installed_version('gptqmodel')} needs torch{bad.specifier}",
        why=f"torch is {have}",
        fix=f'pip install "torch{bad.specifier}", in an environment of its own ({_GPTQ_DISK} with its CUDA libraries)',
    )
