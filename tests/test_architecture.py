"""The house's rules: who may import what, what an import costs, how long a file may be."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kani_nb

PACKAGE = Path(kani_nb.__file__).parent
#: A module may import from its own row and from those above it.
ROWS = [
    {
        "errors",
        "messages",
        "config",
        "generation_params",
        "options",
        "quantization",
        "_loop",
        "_interrupts",
        "_waiting",
        "_watchers",
        "_secrets",
        "_arguments",
        "_amounts",
        "_frames",
    },
    {"functions", "hardware", "metrics"},
    {"engines"},
    {"conversation", "figures"},
    {
        "_engines",
        "_runtime",
        "auto_choice",
        "compare",
        "doctor",
        "load_preview",
        "plan_text",
        "planning",
        "precision_advice",
    },
    {"serve"},
    {"notebook"},
]
EXEMPT = {"__init__", "testing"}
#: Library -> the parts of the package that may import it at all.
ONLY_IN = {
    "IPython": {"notebook"},
    "ipywidgets": {"notebook"},
    "anywidget": {"notebook"},
    "traitlets": {"notebook"},
    "plotly": {"figures"},
    "torch": {"engines", "hardware", "metrics", "_engines", "doctor"},
    "transformers": {"engines", "hardware"},
    "httpx": {"engines"},
    "kani": {"engines"},
    "llama_cpp": {"engines"},
    "ctransformers": {"engines"},
}
HEAVY = {
    "torch",
    "transformers",
    "plotly",
    "ipywidgets",
    "anywidget",
    "accelerate",
    "bitsandbytes",
    "httpx",
    "gguf",
    "kani",
    "llguidance",
    "PIL",
    "scipy",
}
#: Classes of widgets: these modules import anywidget, and are themselves imported when a panel is asked for.
WIDGETS = {"kani_nb.notebook.panels.engine_panel", "kani_nb.notebook.panels.chat_panel"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, path.relative_to(PACKAGE).with_suffix("").parts


def imports(path):
    """`(module, imported when this module is)` for each import of a file; those for the type checker left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in inside
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, id(node) not in inside


def row_of(part):
    return next((number for number, row in enumerate(ROWS) if part in row), None)


def test_every_module_has_its_row():
    homeless = {parts[0] for _, parts in modules()} - EXEMPT - set().union(*ROWS)
    assert not homeless


def test_imports_point_to_the_own_row_or_above():
    wrong = []
    for path, parts in modules():
        if parts[0] in EXEMPT:
            continue
        for name, _ in imports(path):
            target = name.split(".")
            if target[0] != "kani_nb" or len(target) == 1 or target[1] in EXEMPT:
                continue
            if row_of(target[1]) > row_of(parts[0]):
                wrong.append(f"{'.'.join(parts)} imports {name}")
    assert not wrong


def test_no_front_imports_a_concrete_engine():
    wrong = [
        f"{'.'.join(parts)} imports {name}"
        for path, parts in modules()
        if parts[0] in ("notebook", "serve")
        for name, _ in imports(path)
        if name.startswith(("kani_nb.engines.huggingface", "kani_nb.engines.echo"))
    ]
    assert not wrong


def test_libraries_stay_in_the_parts_that_own_them():
    wrong = [
        f"{'.'.join(parts)} imports {name}"
        for path, parts in modules()
        for name, _ in imports(path)
        if parts[0] not in ONLY_IN.get(name.split(".")[0], {parts[0]})
    ]
    assert not wrong


def test_heavy_libraries_are_imported_inside_functions():
    wrong = [
        f"{'.'.join(parts)} imports {name}"
        for path, parts in modules()
        for name, at_import in imports(path)
        if at_import
        and (name.split(".")[0] in HEAVY or name in WIDGETS)
        and ".".join(("kani_nb", *parts)) not in WIDGETS
    ]
    assert not wrong


def test_no_file_grows_past_450_lines():
    roots = [PACKAGE, PACKAGE.parent / "tests", PACKAGE.parent / "js" / "src"]
    long = {
        path.name: lines
        for root in roots
        for suffix in ("py", "ts", "js")
        for path in root.rglob(f"*.{suffix}")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > 450
    }
    assert not long


def test_the_public_names_are_few_and_all_importable():
    assert len(kani_nb.__all__) <= 20
    for name in kani_nb.__all__:
        assert getattr(kani_nb, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = kani_nb.nothing


def test_loading_the_extension_loads_no_heavy_library():
    code = (
        "import sys; from IPython.core.interactiveshell import InteractiveShell; shell = InteractiveShell.instance();"
        "import kani_nb; shell.extension_manager.load_extension('kani_nb');"
        f"print(sorted({{m.split('.')[0] for m in sys.modules}} & {HEAVY!r}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
