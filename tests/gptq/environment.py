"""The environment that GPTQ runs in: gptqmodel wants a newer torch than the rest, with CUDA's libraries, 6 GB in all.

    python -m tests.gptq.environment        # prints the path of its Python; makes it first if need be

It is kept in the user's cache, and made again only when what it holds should change. Where less than 15 GB of disk are
free it is not made: that is said in one line, and the exit code is 3.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

#: What was tried together; gptqmodel 7.7 takes no torch before 2.14.1.
REQUIREMENTS = [
    "gptqmodel==7.7.0",
    "optimum==2.3.0",
    "torch==2.15.0",
    "transformers==5.23.0",
    "accelerate==1.15.0",
    "torchao==0.18.0",
    "datasets==5.2.0",
]
ROOT = Path(__file__).parents[2]
NEEDED_BYTES = 15 * 10**9
#: The exit code for a machine that has no room for it.
NO_ROOM = 3


def cache() -> Path:
    """The folder that a continuous integration may keep."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kani_nb-ci"


def digest() -> str:
    """What the environment should hold, in a few letters."""
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.")[0]
    wanted = "\n".join([*REQUIREMENTS, declared, sys.version])
    return hashlib.sha256(wanted.encode()).hexdigest()[:16]


def free_bytes() -> int:
    """What is free where the environment is, or would be."""
    folder = next(each for each in (cache(), *cache().parents) if each.exists())
    return shutil.disk_usage(folder).free


def python_of(venv: Path) -> Path:
    """The interpreter of an environment."""
    return venv / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def is_made(venv: Path) -> bool:
    """Whether it is there, complete, and what it should be."""
    stamp = venv / "stamp"
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == digest()


def make(venv: Path) -> None:
    """Make it afresh; what pip says goes to stderr."""
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip(venv, *REQUIREMENTS, "-e", f"{ROOT}[test]")
    (venv / "stamp").write_text(digest(), encoding="utf-8")


def pip(venv: Path, *packages: str) -> None:
    """Install; without a cache, which would take the room of it all once more."""
    command = [str(python_of(venv)), "-m", "pip", "install", "--quiet", "--no-cache-dir", "--disable-pip-version-check"]
    subprocess.run([*command, *packages], check=True, stdout=sys.stderr)


def main() -> int:
    """Print the path of the environment's Python, and return the exit code."""
    from filelock import FileLock

    venv = cache() / "gptq-venv"
    venv.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(venv.with_suffix(".lock")):
        if not is_made(venv):
            if (free := free_bytes()) < NEEDED_BYTES:
                least = NEEDED_BYTES / 1e9
                print(f"GPTQ is left out: it needs {least:.0f} GB of disk, {free / 1e9:.1f} are free", file=sys.stderr)
                return NO_ROOM
            make(venv)
        source = venv / "source"  # the clone that is tested may be another than last time
        if not source.is_file() or source.read_text(encoding="utf-8") != str(ROOT):
            pip(venv, "--no-deps", "-e", str(ROOT))
            source.write_text(str(ROOT), encoding="utf-8")
    print(python_of(venv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
