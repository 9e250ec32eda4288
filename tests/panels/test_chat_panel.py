"""The pane as a widget: its messages, its traits, its twin; whatever a page sends, it answers."""

import json
import re
import time
from base64 import b64decode
from types import SimpleNamespace

import pytest

from kani_nb.config import EngineConfig
from kani_nb.conversation.tools import Tools
from kani_nb.functions import ai_function
from kani_nb.messages import ImagePart
from kani_nb.notebook.panels import ChatPanel
from tests.engines.file_server import make_png

PNG = make_png()


@pytest.fixture
def panel(clean_runtime, own_home):
    clean_runtime.load_sync(EngineConfig("echo"))
    made = ChatPanel(rt=clean_runtime)
    made.sent = []
    made.send = lambda content, buffers=None: made.sent.append(content)
    yield made
    made.close()


def wait_for(claim, timeout_s=20):
    ends_at = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < ends_at
        time.sleep(0.01)


def said(panel, **content):
    """What the pane answers to a message."""
    panel._do({"id": "1", **content}, content.pop("buffers", ()))
    return next(each for each in reversed(panel.sent) if each.get("id") == "1")


def test_a_message_is_answered_and_the_answer_comes_into_the_traits(panel):
    assert said(panel, kind="send", text="hello") == {"kind": "done", "id": "1"}
    wait_for(lambda: panel.recent and not panel.running)
    (turn,) = panel.recent
    assert (turn["prompt"], turn["answer"]) == ("hello", "hello")
    json.dumps([panel.history, panel.recent, panel.around, panel.running, panel.problem, panel.notices])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"kind": "dance"}, "'dance' is nothing that the pane does"),
        ({"kind": "retry", "turn": "gone"}, "there is no such turn on this branch"),
        ({"kind": "retry"}, "could not be read"),
        ({"kind": "edit", "turn": "gone", "text": "x"}, "there is no such turn on this branch"),
        ({"kind": "edit", "turn": ["x"]}, "could not be read"),
        ({"kind": "answer", "text": "y"}, "could not be read"),
        ({"kind": "params", "params": 7}, "could not be read"),
        ({"kind": "params", "params": {"seed": float("inf")}}, "seed is inf"),
        ({"kind": "open", "name": "nowhere"}, "there is no conversation 'nowhere'"),
        ({"kind": "switch", "turn": "nothing"}, "no turn"),
        ({"kind": "params", "params": {"top_p": 7}}, "top_p is 7"),
        ({"kind": "params", "params": {"colour": 7}}, "unknown generation parameter 'colour'"),
        ({"kind": "rename", "name": " "}, "needs a name"),
        ({"kind": "rename", "name": "x" * 201}, "has 201 characters, and 200 at most"),
        ({"kind": "send", "text": "x", "files": [{"name": "a", "mime": "image/png"}]}, "could not be read"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_answered_with_the_reason(panel, content, why):
    answer = said(panel, **content)
    assert answer["kind"] == "error"
    assert why in answer["why"]
    assert not panel.running


def test_a_conversation_is_renamed_and_found_by_its_new_name(panel):
    said(panel, kind="send", text="hello")
    wait_for(lambda: panel.recent and not panel.running)
    assert said(panel, kind="rename", name="whales")["kind"] == "done"
    assert panel.around["name"] == "whales"
    (found,) = said(panel, kind="list", query="whal")["chats"]
    assert (found["name"], found["is_current"]) == ("whales", True)


@pytest.mark.parametrize("content", [None, "stop", 7, ["kind"], {}])
def test_what_is_no_message_does_no_harm(panel, content):
    panel._do(content, ())


def test_a_picture_is_sent_with_the_words_and_shown(panel):
    files = [{"name": "dot.png", "mime": "image/png"}]
    assert said(panel, kind="send", text="what is this?", files=files, buffers=[memoryview(PNG)])["kind"] == "done"
    wait_for(lambda: panel.recent and not panel.running)
    (turn,) = panel.recent
    (picture,) = turn["pictures"]
    assert b64decode(picture["source"].removeprefix("data:image/png;base64,")) == PNG
    assert panel.session.turns[0].prompt.content == (ImagePart(PNG, "image/png"), "what is this?")


def test_a_model_that_reads_no_pictures_says_so_and_the_words_can_be_sent_again(panel, clean_runtime, tiny_model):
    clean_runtime.load_sync(EngineConfig(str(tiny_model), device="cpu"))
    files = [{"name": "dot.png", "mime": "image/png"}]
    assert said(panel, kind="send", text="what is this?", files=files, buffers=[memoryview(PNG)])["kind"] == "done"
    wait_for(lambda: panel.problem)
    assert "image" in panel.problem["text"]
    assert panel.problem["prompt"] == "what is this?"
    assert not panel.recent
    assert not panel.session.turns


def test_a_function_is_asked_for_in_the_pane(clean_runtime, own_home):
    from tests.conversation.test_tools import Calling

    ran = []

    @ai_function
    def delete(path: str) -> str:
        """Delete a file."""
        ran.append(path)
        return "deleted"

    for pressed, expected in (("y", ["x"]), ("n", [])):
        ran.clear()
        clean_runtime.use(Calling([("delete", '{"path": "x"}')], "done"), name=f"calling-{pressed}")
        panel = ChatPanel(clean_runtime.new_chat(), rt=clean_runtime)
        panel.session.tools = Tools((delete,))
        panel.ask("go")
        wait_for(lambda panel=panel: panel.running.get("question"))
        question = panel.running["question"]
        assert question["text"] == "Run delete(path='x')?"
        panel._do({"kind": "answer", "id": "2", "question": question["id"], "text": pressed}, ())
        wait_for(lambda panel=panel: panel.recent and not panel.running)
        assert ran == expected
        assert panel.recent[0]["steps"][0]["is_error"] is (pressed == "n")
        panel.close()


def test_the_twin_holds_the_end_of_the_conversation_as_safe_html(panel):
    for text in ("one **two**", "<script>alert(1)</script>"):
        panel.ask(text)
        wait_for(lambda count=text: not panel.is_answering)
    wait_for(lambda: len(panel.session.turns) == 2)
    twin = panel.twin()
    assert "<strong>two</strong>" in twin["text/html"]
    assert "<script" not in twin["text/html"]
    assert "2 turns" in twin["text/plain"]


def test_the_twin_lists_no_headings_and_typesets_the_last_formulas(panel, clean_runtime):
    for number in range(3):
        clean_runtime.engine.reply = f"# Head {number}\n\n" + f"$x_{number}$ " * 60
        panel.ask("go")
        wait_for(lambda count=number: len(panel.session.turns) > count and not panel.is_answering)
    markup = panel.twin()["text/html"]
    assert "<h1" not in markup
    assert markup.count('role="heading" aria-level="1">Head') == 3
    typeset = re.findall(r'class="mathjax_process[^>]*>\\\(x_(\d)', markup)
    assert (len(typeset), typeset.count("2"), typeset.count("1")) == (50, 50, 0)
    assert markup.count(r"\(x_") == 180, "the others stay as their source"


def test_the_output_below_the_pane_follows_the_conversation(panel):
    updates = []
    panel.shown = SimpleNamespace(update=updates.append)
    for text in ("one", "two", "three"):
        panel.ask(text)
        wait_for(lambda: not panel.is_answering)
    assert panel.wait()
    assert 1 <= len(updates) <= 3
    assert "three" in updates[-1]["text/plain"]


def test_a_closed_pane_sends_nothing_and_its_answer_is_kept(panel, clean_runtime):
    clean_runtime.load_sync(EngineConfig("echo:delay=0.02"))
    panel.ask("one two three four")
    wait_for(lambda: panel.running)
    session = panel.session
    panel.close()
    count = len(panel.sent)
    wait_for(lambda: session.turns)
    assert len(panel.sent) == count
