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
    assert figure.widget.data == ()
    for count in (1, 2, 5):
        metrics = [turn(number) for number in range(1, count + 1)]
        figure.draw(metrics)
        expected = conversation_json(metrics)["data"]
        assert [trace.name for trace in figure.widget.data] == [trace["name"] for trace in expected]
        assert [list(trace.y) for trace in figure.widget.data] == [trace["y"] for trace in expected]
    first = figure.widget.data[0]
    figure.draw([turn(1)])
    assert figure.widget.data[0] is first, "redrawn, not made anew"
    figure.draw([])
    assert figure.widget.data == ()


def test_closing_twice_does_no_harm(figure):
    figure.close()
    figure.close()
