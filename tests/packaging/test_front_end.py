"""The built front end: made from the sources beside it, small, self-contained; and rebuilt by the wheel when it is not.

That it is built is checked without Node; that the same sources give the same bytes where there is one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STATIC = ROOT / "kani_nb" / "static"
BUNDLES = {"strip.js": 5_000, "engine_panel.js": 40_000, "chat_pane.js": 150_000}
#: In place of what would take text for markup, or fetch.
SINKS = ("insertAdjacentHTML", "document.write(", "eval(", "new Function(", "XMLHttpRequest", "WebSocket(")

needs_npm = pytest.mark.skipif(
    shutil.which("npm") is None or not (ROOT / "js" / "node_modules").is_dir(),
    reason="npm or js/node_modules is missing: npm --prefix js ci",
)


def load_hook():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_bundles_are_those_of_the_sources():
    assert load_hook().is_fresh(ROOT), "npm --prefix js run build"


@pytest.mark.parametrize("name", [*BUNDLES, "sources.sha256"])
@pytest.mark.parametrize("damage", ["missing", "edited by hand"])
def test_a_bundle_that_is_not_as_it_was_built_is_not_fresh(tmp_path, name, damage):
    for folder in ("js", "kani_nb/static"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("node_modules"))
    assert load_hook().is_fresh(tmp_path)
    path = tmp_path / "kani_nb" / "static" / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_text(path.read_text(encoding="utf-8").replace("a", "b", 1), encoding="utf-8")
    assert not load_hook().is_fresh(tmp_path)
    assert load_hook().has_bundles(tmp_path) is (damage != "missing")


def test_each_widget_is_one_small_module_of_its_own():
    assert {path.name for path in STATIC.glob("*.js")} == set(BUNDLES)
    for name, most in BUNDLES.items():
        text = (STATIC / name).read_text(encoding="utf-8")
        assert len(text.encode()) < most, name
        assert not re.search(r"(?:^|[;}\n])import\b|[^.\w\"' ]import\(", text), f"{name} needs another file"
        assert not [sink for sink in SINKS if sink in text], name
        assert not re.search(r"[^.\w]fetch\(", text), name


def test_only_what_is_sanitised_is_ever_markup():
    for name in ("strip.js", "engine_panel.js"):
        assert "innerHTML" not in (STATIC / name).read_text(encoding="utf-8"), name
    ours = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "js" / "src").rglob("*.ts"))
    assert not re.search(r"innerHTML|outerHTML|DOMParser|createContextualFragment|srcdoc|setHTML", ours)


@needs_npm
def test_the_same_sources_give_the_same_bytes(tmp_path):
    before = {path.name: path.read_bytes() for path in STATIC.iterdir()}
    copy = tmp_path / "js"
    shutil.copytree(ROOT / "js", copy, ignore=shutil.ignore_patterns("node_modules"))
    (copy / "node_modules").symlink_to(ROOT / "js" / "node_modules")
    (tmp_path / "kani_nb" / "static").mkdir(parents=True)
    subprocess.run(["npm", "run", "build"], cwd=copy, check=True, capture_output=True, timeout=120)
    assert {path.name: path.read_bytes() for path in (tmp_path / "kani_nb" / "static").iterdir()} == before


@pytest.fixture
def project(tmp_path):
    """What the hook looks at, with sources newer than the bundles."""
    for name in ("hatch_build.py", "js/build.mjs", "js/package.json", "js/package-lock.json", "js/src/dom.ts"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "kani_nb" / "static").mkdir(parents=True)
    return tmp_path


HOOK = """
import sys; sys.path.insert(0, sys.argv[1])
from hatch_build import FrontEndHook, is_fresh
class App:
    def display_warning(self, text): print("warning:", text)
hook = FrontEndHook.__new__(FrontEndHook)
type(hook).app = property(lambda self: App())
hook.initialize("standard", {})
print("fresh" if is_fresh(__import__("pathlib").Path(sys.argv[1])) else "stale")
"""


def run_hook(project, path, mode="auto"):
    return subprocess.run(
        [sys.executable, "-c", HOOK, str(project)],
        env=os.environ | {"PATH": str(path), "KANI_NB_JS": mode},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def fake_npm(folder, code):
    npm = folder / "bin" / "npm"
    npm.parent.mkdir(exist_ok=True)
    npm.write_text(f"#!{sys.executable}\nimport sys, pathlib\n{code}")
    npm.chmod(0o755)
    return npm.parent


def test_a_stale_bundle_is_rebuilt_where_npm_is(project):
    code = (
        f"root = pathlib.Path({str(project)!r})\nsys.path.insert(0, str(root))\nfrom hatch_build import stamp\n"
        "print(sys.argv[1:])\n"
        "stamped = root / 'kani_nb/static/sources.sha256'\n"
        "if sys.argv[1] == 'run': stamped.write_text(stamp(root / 'js') + '  sources')\n"
    )
    done = run_hook(project, fake_npm(project, code))
    assert done.stdout.splitlines()[-1] == "fresh", done.stderr
    assert "['ci', '--no-audit', '--no-fund']" in done.stdout
    assert "npm" not in run_hook(project, "/nonexistent").stdout, "what is fresh is not built again"


def test_a_stale_bundle_is_taken_where_nothing_can_build_it_with_a_warning(project):
    (project / "kani_nb" / "static" / "sources.sha256").write_text("old  sources")
    done = run_hook(project, "/nonexistent")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "stale")
    assert "warning: kani_nb: the committed front end is not that of js/" in done.stdout
    failing = run_hook(project, fake_npm(project, "sys.exit(3)"))
    assert failing.returncode == 0
    assert "exit status 3" in failing.stdout


@pytest.mark.parametrize("mode", ["auto", "build"])
def test_no_bundle_and_no_way_to_build_one_is_one_clear_error(project, mode):
    if mode == "build":
        (project / "kani_nb" / "static" / "sources.sha256").write_text("old  sources")
    done = run_hook(project, "/nonexistent", mode)
    assert done.returncode != 0
    assert "RuntimeError: kani_nb/static cannot be built from js/: npm was not found" in done.stderr


def test_nothing_is_built_where_nobody_wants_it(project):
    assert run_hook(project, "/nonexistent", "skip").returncode == 0
