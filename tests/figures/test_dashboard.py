"""The live figure: the conversation's own traces, redrawn in place without a new widget."""

import pytest

from kani_nb.figures.conversation import conversation_json
from kani_nb.figures.dashboard import LiveFigure
from tests.figures.test_conversation_figure import turn


@pytest.fixture
def figure():
    made = LiveFigure([])
    yield made
    made.close()


def test_it_begins_empty_and_follows_each_answer(figure):
    assert all(len(trace.y) == 0 for trace in figure.widget.data)
    traces = figure.widget.data
    for count in (1, 2, 5):
        metrics = [turn(number) for number in range(1, count + 1)]
        figure.draw(metrics)
        expected = conversation_json(metrics)["data"]
        assert [trace.name for trace in figure.widget.data] == [trace["name"] for trace in expected]
        assert [list(trace.y) for trace in figure.widget.data] == [trace["y"] for trace in expected]
        assert all(now is before for now, before in zip(figure.widget.data, traces, strict=True)), "drawn anew in place"
        for axis in ("xaxis", "yaxis3"):
            assert list(figure.widget.layout[axis].range) == conversation_json(metrics)["layout"][axis]["range"]
    figure.draw([])
    assert all(len(trace.y) == 0 for trace in figure.widget.data)


def test_closing_twice_does_no_harm(figure):
    figure.close()
    figure.close()
