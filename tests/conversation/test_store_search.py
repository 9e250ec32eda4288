"""Conversations are found by their words, whatever the words are."""

import pytest

from kani_nb.conversation.store import ConversationStore
from kani_nb.conversation.tree import Conversation
from tests.conversation.test_store import made_turn, saved


@pytest.fixture
def store(tmp_path):
    with ConversationStore(tmp_path / "home" / "conversations.db") as store:
        yield store


def test_conversations_are_found_by_what_was_said_in_them(store):
    whales = saved(store, created(store, "one", "a.ipynb"), made_turn("tell me of Whales 100%_!"))
    ferns = saved(store, created(store, "two", "b.ipynb"), made_turn("Größe der Farne \ud800"))
    assert store.search("whales") == store.search("WHALES") == {whales.id}
    assert store.search("größe DER") == {ferns.id}
    assert store.search("100%_!") == {whales.id}
    assert store.search("100x") == store.search("%") - {whales.id} == set()
    assert store.search("role") == set(), "a word of the record's form"
    assert store.search("whales", "b.ipynb") == set()
    assert store.search("whales", "a.ipynb") == {whales.id}


def created(store, name, notebook):
    conversation = Conversation.new(name, notebook)
    store.create(conversation)
    return conversation
