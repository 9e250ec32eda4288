"""How a panel stands in a cell: the widget without words of its own, then the twin; and where it has no place."""

import sys
import types

import pytest

from kani_nb.errors import ConfigError
from kani_nb.notebook.panels.showing import ShownPanel, can_show_panel, need_place_for_panel


class Widget:
    def _repr_mimebundle_(self, **_):
        return {"application/vnd.jupyter.widget-view+json": {"model_id": "m"}, "text/plain": "Widget(everything=...)"}


@pytest.fixture
def displayed(monkeypatch):
    import IPython.display

    shown = []

    class Handle:
        def update(self, bundle, raw):
            shown.append(("update", bundle))

    def display(bundle, **_):
        shown.append(("display", bundle))
        return Handle()

    monkeypatch.setattr(IPython.display, "display", display)
    return shown


def test_the_widget_comes_first_and_its_twin_can_be_replaced(displayed):
    panel = ShownPanel(Widget(), {"text/html": "<p>one</p>", "text/plain": "one"})
    panel.update({"text/html": "<p>two</p>", "text/plain": "two"})
    (_, widget), (_, twin), (kind, later) = displayed
    assert widget == {"application/vnd.jupyter.widget-view+json": {"model_id": "m"}, "text/plain": ""}
    assert twin["text/plain"] == "one"
    assert '<div class="kani-twin"><p>one</p></div>' in twin["text/html"]
    assert (kind, later["text/plain"]) == ("update", "two")


def test_colab_is_asked_to_draw_widgets(displayed, monkeypatch):
    asked = []
    colab = types.ModuleType("google.colab")
    colab.output = types.SimpleNamespace(enable_custom_widget_manager=lambda: asked.append(True))
    google = types.ModuleType("google")
    google.colab = colab
    monkeypatch.setitem(sys.modules, "google", google)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    ShownPanel(Widget(), {"text/plain": "one"})
    assert asked == [True]


@pytest.mark.parametrize(
    ("kernel", "software", "can"),
    [
        (types.SimpleNamespace(_allow_stdin=True), "", True),
        (types.SimpleNamespace(_allow_stdin=False), "", False),  # nbconvert, nbclient: nobody is there
        (types.SimpleNamespace(_allow_stdin=False), "voila/0.5.13", True),
        (None, "", False),
    ],
    ids=["a notebook", "executed by a program", "Voila", "a terminal"],
)
def test_a_panel_is_shown_where_it_can_be_pressed(monkeypatch, kernel, software, can):
    monkeypatch.setenv("SERVER_SOFTWARE", software)
    shell = types.SimpleNamespace(kernel=kernel, user_ns={}, display_pub=object())
    assert can_show_panel(shell) is can
    if not can:
        with pytest.raises(ConfigError, match=r"no place for a panel here: nobody could press it"):
            need_place_for_panel(shell, "%load_engine MODEL")
