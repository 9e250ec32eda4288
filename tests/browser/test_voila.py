"""The panels in Voila, which shows a notebook's outputs as a page: nobody there can run a cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser.front_end import Chromium
from tests.browser.jupyter import JupyterServer
from tests.browser.panels import findings, tell_story

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


def test_the_panels_are_used_by_clicking_in_voila(voila: JupyterServer, browser: Chromium, artifacts: Path):
    voila.write("story.ipynb", ["%load_ext kani_nb\n%load_engine", "%chat panel", "%engine dashboard"])
    page = browser.new_page()
    page.goto(voila.url("story.ipynb"))
    page.wait_for_selector(".kn-chat", timeout=60_000)
    page.wait_for_selector(".plotly .main-svg", timeout=60_000)
    tell_story(page, lambda step: page.screenshot(path=artifacts / f"panels-voila-{step}.png"))
    assert "first text" in page.locator(".js-plotly-plot").last.inner_text()
    assert findings(page, ".kn-chat") == []
    assert findings(page, ".kn-engine") == []
    browser.assert_quiet()
