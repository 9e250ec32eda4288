"""The store: transactions, versions, what is broken, several processes, and the journal of a killed one."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from kani_nb.conversation import database
from kani_nb.conversation.store import ConversationStore, default_store_path
from kani_nb.conversation.tree import CellRef, Conversation, Turn, new_id
from kani_nb.errors import ConversationError, StoreError
from kani_nb.messages import ChatMessage, ImagePart


@pytest.fixture
def store(tmp_path):
    with ConversationStore(tmp_path / "home" / "conversations.db") as store:
        yield store


def made_turn(text, parent=None, **fields):
    return Turn(
        new_id(),
        parent,
        (ChatMessage.user(text), ChatMessage.assistant(text.upper())),
        created_at=time.time(),
        **fields,
    )


def saved(store, conversation, turn):
    conversation = conversation.with_turn(turn)
    store.save_turn(conversation.id, turn, conversation.head)
    return conversation


def run_python(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(database.__file__).parents[2])},
        **options,
    )


def test_what_was_saved_is_loaded_equal(store):
    conversation = Conversation.new("trip", "notes/trip.ipynb", "be brief")
    store.create(conversation)
    first = made_turn("a", cell=CellRef("c", "e"), model="echo", metrics={"ttft_s": 0.1})
    conversation = saved(store, conversation, first)
    conversation = saved(store, conversation, made_turn("b", first.id, interrupted=True))
    conversation = saved(store, conversation, made_turn("c", first.id))
    store.close()
    again = store.load(conversation.id)
    assert again == conversation
    assert list(again.turns) == list(conversation.turns)


@pytest.mark.parametrize("text", ["\ud800", "\ud83d\ude00", "a\x00b", "\udcff{{$", "\u2028\r\n"])
def test_text_that_is_no_valid_unicode_comes_back_equal(store, text):
    conversation = Conversation.new("n" + text, "path" + text, text)
    store.create(conversation)
    messages = (ChatMessage.user((text, ImagePart(b"\xff\x00", "image/png"))), ChatMessage.assistant(text))
    turn = Turn(new_id(), None, messages, CellRef(text, text), 1.0, model=text)
    conversation = saved(store, conversation, turn)
    assert store.load(conversation.id) == conversation
    assert store.conversations("path" + text)[0].name == "n" + text


def test_conversations_are_listed_by_notebook_the_latest_used_first(store):
    one, two, other = Conversation.new("one", "nb"), Conversation.new("two", "nb"), Conversation.new("x", "other")
    for each in (one, two, other):
        store.create(each)
    store.save_turn(one.id, replace(made_turn("a"), created_at=time.time() + 5), None)
    assert [(each.name, each.turns) for each in store.conversations("nb")] == [("one", 1), ("two", 0)]
    assert len(store.conversations()) == 3


def test_names_system_prompts_and_heads_can_be_changed_and_conversations_deleted(store):
    conversation = Conversation.new("old")
    store.create(conversation)
    conversation = saved(store, conversation, made_turn("a"))
    store.update(conversation.id, name="new", system="short")
    store.set_head(conversation.id, None)
    assert store.load(conversation.id) == conversation.renamed("new").with_system("short").moved_to(None)
    store.delete(conversation.id)
    for call in (
        lambda: store.load(conversation.id),
        lambda: store.delete(conversation.id),
        lambda: store.set_head(conversation.id, None),
        lambda: store.save_turn(conversation.id, made_turn("a"), None),
        lambda: store.journal(conversation.id, made_turn("a")),
    ):
        with pytest.raises(ConversationError, match="there is no conversation"):
            call()


def test_create_completes_what_is_missing_and_repeats_nothing(store):
    conversation = Conversation.new("x")
    conversation = conversation.with_turn(made_turn("a"))
    store.create(conversation)
    conversation = conversation.with_turn(made_turn("b", conversation.head))
    store.create(conversation)
    store.create(conversation)
    assert store.load(conversation.id) == conversation


def test_a_save_is_whole_or_nothing(store):
    conversation = Conversation.new("x")
    store.create(conversation)
    with sqlite3.connect(store.path) as other:
        other.execute("CREATE TRIGGER no BEFORE INSERT ON turns BEGIN SELECT RAISE(ABORT, 'refused'); END")
    other.close()
    turn = made_turn("a")
    with pytest.raises(StoreError, match="refused"):
        store.save_turn(conversation.id, turn, turn.id)
    assert store.load(conversation.id) == conversation


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_only_the_user_can_read_the_store(store):
    store.conversations()
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(store.path.parent.stat().st_mode) == 0o700


def test_the_store_opens_lazily_closes_twice_and_opens_again(tmp_path):
    store = ConversationStore(tmp_path / "c.db")
    assert not store.path.exists()
    store.close()
    store.create(Conversation.new("x"))
    store.close()
    store.close()
    assert len(store.conversations()) == 1
    store.close()


def test_kani_nb_home_moves_the_store(monkeypatch, tmp_path):
    monkeypatch.setenv("KANI_NB_HOME", str(tmp_path / "elsewhere"))
    assert default_store_path() == tmp_path / "elsewhere" / "conversations.db"
    monkeypatch.delenv("KANI_NB_HOME")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert default_store_path() == tmp_path / "kani_nb" / "conversations.db"


def test_the_journal_mode_is_wal_and_a_rollback_journal_on_network_file_systems(monkeypatch, tmp_path):
    def mode(name):
        store = ConversationStore(tmp_path / name)
        store.create(Conversation.new("x"))
        store.close()
        connection = sqlite3.connect(store.path)
        (found,) = connection.execute("PRAGMA journal_mode").fetchone()
        connection.close()
        return found

    assert mode("local.db") == "wal"
    import psutil

    mounts = [type("Mount", (), {"mountpoint": str(tmp_path), "fstype": "nfs4"})]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert mode("remote.db") == "delete"


# What is broken.


def test_a_corrupt_file_is_refused_with_the_way_to_move_it_aside_and_left_as_it_is(tmp_path):
    path = tmp_path / "c.db"
    path.write_bytes(b"this is not a database, not at all" * 100)
    store = ConversationStore(path)
    with pytest.raises(StoreError, match=r"corrupt.*\n.*mv .*c\.db .*c\.db\.corrupt"):
        store.conversations()
    assert path.read_bytes().startswith(b"this is not")


def test_a_file_that_was_cut_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "c.db"
    with ConversationStore(path) as store:
        conversation = Conversation.new("x")
        store.create(conversation)
        for _ in range(50):
            conversation = saved(store, conversation, made_turn("long " * 500, conversation.head))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with ConversationStore(path) as store, pytest.raises(StoreError, match="corrupt"):
        store.load(conversation.id)
    assert path.stat().st_size == len(data) // 2


def test_a_store_of_a_newer_version_is_refused_naming_both_versions(tmp_path):
    path = tmp_path / "c.db"
    ConversationStore(path).conversations()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    ours = len(database.MIGRATIONS)
    with pytest.raises(StoreError, match=rf"version 99: .* up to {ours}\n.*upgrade"):
        ConversationStore(path).conversations()


def test_another_programs_database_is_left_alone(tmp_path):
    path = tmp_path / "c.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmarks (url TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="another program"):
        ConversationStore(path).conversations()
    assert path.read_bytes() == before


def test_a_file_of_an_older_version_is_migrated_once(tmp_path, monkeypatch):
    path = tmp_path / "c.db"
    conversation = Conversation.new("x")
    with ConversationStore(path) as store:
        store.create(conversation)
    monkeypatch.setattr(database, "MIGRATIONS", (*database.MIGRATIONS, "CREATE TABLE tags (name TEXT)"))
    for _ in range(2):
        with ConversationStore(path) as store:
            assert store.load(conversation.id) == conversation
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (len(database.MIGRATIONS),)
    connection.close()


def test_a_store_that_cannot_be_made_says_how_to_move_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="KANI_NB_HOME"):
        ConversationStore(tmp_path / "file" / "c.db").conversations()
    with pytest.raises(StoreError, match="KANI_NB_HOME"):
        ConversationStore(tmp_path).conversations()


def test_a_store_that_another_program_holds_is_an_error_that_says_so(store, monkeypatch):
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.1)
    store.create(Conversation.new("x"))
    store.close()
    holder = sqlite3.connect(store.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreError, match="another program has held it"):
        store.create(Conversation.new("y"))
    holder.execute("ROLLBACK")
    holder.close()
    store.create(Conversation.new("y"))


def test_a_full_disk_is_an_error_that_says_so_and_loses_nothing(store):
    conversation = Conversation.new("x")
    store.create(conversation)
    with store._open() as connection:  # a real limit of SQLite's own, on this connection alone
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages + 1}")
    with pytest.raises(StoreError, match="disk is full"):
        store.save_turn(conversation.id, made_turn("long" * 10_000), None)
    assert store.load(conversation.id) == conversation


# Several users.


def test_threads_share_one_store(store):
    conversation = Conversation.new("x")
    store.create(conversation)

    def append():
        for _ in range(20):
            store.save_turn(conversation.id, made_turn("a"), None)

    threads = [threading.Thread(target=append) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.load(conversation.id).turns) == 80


def test_two_processes_append_to_one_new_store_and_nothing_is_lost(tmp_path):
    code = """
        import sys, time
        from kani_nb.conversation.store import ConversationStore
        from kani_nb.conversation.tree import Conversation, Turn, new_id
        from kani_nb.messages import ChatMessage
        store, name = ConversationStore(sys.argv[1]), sys.argv[2]
        shared = Conversation("shared", "shared")
        store.create(shared)
        head = None
        for number in range(60):
            turn = Turn(new_id(), head, (ChatMessage.user(f"{name}{number}"),), created_at=time.time())
            store.save_turn("shared", turn, turn.id)
            head = turn.id
        store.close()
    """
    children = [run_python(code, tmp_path / "c.db", name) for name in "ab"]
    assert [child.wait(60) for child in children] == [0, 0]
    for child in children:
        child.stdout.close()
    with ConversationStore(tmp_path / "c.db") as store:
        conversation = store.load("shared")
    said = [turn.prompt.text for turn in conversation.turns.values()]
    for name in "ab":
        assert [text for text in said if text[0] == name] == [f"{name}{number}" for number in range(60)]
    assert len(conversation.branches()) == 2


# The journal.


def test_a_journal_entry_of_a_living_process_is_left_alone_and_ends_with_its_turn(store):
    conversation = Conversation.new("x")
    store.create(conversation)
    turn = made_turn("a", interrupted=True)
    store.journal(conversation.id, turn)
    assert store.recover() == []
    store.save_turn(conversation.id, replace(turn, interrupted=False), turn.id)
    store.journal(conversation.id, turn)  # a late write must not bring it back
    with closing(sqlite3.connect(store.path)) as connection:
        assert connection.execute("SELECT count(*) FROM journal").fetchone() == (0,)
    assert store.load(conversation.id).turns[turn.id].interrupted is False


def journalled_by_another(store, conversation, turn, **owner):
    store.journal(conversation.id, turn)
    with closing(sqlite3.connect(store.path)) as connection, connection:
        for column, value in owner.items():
            connection.execute(f"UPDATE journal SET {column} = ? WHERE turn_id = ?", (value, turn.id))


@pytest.mark.parametrize(
    ("owner", "is_dead"),
    [
        ({}, False),
        ({"process_started_at": 1.0}, True),
        ({"pid": 2**22 + 7}, True),
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "written_at": time.time() - 90}, True),
    ],
)
def test_only_the_answers_of_dead_processes_are_recovered(store, owner, is_dead):
    conversation = Conversation.new("x")
    store.create(conversation)
    turn = made_turn("a")
    journalled_by_another(store, conversation, turn, **owner)
    assert store.recover() == ([replace(turn, interrupted=True)] if is_dead else [])
    assert store.load(conversation.id).head == (turn.id if is_dead else None)
    assert store.recover() == []


def test_a_head_that_has_moved_on_stays_where_it_is(store):
    conversation = Conversation.new("x")
    store.create(conversation)
    lost = made_turn("lost")
    journalled_by_another(store, conversation, lost, process_started_at=1.0)
    conversation = saved(store, conversation, made_turn("kept"))
    again = store.load(conversation.id)
    assert again.head == conversation.head
    assert again.turns[lost.id].interrupted


def test_an_answer_without_text_is_not_recovered(store):
    conversation = Conversation.new("x")
    store.create(conversation)
    empty = replace(made_turn("a"), messages=(ChatMessage.user("a"), ChatMessage.assistant("")))
    journalled_by_another(store, conversation, empty, process_started_at=1.0)
    assert store.load(conversation.id) == conversation


def test_an_owner_that_was_wrongly_taken_for_dead_still_saves_its_whole_answer(store):
    conversation = Conversation.new("x")
    store.create(conversation)
    turn = made_turn("whole")
    part = replace(turn, messages=(turn.messages[0], ChatMessage.assistant("WH")))
    journalled_by_another(store, conversation, part, process_started_at=1.0)
    assert store.load(conversation.id).turns[turn.id].answer.text == "WH"
    store.save_turn(conversation.id, turn, turn.id)
    assert store.load(conversation.id).turns[turn.id] == turn


def test_a_process_killed_in_mid_answer_loses_at_most_a_second_of_it(tmp_path):
    code = """
        import asyncio, sys, time
        from kani_nb._loop import LoopThread
        from kani_nb.conversation.session import ChatReply, ChatSession
        from kani_nb.conversation.store import ConversationStore
        from kani_nb.conversation.tree import Conversation
        from kani_nb.engines.echo import EchoEngine
        from kani_nb.metrics.recorder import Recorder

        engine = EchoEngine(delay=0.02)
        session = ChatSession(
            Conversation("killed", "killed"), loop=LoopThread(), engine=lambda: engine, recorder=Recorder(),
            store=ConversationStore(sys.argv[1]), engine_name=lambda: "echo",
        )
        session.ask_sync("first")
        async def main():
            async for event in session.stream(" ".join(map(str, range(1000)))):
                if isinstance(event, str):
                    print(repr((time.time(), str(event))), flush=True)
        asyncio.run(main())
    """
    child = run_python(code, tmp_path / "c.db")
    shown = []
    for line in child.stdout:
        shown.append(eval(line))
        if len(shown) == 90:
            break
    os.kill(child.pid, signal.SIGKILL)
    killed_at = time.time()
    shown += [eval(line) for line in child.stdout if line.endswith("\n")]
    child.stdout.close()
    child.wait()
    with ConversationStore(tmp_path / "c.db") as store:
        conversation = store.load("killed")
    first, last = conversation.path()
    assert first.answer.text == "first"
    assert last.interrupted
    assert last.model == "echo"
    text = "".join(piece for _, piece in shown)
    assert text.startswith(last.answer.text)
    older = "".join(piece for at, piece in shown if at < killed_at - 1)
    assert len(older) > 50
    assert last.answer.text.startswith(older)
