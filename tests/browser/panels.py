"""The panels on a page, as a person sees and presses them, whatever front end shows the page."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

AXE = Path(__file__).parents[2] / "js" / "node_modules" / "axe-core" / "axe.min.js"
HAS_BEGUN = "() => (document.querySelector('.kn-running .kn-md')?.textContent ?? '').length > 30"


class Pane:
    """The chat pane on a page."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.box = self.page.get_by_label("Message")
        self.stop = self.page.get_by_role("region", name="Chat").get_by_role("button", name="Stop")
        self.turns = self.page.locator(".kn-chat .kn-turn:not(.kn-running)")

    def ask(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def wait_for_turns(self, count: int, timeout_s: float = 60) -> None:
        self.page.wait_for_function(
            "(count) => document.querySelectorAll('.kn-chat .kn-turn:not(.kn-running)').length === count"
            " && !document.querySelector('.kn-running')",
            arg=count,
            timeout=timeout_s * 1000,
        )

    def answer(self, number: int) -> str:
        """What stands as the answer of turn `number`, from 1."""
        return str(self.turns.nth(number - 1).locator(".kn-md").inner_text())


def findings(page: Any, selector: str, least: int = 10) -> list[str]:
    """What axe-core finds serious or critical in a part of the page, where at least so many of its rules held."""
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: npm --prefix js ci")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    report = page.evaluate("(selector) => axe.run(selector, {resultTypes: ['violations', 'passes']})", selector)
    assert len(report["passes"]) >= least, f"axe found little to look at in {selector}: {len(report['passes'])} rules"
    return [
        f"{each['id']}: {node['target']} {node['failureSummary']}"
        for each in report["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def tell_story(page: Any, picture: Callable[[str], object]) -> None:
    """Choose smollm2, nf4 and the CPU, watch the plan, load, chat three turns with a Stop in the second, unload.

    By clicking and typing alone, on a page with an engine panel and a chat pane.

    Args:
        picture: takes a picture of the page as it is, with the step's name.
    """
    engine = page.get_by_role("region", name="Engine", exact=True)
    engine.get_by_label("Model").fill("smollm2")
    engine.get_by_label("Model").press("Tab")
    verdict = engine.locator(".kn-verdict")
    page.wait_for_function("() => document.querySelector('.kn-verdict')?.textContent.includes('Fits')", timeout=60_000)
    before = verdict.inner_text()
    engine.get_by_label("Scheme").select_option("nf4")
    wait_for(page, lambda: "nf4" in verdict.inner_text())
    assert verdict.inner_text() != before
    engine.get_by_label("Place", exact=True).select_option("on:cpu")
    line = engine.get_by_role("group", name="The same as a magic line")
    wait_for(page, lambda: line.inner_text().strip() == "%load_engine smollm2 --quant=nf4 --device=cpu")
    picture("1-planned")
    engine.get_by_role("button", name="Load", exact=True).click()
    page.wait_for_selector(".kn-engine >> text=loaded in", timeout=120_000)
    picture("2-loaded")
    pane = Pane(page)
    wait_for(page, lambda: "smollm2" in page.locator(".kn-title").inner_text())
    pane.ask("What is the capital of France?")
    pane.wait_for_turns(1)
    assert "Paris" in pane.answer(1)
    pane.ask("Tell me everything about that city, at great length.")
    page.wait_for_function(HAS_BEGUN)
    picture("3-answering")
    pane.stop.click()
    pane.wait_for_turns(2)
    assert "stopped" in pane.turns.nth(1).locator(".kn-stat").inner_text()
    pane.ask("In one word?")
    pane.wait_for_turns(3)
    picture("4-talked")
    engine.get_by_role("button", name="Unload smollm2").click()
    page.wait_for_selector(".kn-engine >> text=is unloaded", timeout=60_000)
    assert "freed" in engine.inner_text()
    picture("5-unloaded")


def wait_for(page: Any, claim: Callable[[], object], timeout_s: float = 30) -> None:
    """Wait until `claim()` is true."""
    ends_at = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < ends_at, f"not within {timeout_s} s"
        page.wait_for_timeout(30)
