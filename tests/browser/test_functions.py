"""Functions, attachments and reasoning as a person sees them: folded steps, the question before a call, a picture."""

from __future__ import annotations

import pytest

from tests.browser.front_end import Chromium
from tests.browser.jupyter import JupyterServer
from tests.engines.media_models import png

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

SETUP = """%load_ext kani_nb
import time, kani_nb
from kani_nb import ai_function
from kani_nb.engines.scripted import ScriptedEngine
from kani_nb.messages import ChatMessage, FunctionCall, ReasoningPart

@ai_function(read_only=True)
def people(city: str) -> int:
    "How many people live in a city."
    return {"Paris": 2_103_000}[city]

def forget(city: str) -> str:
    "Forget a city."
    return f"{city} is forgotten"

rt = kani_nb.runtime()
thought = ChatMessage.assistant((ReasoningPart("First I <b>look</b> it up."), "Paris has 2.1 million people."))
rt.use(ScriptedEngine(FunctionCall.with_args("people", city="Paris"), thought), name="scripted")"""
ASK = "%%chat --tools people\nHow large is Paris?"
CARELESS = (
    'rt.use(ScriptedEngine(FunctionCall.with_args("forget", city="Lyon"), "Done."), name="careless")\n%chat new two'
)
FORGET = "%%chat --tools forget\nForget Lyon."
PICTURE = 'rt.use(ScriptedEngine("Noise."), name="seeing")\n%chat new three'
SHOW = "%%chat -a noise.png\nWhat is this?"


def test_steps_are_folded_and_a_call_waits_for_the_persons_word(server: JupyterServer, browser: Chromium, artifacts):
    server.write("functions.ipynb", [SETUP, ASK, CARELESS, FORGET, PICTURE, SHOW])
    (server.root / "noise.png").write_bytes(png(width=400, height=300))
    notebook = browser.open(server, "functions.ipynb")
    notebook.run(0, 1)
    cell = notebook.cell(1)
    steps = cell.locator(".kani-nb-answer details")
    assert steps.count() == 2
    assert steps.nth(0).locator("summary").inner_text() == "Reasoning"
    assert steps.nth(1).locator("summary").inner_text() == 'people(city="Paris") → 2103000'
    assert not steps.nth(1).locator("pre").first.is_visible()
    steps.nth(1).locator("summary").click()
    assert steps.nth(1).locator("pre").first.is_visible()
    steps.nth(0).locator("summary").click()
    assert "First I <b>look</b> it up." in steps.nth(0).inner_text()
    assert "Paris has 2.1 million people." in notebook.answer(1)

    notebook.run(2)
    notebook.start(3)
    question = notebook.cell(3).locator(".jp-Stdin-input, input.jp-Stdin-input").first
    question.wait_for(state="visible")
    assert "Run forget(city='Lyon')?" in notebook.cell(3).inner_text()
    question.fill("y")
    question.press("Enter")
    notebook.wait_until_done(3)
    assert 'forget(city="Lyon") → Lyon is forgotten' in notebook.cell(3).inner_text()

    notebook.run(4, 5)
    picture = notebook.cell(5).locator(".kani-nb-user img")
    picture.wait_for(state="visible")
    assert picture.get_attribute("alt")
    assert picture.bounding_box()["width"] <= 400
    notebook.page.screenshot(path=artifacts / f"functions-{server.kind}.png", full_page=True)
    browser.assert_quiet()

    notebook.save()
    notebook.close()
    server.stop_kernels()
    again = browser.open(server, "functions.ipynb", has_kernel=server.kind != "lab")
    assert "people(city=" in again.cell(1).locator(".kani-nb-answer").inner_text()
    assert again.cell(5).locator(".kani-nb-user img").count() == 1
