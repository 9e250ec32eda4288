"""What an installation brings: the wheel is complete, and on Google Colab nothing of Colab's own is touched."""

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: Of what Google Colab preinstalls, what we or our dependencies need (August 2026; the versions of pydantic, httpx and
#: what they need are recalled, not looked up).
COLAB = {
    "accelerate": "1.14.0",
    "annotated-types": "0.7.0",
    "anyio": "4.12.0",
    "anywidget": "0.9.21",
    "certifi": "2025.11.12",
    "docstring-parser": "0.17.0",
    "filelock": "3.20.0",
    "fsspec": "2025.3.0",
    "h11": "0.16.0",
    "httpcore": "1.0.9",
    "httpx": "0.28.1",
    "huggingface-hub": "1.5.0",
    "idna": "3.11",
    "ipykernel": "6.17.1",
    "ipython": "7.34.0",
    "ipywidgets": "7.7.1",
    "jinja2": "3.1.6",
    "jupyter-client": "7.4.9",
    "markdown-it-py": "4.0.0",
    "mdurl": "0.1.2",
    "narwhals": "2.0.0",
    "nbclient": "0.10.2",
    "numpy": "2.0.2",
    "packaging": "25.0",
    "plotly": "5.24.1",
    "psutil": "5.9.5",
    "psygnal": "0.15.0",
    "pydantic": "2.12.3",
    "pydantic-core": "2.41.4",
    "pygments": "2.19.2",
    "pyyaml": "6.0.3",
    "requests": "2.32.4",
    "safetensors": "0.8.0",
    "tenacity": "9.1.2",
    "tokenizers": "0.22.1",
    "torch": "2.11.0",
    "tqdm": "4.67.1",
    "traitlets": "5.7.1",
    "transformers": "5.15.0",
    "typing-extensions": "4.15.0",
    "typing-inspection": "0.4.2",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_module_and_what_the_notebook_shows(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "kani_nb"
    wanted = {
        path.relative_to(ROOT).as_posix()
        for suffix in ("py", "js", "json", "typed")
        for path in package.rglob(f"*.{suffix}")
        if "__pycache__" not in path.parts
    }
    assert wanted <= names
    assert not [name for name in names if name.startswith(("tests/", "js/", "notebooks/"))]


@pytest.mark.network
@pytest.mark.timeout(600)
def test_installing_on_colab_replaces_nothing_of_colabs_own(wheel, tmp_path):
    venv.create(tmp_path / "colab", with_pip=True)
    python = tmp_path / "colab" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True, text=True
    ).stdout.strip()
    for name, version in COLAB.items():
        info = Path(site) / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
        (info / "RECORD").write_text("")
    report = tmp_path / "report.json"
    command = [python, "-m", "pip", "install", "--quiet", "--dry-run", "--report", str(report), str(wheel)]
    subprocess.run(command, check=True)
    would_install = {
        each["metadata"]["name"].lower().replace("_", "-") for each in json.loads(report.read_text())["install"]
    }
    assert "kani-nb" in would_install
    assert not would_install & set(COLAB)
    assert not [name for name in would_install if name.startswith(("nvidia", "cuda", "triton"))]
    print("a new Colab session would get:", ", ".join(sorted(would_install)))
