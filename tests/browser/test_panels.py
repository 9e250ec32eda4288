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


@pytest.mark.parametrize("how", ["without a kernel", "with a fresh kernel", "untrusted"])
def test_the_conversation_and_its_figures_read_well_when_reopened(server: JupyterServer, browser: Chromium, how: str):
    if server.kind == "notebook" and how == "without a kernel":
        pytest.skip("Notebook 7 starts a kernel with each notebook")
    cells = ["%%chat\nasked in a **cell**", "%engine dashboard", "%engine panel echo"]
    notebook, pane = open_pane(server, browser, "reopened.ipynb", *cells)
    pane.ask("remember **this**")
    pane.wait_for_turns(1)
    notebook.run(2, 3, 4)
    notebook.wait_for(lambda: "remember" in json.dumps(notebook.outputs(1)))
    saved = notebook.save()
    assert "widgets" not in saved["metadata"]
    notebook.close()
    server.stop_kernels()
    if how == "untrusted":  # as from somebody else: what was signed was another file
        saved["metadata"]["from"] = "elsewhere"
        (server.root / "reopened.ipynb").write_text(json.dumps(saved))
    again = browser.open(server, "reopened.ipynb", has_kernel=how != "without a kernel")
    is_trusted = "() => [...kn.panel().content.model.cells].every((cell) => cell.trusted)"
    assert again.page.evaluate(is_trusted) is (how != "untrusted")
    again.page.wait_for_timeout(1000)
    shown = {index: again.shown(index) for index in (1, 2, 3, 4)}
    assert "remember this" in shown[1]
    assert "asked in a cell" in shown[2]
    assert "%load_engine echo" in shown[4]
    for text in shown.values():
        assert "model not found" not in text
        assert "Loading widget" not in text
        assert "<div" not in text
    words = again.cell(3).locator(".kani-words")
    assert words.is_visible() is (how == "untrusted")
    assert "ms" in str(words.text_content())
    for index in (2, 3) if how != "untrusted" else (2,):
        figure = again.cell(index).locator(".jp-RenderedPlotly, svg:has(text), img[src^='data:image/svg']").first
        figure.wait_for()
        assert figure.bounding_box()["height"] > 100
    # What JupyterLab itself says of a saved widget, whosever it is; the twin is what is read then.
    browser.assert_quiet(but="widget model not found")


#: Whatever of a panel sticks out of it.
OUTSIDE = """() => [...document.querySelectorAll('.kani-panel, .kani-panel .kn-turn, .kani-panel .kn-side')]
  .filter((each) => each.scrollWidth > each.clientWidth + 1).map((each) => each.className)"""


def test_the_panels_are_accessible_in_both_themes_and_widths(server: JupyterServer, browser: Chromium, artifacts: Path):
    notebook, pane = open_pane(server, browser, "axe.ipynb", "%engine panel smollm2 --quant nf4")
    notebook.run(2)
    notebook.page.wait_for_selector(".kn-verdict >> text=Fits", timeout=60_000)
    pane.ask("some `code` and\n\n```python\nprint(1)\n```\n\nand [a link](https://example.org)")
    pane.wait_for_turns(1)
    notebook.page.get_by_role("button", name="Settings").click()
    notebook.page.get_by_role("button", name="Conversations").click()
    notebook.page.wait_for_selector(".kn-chats button")
    if server.kind == "lab":
        notebook.page.evaluate("jupyterapp.commands.execute('application:toggle-left-area')")
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        set_theme(notebook, theme)
        assert findings(notebook.page, ".kn-chat") == []
        assert findings(notebook.page, ".kn-engine") == []
        for width in (1280, 600):
            notebook.page.set_viewport_size({"width": width, "height": 2200})
            notebook.page.wait_for_timeout(300)
            assert notebook.page.evaluate(OUTSIDE) == []
            name = f"panels-{server.kind}-{theme.split()[1].lower()}-{width}.png"
            notebook.page.screenshot(path=artifacts / name)
    browser.assert_quiet()


def test_a_pane_whose_kernel_was_restarted_says_so_and_offers_a_cell_that_resumes(
    server: JupyterServer, browser: Chromium
):
    notebook, pane = open_pane(server, browser, "restarted.ipynb")
    page = notebook.page
    pane.ask("remember the milk")
    pane.wait_for_turns(1)
    page.evaluate("async () => { await kn.panel().sessionContext.session.kernel.restart() }")
    gone = page.get_by_role("alert").filter(has_text="The kernel was restarted")
    gone.wait_for()
    assert page.get_by_role("region", name="Chat").get_by_role("button", name="Send").is_disabled()
    gone.get_by_role("button").click()
    notebook.wait_until_idle()
    cells = page.evaluate("[...kn.panel().content.model.sharedModel.cells].map((cell) => cell.source)")
    assert cells[2].startswith("%load_ext kani_nb\n%chat resume ")
    notebook.run(2)
    resumed = notebook.cell(2).locator(".kn-chat")
    resumed.locator(".kn-turn").first.wait_for()
    assert "remember the milk" in resumed.inner_text()
    browser.assert_quiet()


def test_keys_that_are_pressed_in_a_panel_stay_in_it(server: JupyterServer, browser: Chromium):
    notebook, pane = open_pane(server, browser, "keys.ipynb", "%engine panel smollm2")
    notebook.run(2)
    page = notebook.page
    engine, chat = (page.get_by_role("region", name=name, exact=True) for name in ("Engine", "Chat"))
    engine.get_by_role("button", name="Check again").wait_for()
    pane.ask("hello")
    pane.wait_for_turns(1)
    before = page.evaluate("kn.panel().content.model.sharedModel.cells.map((cell) => cell.id)")
    places = [
        engine.get_by_label("Scheme"),
        engine.get_by_role("button", name="Check again"),
        engine.get_by_label("Allow offloading"),
        engine.get_by_label("Model"),
        chat.get_by_role("button", name="Settings"),
        chat.get_by_role("button", name="Retry turn 1"),
        page.locator(".kn-log"),
        pane.box,
    ]
    for place in places:
        place.focus()
        for key in ("b", "x", "d", "d", "ArrowDown", "Shift+m"):
            page.keyboard.press(key)
        assert place.evaluate("(node) => node === document.activeElement"), f"{place} lost the focus"
    assert page.evaluate("kn.panel().content.model.sharedModel.cells.map((cell) => cell.id)") == before
    notebook.wait_for(lambda: page.evaluate("kn.panel().context.model.dirty"))
    pane.box.press("Control+s")
    notebook.wait_for(lambda: not page.evaluate("kn.panel().context.model.dirty"))
    engine.get_by_label("Model").fill("smollm2")
    engine.get_by_label("Model").press("Shift+Enter")
    slider = engine.get_by_label("Context length").last
    page.wait_for_selector(".kn-verdict >> text=Fits", timeout=60_000)
    slider.focus()
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    notebook.wait_for(lambda: "--max-context-size=2048" in engine.inner_text())
    assert slider.get_attribute("aria-valuetext") == "2,048 tokens"
    browser.assert_quiet()


def test_the_pane_stands_at_its_end_when_an_answer_has_ended(server: JupyterServer, browser: Chromium):
    notebook, pane = open_pane(server, browser, "end.ipynb", delay=0.01)
    page = notebook.page
    log = page.locator(".kn-log")
    page.locator(".kn-title").wait_for()
    assert log.bounding_box()["y"] > page.locator(".kn-head").bounding_box()["y"] + 20, (
        "an empty pane lies over its head"
    )
    distance = "(node) => node.scrollHeight - node.scrollTop - node.clientHeight"
    for number, lines in enumerate((3, 40, 60, 4), 1):
        pane.ask("\n\n".join(f"line {line}" for line in range(lines)))
        pane.wait_for_turns(number)
        notebook.wait_for(lambda: log.evaluate(distance) < 5)
        page.wait_for_timeout(800)  # until the browser has laid out what it had guessed
        assert log.evaluate(distance) < 5, f"after turn {number}"
    log.evaluate("(node) => { node.scrollTop = 100 }")
    notebook.wait_for(lambda: log.evaluate(distance) > 100)
    pane.ask("who scrolled up")
    notebook.wait_for(lambda: log.evaluate(distance) < 5)


def test_what_stands_in_the_transcript_is_accessible_in_both_themes(server: JupyterServer, browser: Chromium):
    cells = ["%%chat\nsome `code`, and\n\n| a | b |\n|---|---|\n| 1 | 2 |", "%engine dashboard", "%engine plan smollm2"]
    server.write(
        "axe.ipynb", [ECHO.format(delay=0), *cells, "%load_engine echo:delay=0.05", "%%chat\n" + "word " * 400]
    )
    notebook = browser.open(server, "axe.ipynb")
    notebook.run(0, 1, 2, 3, 4)
    notebook.start(5)
    notebook.cell(5).locator(".kani-strip button").wait_for()
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        set_theme(notebook, theme)
        assert findings(notebook.page, ".kani-strip", least=3) == []
        assert findings(notebook.page, ".kani-nb", least=3) == []
        assert findings(notebook.page, ".js-plotly-plot", least=1) == []
    notebook.press_stop(5)
    notebook.wait_until_done(5)
    browser.assert_quiet()
