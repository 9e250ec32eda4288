"""The strip's module is small, valid, and takes nothing as markup."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

import kani_nb

SOURCE = Path(kani_nb.__file__).parent / "static" / "strip.js"

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def test_the_module_is_under_five_kilobytes_and_uses_no_markup_sink():
    text = SOURCE.read_text(encoding="utf-8")
    assert len(text.encode()) < 5_000
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "import("):
        assert sink not in text


@needs_node
def test_the_module_is_valid(tmp_path):
    module = tmp_path / "strip.mjs"
    module.write_bytes(SOURCE.read_bytes())
    subprocess.run(["node", "--check", str(module)], check=True, timeout=60)


@needs_node
def test_the_sparkline_stays_in_its_box(tmp_path):
    module = tmp_path / "strip.mjs"
    module.write_bytes(SOURCE.read_bytes())
    code = (
        f"import {{points}} from {json.dumps(module.as_uri())};"
        "console.log(JSON.stringify([points([1,3,2]), points([5,5]), points([7])]))"
    )
    done = subprocess.run(
        ["node", "--input-type=module", "-e", code], check=True, timeout=60, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == ["0.0,15.0 40.0,1.0 80.0,8.0", "0.0,15.0 80.0,15.0", "0.0,15.0"]
