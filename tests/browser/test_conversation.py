"""The main job as a person does it, in JupyterLab and in Notebook 7: load, ask, ask again, stop, save, come back."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from tests.browser.front_end import Chromium, OpenNotebook
from tests.browser.jupyter import JupyterServer

pytestmark = [pytest.mark.browser, pytest.mark.timeout(240), pytest.mark.usefixtures("smollm2")]

LOAD = "%load_ext kani_nb\n%load_engine smollm2"
CAPITAL = "%%chat --no-sample --max-new-tokens 48\nWhat is the capital of France?"
FACTS = "%%chat --no-sample --max-new-tokens 48\nTell me three facts about that city."
STORY = "%%chat --no-sample --max-new-tokens 400 --min-new-tokens 400\nTell me a very long story."
WIDGET = "application/vnd.jupyter.widget-view+json"
#: Generous: a slow machine fails nothing here. The time itself is printed, and the timing suite holds the limit.
ENDS_WITHIN_MS = 3000


def stat_line_of(notebook: OpenNotebook, index: int) -> str:
    return notebook.cell(index).locator(".kani-nb-stat").last.inner_text()


def assert_figure(notebook: OpenNotebook, index: int) -> None:
    figure = notebook.cell(index).locator(".jp-RenderedPlotly")
    figure.locator(".main-svg, img").first.wait_for(state="visible")
    box = figure.bounding_box()
    assert box["height"] > 150 and box["width"] > 300


def test_two_cells_hold_one_conversation_that_can_be_read_later(server: JupyterServer, browser: Chromium, smollm2):
    server.write("two.ipynb", [LOAD, CAPITAL, FACTS])
    notebook = browser.open(server, "two.ipynb")
    notebook.run(0, 1)
    assert "Paris" in notebook.answer(1)

    notebook.watch(2)
    notebook.run(2)
    answer, frames = notebook.answer(2), notebook.frames
    assert "Paris" in answer
    assert len(set(frames)) >= 5
    assert frames[-1] == answer
    assert re.search(r"tokens · .*[1-9]\d* of \d+ prompt tokens cached", stat_line_of(notebook, 2))
    assert_figure(notebook, 2)
    answers = {1: notebook.answer(1), 2: answer}
    for index in answers:  # nothing is left of the strip: the answer, and the figure in the strip's place
        assert len(notebook.outputs(index)) == 2
        assert notebook.cell(index).locator(".kani-strip").count() == 0

    saved = notebook.save()
    text = json.dumps(saved)
    print(f"\n{server.kind}: {len(set(frames))} frames; saved notebook with two answers: {len(text):,} characters")
    assert WIDGET not in text and "widgets" not in saved["metadata"]
    assert len(text) < 200_000
    notebook.close()
    server.stop_kernels()

    # JupyterLab without a kernel; Notebook 7, which always starts one, with a fresh one.
    again = browser.open(server, "two.ipynb", has_kernel=server.kind != "lab")
    for index, words in answers.items():
        assert again.answer(index) == words
        assert again.cell(index).locator(".kani-nb-md").is_visible()
        assert "tok/s" in stat_line_of(again, index)
        assert_figure(again, index)
    assert again.page.evaluate("kn.status() ?? 'none'") == ("none" if server.kind == "lab" else "idle")
    browser.assert_quiet()

    convert = [sys.executable, "-m", "nbconvert", "--to", "html", "two.ipynb", "--log-level", "ERROR"]
    subprocess.run(convert, cwd=server.root, check=True, timeout=120)
    page = browser.new_page()
    page.goto((server.root / "two.html").as_uri(), wait_until="domcontentloaded")
    shown = page.inner_text("body")
    for words in answers.values():
        assert words.split("\n")[0] in shown
    assert shown.count("tok/s") == 2
    figures = page.locator(".jp-OutputArea-output svg, .jp-OutputArea-output img[src^='data:image/svg']")
    assert figures.count() == 2
    page.close()


def test_stop_and_interrupt_end_an_answer_and_keep_what_was_said(server: JupyterServer, browser: Chromium, smollm2):
    server.write("stop.ipynb", [LOAD, STORY, CAPITAL, "%chat history", STORY, "reached = True"])
    notebook = browser.open(server, "stop.ipynb")
    notebook.run(0)

    notebook.start(1)
    notebook.wait_for(lambda: len(notebook.answer(1)) > 40)
    seen = notebook.answer(1)
    clicked = notebook.press_stop(1)
    stop_ms = notebook.wait_until_done(1) - clicked
    assert stop_ms < ENDS_WITHIN_MS
    stopped = notebook.answer(1)
    assert stopped.startswith(seen[:40])
    assert stat_line_of(notebook, 1).endswith("· stopped")
    assert [output["output_type"] for output in notebook.outputs(1)] == ["display_data", "display_data"]
    assert notebook.cell(1).locator(".jp-RenderedSVG img, .jp-RenderedSVG svg").is_visible()

    notebook.run(2, 3)
    assert "Paris" in notebook.answer(2)
    assert "2 turns" in notebook.shown(3) and "[interrupted]" in notebook.shown(3)

    # Run All from the top: the first story again, and an interrupt while it is told.
    notebook.start_all()
    notebook.wait_for(lambda: "answering" in notebook.shown(1) and len(notebook.answer(1)) > 40)
    # The strip does not make the kernel look idle. (A page's very first widget does, whosever it is.)
    assert notebook.page.evaluate("kn.status()") == "busy"
    asked = notebook.interrupt()
    interrupt_ms = notebook.wait_until_done("all") - asked
    print(f"\n{server.kind}: Stop to the end of the cell {stop_ms:.0f} ms, interrupt {interrupt_ms:.0f} ms")
    assert interrupt_ms < ENDS_WITHIN_MS
    assert len(notebook.answer(1)) > 40
    errors = [output for output in notebook.outputs(1) if output["output_type"] == "error"]
    assert len(errors) == 1
    said = notebook.cell(1).locator("[data-mime-type='application/vnd.jupyter.stderr']").inner_text().strip()
    assert "kept" in said and "\n" not in said
    assert notebook.outputs(5) == [] and notebook.cell(5).locator(".jp-InputPrompt").inner_text().strip() == "[ ]:"

    after = notebook.add(CAPITAL)
    notebook.run(after)
    assert "Paris" in notebook.answer(after)
    browser.assert_quiet()


def test_a_page_reloaded_in_mid_answer_loses_nothing_of_it(server: JupyterServer, browser: Chromium):
    words = [f"word{number}" for number in range(140)]
    ask = "%%chat\n" + " ".join(words)
    server.write("reload.ipynb", ["%load_ext kani_nb\n%load_engine echo:delay=0.05", ask])
    notebook = browser.open(server, "reload.ipynb")
    notebook.run(0)
    notebook.start(1)
    notebook.wait_for(lambda: "word5" in notebook.answer(1))
    notebook.reload()
    assert notebook.page.evaluate("kn.status()") != "idle"  # a busy kernel does not answer the new page yet

    notebook.wait_until_idle()
    show = notebook.add("%chat show")
    notebook.run(show)
    assert notebook.answer(show).split() == words
    assert "140 tokens" in notebook.shown(show)
    # The one thing that JupyterLab itself says when a kernel closes a widget of before the reload.
    browser.complaints = [each for each in browser.complaints if "Comm not found for comm id" not in each]
    browser.assert_quiet()
