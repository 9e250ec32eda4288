"""The pane on a real session: asked, stopped, tried again, edited, gone between branches and conversations."""

import threading

import pytest

from kani_nb.config import EngineConfig
from kani_nb.errors import ConfigError, ConversationBusyError, ConversationError, NoEngineError
from kani_nb.notebook.panels.chat_control import CHUNK_TURNS, ChatControl
from kani_nb.notebook.panels.chat_view import leaf_below


class Page:
    """Keeps the state as a front end would, and every message."""

    def __init__(self):
        self.state = {"running": {}, "problem": {}, "history": [], "recent": []}
        self.changes = []
        self.deltas = []
        self._changed = threading.Condition()

    def show(self, changes):
        with self._changed:
            self.state.update(changes)
            self.changes.append(changes)
            self._changed.notify_all()

    def send(self, delta):
        with self._changed:
            self.deltas.append(delta)

    @property
    def turns(self):
        return [*self.state["history"], *self.state["recent"]]

    def wait_for(self, claim, timeout_s=30):
        with self._changed:
            assert self._changed.wait_for(lambda: claim(self.state), timeout_s), self.state

    def wait_for_end(self, turns):
        self.wait_for(lambda state: not state["running"] and len(self.turns) == turns)


@pytest.fixture
def page():
    return Page()


@pytest.fixture
def control(clean_runtime, page, own_home):
    clean_runtime.load_sync(EngineConfig("echo"))
    made = ChatControl(clean_runtime, page.show, page.send)
    yield made
    made.close()


def asked(control, page, *texts):
    for number, text in enumerate(texts, len(page.turns) + 1):
        control.ask(text)
        page.wait_for_end(number)


def test_what_is_asked_is_answered_and_stands_in_the_conversation(control, page, clean_runtime):
    asked(control, page, "one two", "three")
    assert [(turn["prompt"], turn["answer"]) for turn in page.turns] == [("one two", "one two"), ("three", "three")]
    assert all("tok/s" in turn["stat"] or "tokens" in turn["stat"] for turn in page.turns)
    assert [turn.prompt.text for turn in clean_runtime.chat.turns] == ["one two", "three"]
    assert page.state["around"]["context"]["used"] > 0


def test_an_answer_comes_in_numbered_pieces_that_give_the_whole(control, page, clean_runtime):
    clean_runtime.load_sync(EngineConfig("echo:delay=0.01"))
    text = " ".join(f"word{n}" for n in range(60))
    control.ask(text)
    page.wait_for_end(1)
    wholes = [each["running"] for each in page.changes if each.get("running")]
    assert page.deltas
    assert len({each["run"] for each in (*wholes, *page.deltas)}) == 1
    sequence = sorted([*wholes, *page.deltas], key=lambda each: each["seq"])
    assert [each["seq"] for each in sequence] == list(range(1, len(sequence) + 1))
    put_together = ""
    for each in sequence:
        put_together = each["text"] if "status" in each else put_together + each.get("text", "")
        assert text.startswith(put_together)
    assert len(put_together) > 0.5 * len(text)
    assert len(page.deltas) < 60, "bundled"


def test_stop_keeps_what_has_come(control, page, clean_runtime):
    clean_runtime.load_sync(EngineConfig("echo:delay=0.02"))
    control.ask("word " * 400)
    page.wait_for(lambda state: (state["running"] and len(state["running"]["text"]) > 10) or page.deltas)
    assert control.stop()
    page.wait_for_end(1)
    (turn,) = page.turns
    assert turn["is_cut"]
    assert 0 < len(turn["answer"]) < 5 * 400
    assert not control.stop()


def test_another_answer_and_another_question_are_versions_of_the_turn(control, page):
    asked(control, page, "one", "two")
    control.retry(2)
    page.wait_for(lambda state: not state["running"] and len(page.turns[-1]["siblings"]) == 2)
    control.edit(2, "two again")
    page.wait_for(lambda state: not state["running"] and len(page.turns[-1]["siblings"]) == 3)
    first, last = page.turns
    assert last["prompt"] == "two again"
    assert last["siblings"].index(last["id"]) == 2
    assert first["siblings"] == [first["id"]]
    control.switch(last["siblings"][0])
    page.wait_for(lambda state: page.turns[-1]["prompt"] == "two")
    assert page.state["around"]["branches"] == 3


def test_the_version_that_was_used_last_is_gone_to_with_what_came_after(control, page):
    asked(control, page, "one", "two", "three")
    control.edit(1, "other")
    page.wait_for(lambda state: not state["running"] and len(page.turns) == 1)
    first = page.turns[0]["siblings"][0]
    control.switch(first)
    page.wait_for(lambda state: [turn["prompt"] for turn in page.turns] == ["one", "two", "three"])
    with pytest.raises(ConversationError, match="no turn"):
        leaf_below(control.session.conversation, "nothing")


def test_what_fails_gives_the_words_back(control, page, clean_runtime):
    clean_runtime.engine.fail_after = 1
    control.ask("please one two three")
    page.wait_for(lambda state: state.get("problem", {}).get("text"))
    page.wait_for(lambda state: not state["running"])
    assert page.state["problem"]["prompt"] == "please one two three"
    assert page.turns == []
    clean_runtime.engine.fail_after = None
    asked(control, page, "again")
    assert page.state["problem"] == {}


def test_without_an_engine_nothing_is_begun(control, page, clean_runtime):
    clean_runtime.unload_sync()
    assert page.state["around"]["engine"] == ""
    with pytest.raises(NoEngineError):
        control.ask("hello")
    assert not page.state.get("running")


def test_a_cells_answer_in_the_same_conversation_is_shown(control, page, clean_runtime):
    clean_runtime.chat.ask_sync("from a cell")
    page.wait_for(lambda state: [turn["prompt"] for turn in page.turns] == ["from a cell"])


def test_turns_are_sent_once_and_the_old_ones_again_only_in_chunks(control, page):
    asked(control, page, *(f"turn {n}" for n in range(CHUNK_TURNS + 3)))
    assert len(page.state["history"]) == CHUNK_TURNS
    assert len(page.state["recent"]) == 3
    assert [turn["number"] for turn in page.turns] == list(range(1, CHUNK_TURNS + 4))
    assert sum("history" in each for each in page.changes) == 2


def test_the_settings_are_those_of_the_answers_and_bad_ones_are_refused(control, page, clean_runtime):
    control.set_params({"max_new_tokens": 2, "seed": 7, "temperature": None})
    asked(control, page, "one two three four")
    assert page.turns[0]["answer"].split() == ["one", "two"]
    assert page.turns[0]["stat"].endswith("stopped at the token limit")
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        control.set_params({"max_new_tokens": 0})
    assert page.state["around"]["params"] == {"max_new_tokens": "2", "seed": "7"}


def test_conversations_are_begun_found_and_opened(control, page, clean_runtime):
    asked(control, page, "about whales")
    first = control.session.conversation.name
    control.new()
    assert page.turns == []
    asked(control, page, "about ferns")
    assert [each["name"] for each in control.list()] == [control.session.conversation.name, first]
    assert [each["name"] for each in control.list("WHALES")] == [first]
    assert [each["name"] for each in control.list("role")] == []
    control.open(first)
    assert [turn["prompt"] for turn in page.turns] == ["about whales"]
    control.rename("whales")
    page.wait_for(lambda state: state["around"]["name"] == "whales")
    with pytest.raises(ConversationError):
        control.open("nowhere")
    assert clean_runtime.chat.conversation.name == "whales"


def test_the_system_prompt_is_set_and_taken_away(control, page):
    control.set_system("  be brief ")
    page.wait_for(lambda state: state["around"]["system"] == "be brief")
    control.set_system("  ")
    page.wait_for(lambda state: state["around"]["system"] == "")


def test_a_second_question_while_one_is_answered_is_refused(control, page, clean_runtime):
    clean_runtime.load_sync(EngineConfig("echo:delay=0.02"))
    control.ask("word " * 200)
    page.wait_for(lambda state: state["running"])
    with pytest.raises(ConversationBusyError, match="is answering"):
        control.ask("impatient")
    page.wait_for(lambda state: state["running"].get("text"))
    control.stop()
    page.wait_for_end(1)


def test_a_stop_before_the_first_word_gives_the_words_back(control, page, clean_runtime):
    clean_runtime.load_sync(EngineConfig("echo:delay=5"))
    control.ask("never mind")
    page.wait_for(lambda state: state["running"])
    control.stop()
    page.wait_for(lambda state: state["problem"].get("prompt") == "never mind")
    assert "nothing was added" in page.state["problem"]["text"]
    assert page.turns == []
