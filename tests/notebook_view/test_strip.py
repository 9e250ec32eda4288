"""What the strip leaves behind in real kernels: what took its place, and no widget."""

from __future__ import annotations

import time

import pytest

from tests.kernels.driver import VERSIONS, kernel

pytestmark = pytest.mark.kernels

OPEN_AND_CLOSE = """
from IPython import get_ipython
from kani_nb.notebook.stop_bus import StopBus
from kani_nb.notebook.strip import LiveStrip
strip = LiveStrip(lambda: None, StopBus(get_ipython()), shown_after_s=0, linger_s=0.5)
strip.open()
strip.update("answering")
print(len(get_ipython().kernel.comm_manager.comms))
strip.close({"text/plain": "what took its place"})
"""
SHORT = """
from IPython import get_ipython
from kani_nb.notebook.stop_bus import StopBus
from kani_nb.notebook.strip import LiveStrip
strip = LiveStrip(lambda: None, StopBus(get_ipython()))
strip.open()
strip.update("answering")
print(strip.is_open, len(get_ipython().kernel.comm_manager.comms))
strip.close({"text/plain": "the numbers"})
strip.close({"text/plain": "once more"})
print(strip.is_open)
"""
OPEN_COMMS = "len(get_ipython().kernel.comm_manager.comms)"


@pytest.mark.parametrize("name", VERSIONS)
def test_its_output_is_replaced_and_its_widget_closed(name):
    with kernel(name) as running:
        outcome = running.run(OPEN_AND_CLOSE)
        assert outcome.status == "ok", outcome.text
        shown, printed = outcome.outputs
        assert shown["data"] == {"text/plain": "what took its place"}
        assert int(printed["text"]) > 0
        end = time.monotonic() + 20
        while running.value(OPEN_COMMS) != "0":
            assert time.monotonic() < end


def test_an_answer_that_is_over_at_once_makes_no_widget():
    with kernel() as running:
        outcome = running.run(SHORT)
        assert outcome.status == "ok", outcome.text
        assert outcome.text.split("\n") == ["True 0", "", "the numbers", "False", ""]
