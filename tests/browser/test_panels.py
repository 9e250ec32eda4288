"""The panels as people use them: by clicking and typing alone, in a real front end.

Pictures of each step are in tests/artifacts, for people to look at.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.browser.front_end import Chromium, OpenNotebook
from tests.browser.jupyter import JupyterServer
from tests.browser.panels import HAS_BEGUN, Pane, findings, tell_story

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

ECHO = "%load_ext kani_nb\n%load_engine echo:delay={delay}\nimport kani_nb; rt = kani_nb.runtime()"


def open_pane(server: JupyterServer, browser: Chromium, name: str, *cells: str, delay: float = 0.0) -> tuple:
    server.write(name, [ECHO.format(delay=delay), "%chat panel", *cells])
    notebook = browser.open(server, name)
    notebook.run(0, 1)
    notebook.page.wait_for_selector(".kn-chat")
    return notebook, Pane(notebook.page)


def set_theme(notebook: OpenNotebook, theme: str) -> None:
    notebook.page.evaluate("(theme) => jupyterapp.commands.execute('apputils:change-theme', {theme})", theme)
    notebook.page.wait_for_timeout(600)


def test_a_model_is_chosen_planned_loaded_talked_to_and_freed_by_clicking(
    server: JupyterServer, browser: Chromium, artifacts: Path
):
    server.write("story.ipynb", ["%load_ext kani_nb\n%load_engine", "%chat panel"])
    notebook = browser.open(server, "story.ipynb")
    notebook.run(0, 1)
    page = notebook.page
    tell_story(page, lambda step: page.screenshot(path=artifacts / f"panels-{server.kind}-{step}.png"))
    browser.assert_quiet()


def test_a_page_that_is_loaded_again_in_mid_answer_shows_all_of_it_in_the_end(server: JupyterServer, browser: Chromium):
    notebook, pane = open_pane(server, browser, "reload.ipynb", delay=0.05)
    words = " ".join(f"word{number}" for number in range(120))
    pane.ask(words)
    notebook.page.wait_for_function(HAS_BEGUN)
    notebook.save()
    notebook.reload()
    notebook.page.wait_for_selector(".kn-running", timeout=30_000)
    pane = Pane(notebook.page)
    pane.wait_for_turns(1)
    assert pane.answer(1).strip() == words


def test_two_views_of_one_pane_show_the_same(server: JupyterServer, browser: Chromium):
    if server.kind != "lab":
        pytest.skip("Notebook 7 has no command for a second view of an output")
    notebook, pane = open_pane(server, browser, "views.ipynb", delay=0.01)
    notebook.page.evaluate("() => { jupyterapp.commands.execute('notebook:create-output-view') }")
    notebook.page.wait_for_function("() => document.querySelectorAll('.kn-chat').length === 2")
    pane.box.first.fill("the same in both")
    pane.box.first.press("Enter")
    notebook.page.wait_for_function(
        "() => [...document.querySelectorAll('.kn-chat')].every((each) =>"
        " each.querySelector('.kn-turn:not(.kn-running) .kn-md')?.textContent.includes('the same in both'))"
    )
    browser.assert_quiet()


def test_the_conversation_reads_well_without_its_kernel(server: JupyterServer, browser: Chromium):
    notebook, pane = open_pane(server, browser, "reopened.ipynb")
    pane.ask("remember **this**")
    pane.wait_for_turns(1)
    notebook.wait_for(lambda: "remember" in json.dumps(notebook.outputs(1)))
    saved = notebook.save()
    assert "widgets" not in saved["metadata"]
    notebook.close()
    server.stop_kernels()
    cases = [True] if server.kind == "notebook" else [True, False]
    for has_kernel in cases:
        again = browser.open(server, "reopened.ipynb", has_kernel=has_kernel)
        again.page.wait_for_timeout(1000)
        shown = again.shown(1)
        assert "remember" in shown
        assert "model not found" not in shown
        assert "Loading widget" not in shown
        again.close()


def test_the_panels_are_accessible_in_both_themes(server: JupyterServer, browser: Chromium):
    notebook, pane = open_pane(server, browser, "axe.ipynb", "%engine panel smollm2 --quant nf4")
    notebook.run(2)
    notebook.page.wait_for_selector(".kn-verdict >> text=Fits", timeout=60_000)
    pane.ask("some `code` and\n\n```python\nprint(1)\n```\n\nand [a link](https://example.org)")
    pane.wait_for_turns(1)
    notebook.page.get_by_role("button", name="Settings").click()
    notebook.page.get_by_role("button", name="Conversations").click()
    notebook.page.wait_for_selector(".kn-chats button")
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        set_theme(notebook, theme)
        assert findings(notebook.page, ".kn-chat") == []
        assert findings(notebook.page, ".kn-engine") == []
    browser.assert_quiet()
