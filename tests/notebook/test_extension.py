"""Loading, unloading and reloading the extension: exactly what belongs there, and nothing that is heavy."""

import json
import subprocess
import sys

import pytest
from IPython.core.completer import provisionalcompleter

NAMES = {"line": {"load_engine", "unload_engine", "chat", "engine", "kani"}, "cell": {"chat"}}


def snapshot(shell):
    return {
        "magics": {kind: dict(table) for kind, table in shell.magics_manager.magics.items()},
        "registry": dict(shell.magics_manager.registry),
        "configurables": list(shell.configurables),
        "matchers": list(getattr(shell.Completer, "custom_matchers", [])),
        "hooks": {name: sorted(map(str, dispatcher.strs)) for name, dispatcher in shell.strdispatchers.items()},
        "transformers": list(shell.input_transformers_cleanup),
        "events": {name: list(callbacks) for name, callbacks in shell.events.callbacks.items()},
    }


def completed(shell, text):
    with provisionalcompleter():
        return [each.text for each in shell.Completer.completions(text, len(text))]


def test_unloading_puts_back_exactly_what_was_there(bare_shell, clean_runtime):
    def theirs(line):
        """Somebody's magic of the same name."""

    for name in ("load_ext", "unload_ext"):  # IPython loads its own when they are first used
        bare_shell.find_line_magic(name)
    bare_shell.register_magic_function(theirs, "line", "engine")
    before = snapshot(bare_shell)
    try:
        bare_shell.run_line_magic("load_ext", "kani_nb")
        for kind, names in NAMES.items():
            assert names <= set(bare_shell.magics_manager.magics[kind])
        assert bare_shell.find_line_magic("engine") is not theirs
        bare_shell.run_line_magic("unload_ext", "kani_nb")
        assert snapshot(bare_shell) == before
    finally:
        del bare_shell.magics_manager.magics["line"]["engine"]


def test_loading_twice_is_loading_once(bare_shell, clean_runtime):
    from kani_nb.notebook.extension import load, unload

    before = snapshot(bare_shell)
    load(bare_shell)
    loaded = snapshot(bare_shell)
    load(bare_shell)
    assert snapshot(bare_shell) == loaded
    unload(bare_shell)
    unload(bare_shell)
    assert snapshot(bare_shell) == before


def test_reloading_keeps_the_engine_the_conversation_and_works(cells, clean_runtime):
    cells.good("%load_engine echo --as mine")
    cells.good("%%chat\nhello")
    engine = clean_runtime.engine
    cells.good("%reload_ext kani_nb")
    assert clean_runtime.engine is engine
    cells.good("%%chat\nstill")
    assert [turn.prompt.text for turn in clean_runtime.chat.turns] == ["hello", "still"]


def test_preferences_are_set_with_config_and_completed(cells):
    cells.good("%config KaniNB.plot = 'never'")
    printed = cells.good("%config KaniNB.plot")
    assert "never" in printed
    assert "plot" in " ".join(completed(cells.shell, "%config KaniNB.p"))
    cells.good("%config KaniNB.plot = 'sometimes'")
    assert "never" in cells.good("%config KaniNB.plot")
    assert "ignored" in cells.good("%reload_ext kani_nb")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%load_engine --dty", "--dtype"),
        ("%load_engine smoll", "smollm2"),
        ("%load_engine echo --dtype=fl", "float32"),
        ("%%chat --max-n", "--max-new-tokens"),
        ("%%chat --engine mi", "mine"),
        ("%chat hist", "history"),
        ("%chat open po", "poems"),
        ("%engine use mi", "mine"),
        ("%kani doc", "doctor"),
    ],
)
def test_tab_completes_options_verbs_and_names(cells, line, expected):
    cells.good("%load_engine echo --as mine\n%chat new poems\n%chat new other")
    matches = completed(cells.shell, line)
    assert expected in matches
    assert all(match.startswith(line.replace("=", " ").split()[-1]) for match in matches)


def test_the_body_of_a_chat_is_not_completed_as_options(cells):
    assert "--max-new-tokens" not in completed(cells.shell, "%%chat\n%%chat --max-n")


def test_importing_and_loading_bring_no_heavy_library():
    code = """
import json, sys
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config
config = Config(); config.HistoryManager.enabled = False
shell = InteractiveShell.instance(config=config)
import kani_nb
shell.run_line_magic("load_ext", "kani_nb")
heavy = ["torch", "transformers", "plotly", "ipywidgets", "anywidget", "bitsandbytes", "markdown_it", "nbclient"]
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
