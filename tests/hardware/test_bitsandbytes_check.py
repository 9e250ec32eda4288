"""What keeps bitsandbytes from working is one error, with the path that was looked at and the line that mends it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from kani_nb.hardware.bitsandbytes_check import check_bitsandbytes, installed_version, library_path, library_problem

REAL = importlib.util.find_spec("bitsandbytes")


def packaged(folder: Path, version: str, *libraries: str) -> Path:
    """A package directory as pip leaves it, in `folder`; importing it fails."""
    package = folder / "bitsandbytes"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('it was imported')")
    for name in libraries:
        (package / name).write_bytes(b"\x7fELF and nothing else")
    info = folder / f"bitsandbytes-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: bitsandbytes\nVersion: {version}\n")
    return package


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that is looked at before all others; torch says that it was built with CUDA 12.8."""
    import torch

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    return tmp_path


@pytest.mark.skipif(REAL is None, reason="bitsandbytes is not installed")
def test_nothing_is_wrong_with_it_on_a_cpu():
    assert check_bitsandbytes("cpu") is None


def test_a_version_that_is_too_old_is_named_with_the_lowest_that_will_do(place):
    packaged(place, "0.43.3")
    said = str(check_bitsandbytes("cuda:0"))
    assert said.startswith("bitsandbytes is 0.43.3: 0.46.1 is the first")
    assert "%pip install -U bitsandbytes" in said


def test_a_library_that_is_not_there_is_named_with_its_path_and_what_there_is(place):
    package = packaged(place, "0.46.1", "libbitsandbytes_cpu.so", "libbitsandbytes_cuda126.so")
    said = str(check_bitsandbytes("cuda:0"))
    assert said.startswith("bitsandbytes 0.46.1 has no library for CUDA 12.8")
    assert str(package / "libbitsandbytes_cuda128.so") in said
    assert "there are: libbitsandbytes_cuda126.so" in said
    assert "export LD_LIBRARY_PATH=" in said


def test_on_a_cpu_no_cuda_library_is_needed(place):
    packaged(place, "0.46.1", "libbitsandbytes_cpu.so")
    assert check_bitsandbytes("cpu") is None


def test_without_bitsandbytes_it_is_said_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert installed_version("bitsandbytes") is None
    problem = check_bitsandbytes("cpu")
    assert str(problem) == "bitsandbytes is not installed\n→ %pip install -U bitsandbytes, then restart the kernel"


@pytest.mark.skipif(sys.platform != "linux" or REAL is None, reason="needs bitsandbytes' libraries for Linux")
def test_the_real_library_without_cuda_names_what_is_missing_and_where_it_could_be(tmp_path):
    folder = Path(REAL.submodule_search_locations[0])
    if not (folder / "libbitsandbytes_cuda128.so").is_file():
        pytest.skip("this bitsandbytes has no library for CUDA 12.8")
    runtime = tmp_path / "cuda" / "lib64"
    runtime.mkdir(parents=True)
    environ = {"CUDA_HOME": str(tmp_path / "cuda")}
    problem = library_problem(folder, "0.50.2", "cuda", "12.8", environ)
    if problem is None:
        pytest.skip("CUDA 12's runtime is installed here")
    assert str(folder / "libbitsandbytes_cuda128.so") in problem.what
    missing = problem.why.split(" ", 1)[0]
    assert missing.startswith("lib")
    assert str(runtime) in problem.why
    assert f"export LD_LIBRARY_PATH={runtime}:$LD_LIBRARY_PATH" in problem.fix
    (runtime / missing).write_bytes(b"")
    found = library_problem(folder, "0.50.2", "cuda", "12.8", environ)
    assert f"{missing} was not found; it is in {runtime}" in found.why
    assert found.fix.startswith(f"export LD_LIBRARY_PATH={runtime}:")


@pytest.mark.parametrize(
    ("version", "cuda", "chosen", "taken"),
    [
        ("0.50.2", "12.6", "", "126"),
        ("0.50.2", "12.9", "", "128"),
        ("0.50.2", "12.0", "", "126"),
        ("0.50.2", "11.7", "", "117"),
        ("0.49.2", "12.9", "", "129"),
        ("0.50.2", "12.9", "126", "126"),
        ("0.50.2", "12.9", "999", "999"),
    ],
)
def test_the_library_is_the_one_that_bitsandbytes_would_open(tmp_path, version, cuda, chosen, taken):
    package = packaged(
        tmp_path, version, "libbitsandbytes_cuda126.so", "libbitsandbytes_cuda128.so", "libbitsandbytes_cuda130.so"
    )
    environ = {"BNB_CUDA_VERSION": chosen} if chosen else {}
    assert library_path(package, version, "cuda", cuda, environ).stem == f"libbitsandbytes_cuda{taken}"
