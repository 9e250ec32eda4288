"""The pane on a real session: asked, stopped, tried again, edited, gone between branches and conversations."""

import asyncio
import json
import threading

import pytest

from kani_nb.config import EngineConfig
from kani_nb.conversation.tools import APPROVAL_CHOICES, Tools
from kani_nb.engines.base import PrefillProgress
from kani_nb.engines.echo import EchoEngine
from kani_nb.errors import ConfigError, ConversationBusyError, ConversationError, NoEngineError, StoreError
from kani_nb.functions import ai_function
from kani_nb.notebook.panels.answer_feed import AnswerFeed
from kani_nb.notebook.panels.chat_control import CHUNK_TURNS, ChatControl
from kani_nb.notebook.panels.chat_view import leaf_below
from kani_nb.notebook.panels.pane_host import PaneHost
from tests.conversation.calling import Calling


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
        put_together = each["text"] if "prompt" in each else put_together + each.get("text", "")
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
    control.retry(page.turns[1]["id"])
    page.wait_for(lambda state: not state["running"] and len(page.turns[-1]["siblings"]) == 2)
    control.edit(page.turns[1]["id"], "two again")
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
    control.edit(page.turns[0]["id"], "other")
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
    assert page.state["problem"]["gives_back"]
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


def test_what_is_pressed_twice_at_once_begins_one_round(control, page, clean_runtime):
    clean_runtime.load_sync(EngineConfig("echo:delay=0.02"))
    control.ask("word " * 50)
    with pytest.raises(ConversationBusyError, match="is answering"):
        control.ask("word " * 50)
    control.stop()
    page.wait_for(lambda state: not control.is_answering)
    assert not page.state["problem"].get("text", "").startswith("conversation")


def test_an_answer_goes_on_in_the_conversation_that_is_left_and_is_there_when_one_comes_back(
    control, page, clean_runtime
):
    clean_runtime.load_sync(EngineConfig("echo:delay=0.02"))
    first = control.session.conversation.name
    control.ask("word " * 2000)
    page.wait_for(lambda state: state["running"].get("text") or page.deltas)
    left = control.session
    control.new()
    assert (page.state["running"], page.turns) == ({}, [])
    heard = len(page.deltas)
    assert not control.stop(), "the other one's answer is not this one's to stop"
    clean_runtime.use(EchoEngine(reply="at once"), name="quick")
    asked(control, page, "meanwhile")
    assert [turn["answer"] for turn in page.turns] == ["at once"]
    assert not any("word" in delta.get("text", "") for delta in page.deltas[heard:])
    assert left.is_busy, "it goes on meanwhile"
    control.open(first)
    page.wait_for(lambda state: len(state["running"].get("text", "")) > 20)
    assert page.state["around"]["name"] == first
    assert control.stop()
    page.wait_for_end(1)
    assert page.turns[0]["is_cut"]


def test_what_fails_in_the_conversation_that_was_left_is_told_there(control, page, clean_runtime):
    first = control.session.conversation.name
    clean_runtime.use(EchoEngine(delay=0.02, fail_after=20), name="failing")
    control.ask("word " * 50)
    page.wait_for(lambda state: state["running"])
    left = control.session
    control.new()
    while left.is_busy or control._pages[left.conversation.id].round is not None:
        threading.Event().wait(0.01)
    assert page.state["problem"] == {}
    control.open(first)
    assert page.state["problem"]["prompt"].startswith("word word")
    assert page.state["running"] == {}


def test_a_conversation_gets_no_name_that_another_has(control, page, clean_runtime):
    asked(control, page, "precious words")
    control.rename("precious")
    control.new()
    asked(control, page, "scrap")
    with pytest.raises(ConversationError, match="there is a conversation 'precious' already"):
        control.rename(" precious ")
    clean_runtime.delete_chat("precious")
    assert [each["name"] for each in control.list()] == [control.session.conversation.name]


def test_a_conversation_that_was_deleted_is_left_and_does_not_come_back(control, page, clean_runtime):
    asked(control, page, "doomed words")
    doomed = control.session
    clean_runtime.delete_chat(doomed.conversation.name)
    assert control.session is clean_runtime.chat is not doomed
    assert page.turns == []
    with pytest.raises(ConversationError, match="was deleted"):
        doomed.ask_sync("again")
    asked(control, page, "new words")
    assert [each.turns for each in clean_runtime.list_chats(everywhere=True)] == [1]


def test_where_the_store_fails_a_deleted_conversation_is_left_all_the_same(control, page, clean_runtime, monkeypatch):
    asked(control, page, "doomed words")
    doomed = control.session

    def fail(_conversation_id):
        raise StoreError("the disk is full")

    monkeypatch.setattr(clean_runtime.store, "delete", fail)
    with pytest.raises(StoreError):
        clean_runtime.delete_chat(doomed.conversation.name)
    assert control.session is not doomed
    asked(control, page, "goes on")


def test_a_question_whose_pane_is_closed_is_answered_with_no(control, page, clean_runtime):
    ran = []

    @ai_function
    def delete(path: str) -> str:
        """Delete a file."""
        ran.append(path)
        return "deleted"

    clean_runtime.use(Calling([("delete", '{"path": "x"}'), ("delete", '{"path": "y"}')], "done"), name="calling")
    control.session.tools = Tools((delete,))
    control.ask("go")
    page.wait_for(lambda state: state["running"].get("question"))
    session = control.session
    control.close()
    page.wait_for(lambda state: session.turns)
    assert ran == []
    refused, unasked = (message.text for message in session.turns[0].messages if message.is_tool_call_error)
    assert "the user refused to run delete" in refused
    assert "the pane that would ask was closed" in unasked


def test_a_page_is_never_sent_what_it_cannot_take(control, page, clean_runtime):
    half = "\ud83d"
    control.set_system(f"system {half}")
    control.rename(f"name {half}")
    asked(control, page, f"said {half}")
    clean_runtime.engine.fail_after = 1
    control.ask(f"fails {half} and more")
    page.wait_for(lambda state: state["problem"].get("prompt"))
    for each in [*page.changes, *page.deltas, *control.list()]:
        json.dumps(each, ensure_ascii=False).encode()
    assert page.state["around"]["system"] == "system \N{REPLACEMENT CHARACTER}"
    assert page.state["problem"]["prompt"].startswith("fails \N{REPLACEMENT CHARACTER}")


def test_a_turn_is_drawn_once(control, page, clean_runtime):
    asked(control, page, "one")
    first = page.turns[0]
    asked(control, page, "two")
    assert page.turns[0]["pictures"] is first["pictures"]
    control.retry(page.turns[0]["id"])
    page.wait_for(lambda state: not state["running"] and len(page.turns[0]["siblings"]) == 2)
    control.switch(first["id"])
    assert page.turns[0]["pictures"] is first["pictures"]
    assert page.turns[0]["siblings"] != first["siblings"]


def test_while_a_long_prompt_is_read_it_is_not_sent_again():
    now, wholes, deltas = [0.0], [], []
    feed = AnswerFeed("run", "x" * 200_000, send=deltas.append, show=wholes.append, clock=lambda: now[0])
    for done in range(1, 101):
        now[0] += 0.1
        feed.feed(PrefillProgress(done, 100, 0))
        feed.flush()
    sent = sum(len(json.dumps(each)) for each in (*wholes, *deltas))
    assert sent < 300_000, "in ten seconds"
    assert deltas[-1]["status"] == "reading the prompt 100/100 tokens"
    assert len(deltas) > 80


def test_a_second_press_answers_no_question_that_nobody_has_read():
    shown = []

    async def ask_two():
        host = PaneHost(shown.append)
        first = asyncio.ensure_future(host.ask(f"Run read()? {APPROVAL_CHOICES}"))
        await asyncio.sleep(0)
        host.answer(shown[-1]["id"], "y")
        assert await first == "y"
        second = asyncio.ensure_future(host.ask(f"Run delete_everything()? {APPROVAL_CHOICES}"))
        await asyncio.sleep(0)
        host.answer(shown[0]["id"], "y")
        await asyncio.sleep(0)
        assert not second.done()
        host.answer(shown[-1]["id"], "n")
        assert await second == "n"

    asyncio.run(ask_two())
    assert [each["text"] for each in shown if each] == ["Run read()?", "Run delete_everything()?"]


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
