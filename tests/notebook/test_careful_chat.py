"""What a failed or one-off `%%chat` leaves behind, what files are never written over, and how verbs refuse."""

import asyncio
import json
import os
import signal
import threading

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from kani_nb.engines.echo import EchoEngine

SECRET = "hf_abcdefghijklMNOP"


class Failing(EchoEngine):
    async def stream(self, messages, functions=None, **params):
        raise RuntimeError("kaboom")
        yield


def prompts(runtime):
    return [turn.prompt.text for turn in runtime.chat.turns]


@pytest.mark.parametrize("before", [None, "Be brief."])
def test_a_system_prompt_whose_round_failed_is_not_kept(cells, clean_runtime, before):
    clean_runtime.use(Failing(), name="failing")
    clean_runtime.chat.set_system(before)
    assert "kaboom" in cells.bad("%%chat --system 'Talk like a pirate.'\nhello")
    assert clean_runtime.chat.system == before
    cells.bad("%%chat --system 'Talk like a pirate.' --bogus\nhello")
    assert clean_runtime.chat.system == before
    cells.good("%load_engine echo")
    cells.good("%%chat --system 'Talk like a pirate.'\nhello")
    assert clean_runtime.chat.system == "Talk like a pirate."


def test_the_failure_names_the_line_that_raised(cells, clean_runtime):
    clean_runtime.use(Failing(), name="failing")
    printed = cells.bad("%%chat\nhello")
    line = Failing.stream.__code__.co_firstlineno + 1
    assert f"RuntimeError: kaboom (test_careful_chat.py:{line})" in printed


def test_the_first_chat_may_be_for_one_cell_only(cells, clean_runtime):
    cells.good("%load_engine echo")
    cells.good("%%chat --to poems\nthere")
    assert clean_runtime.current_chat is None
    cells.good("%%chat\nhere")
    assert clean_runtime.chat.conversation.name != "poems"
    assert prompts(clean_runtime) == ["here"]
    cells.good("%%chat --to poems\nagain")
    assert prompts(clean_runtime) == ["here"]
    cells.good("%chat open 'poems'")
    assert prompts(clean_runtime) == ["there", "again"]


@pytest.mark.parametrize("is_open", [True, False])
def test_loading_a_conversation_that_is_here_makes_a_copy_of_it(cells, clean_runtime, tmp_path, is_open):
    cells.good("%load_engine echo\n%chat new talk")
    cells.good("%%chat\nfirst")
    cells.good(f"%chat save {tmp_path}/talk.json")
    cells.good("%%chat\nsecond")
    original = clean_runtime.chat.conversation
    if not is_open:
        clean_runtime._chats.clear()
        clean_runtime.set_chat(None)
    assert "talk (2), 1 turn" in cells.good(f"%chat load {tmp_path}/talk.json")
    assert clean_runtime.chat.conversation.id != original.id
    cells.good("%%chat\nelsewhere")
    clean_runtime._chats.clear()
    assert [turn.prompt.text for turn in clean_runtime.open_chat("talk").turns] == ["first", "second"]
    assert [turn.prompt.text for turn in clean_runtime.open_chat("talk (2)").turns] == ["first", "elsewhere"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("package.json", '{"name": "mine"}'),
        ("notes.md", "# My notes\n"),
        ("data.json", "[1, 2, 3]"),
        ("nb.ipynb", '{"cells": [], "messages": []}'),
    ],
)
def test_a_file_that_is_no_conversation_is_not_written_over(cells, tmp_path, name, content):
    cells.good("%load_engine echo")
    cells.good("%%chat\nhello")
    path = tmp_path / name
    path.write_text(content)
    assert "--overwrite" in cells.bad(f"%chat save {path} --format json")
    assert path.read_text() == content
    cells.good(f"%chat save {path} --format json --overwrite")
    assert json.loads(path.read_text())["format"] == "kani_nb conversation"


@pytest.mark.parametrize(
    "options", ["talk.json", "talk.md", "talk.json --format openai", "talk.json --format sharegpt"]
)
def test_another_conversation_is_not_written_over(cells, tmp_path, options):
    cells.good("%load_engine echo")
    cells.good("%%chat\nhello")
    cells.good(f"%chat save {tmp_path}/{options}")
    path = tmp_path / options.partition(" ")[0]
    before = path.read_bytes()
    cells.good("%chat new other")
    cells.good("%%chat\nsomething else")
    said = cells.bad(f"%chat save {tmp_path}/{options}")
    assert "it holds another conversation than 'other'" in said
    assert "--overwrite" in said
    assert path.read_bytes() == before
    cells.good(f"%chat save {tmp_path}/{options} --overwrite")
    assert path.read_bytes() != before
    cells.good(f"%chat save {tmp_path}/{options}")


def test_a_conversation_saved_before_is_written_over_and_missing_folders_are_named(cells, tmp_path):
    cells.good("%load_engine echo")
    cells.good("%%chat\nhello")
    for name in ("talk.json", "talk.md"):
        cells.good(f"%chat save {tmp_path}/{name}")
        cells.good(f"%chat save {tmp_path}/{name}")
    cells.good("%%chat\nand more")
    cells.good(f"%chat save {tmp_path}/talk.md")  # it has only gone on
    assert f"mkdir -p {tmp_path}/nowhere" in cells.bad(f"%chat save {tmp_path}/nowhere/talk.json")
    assert "--format" in cells.bad(f"%chat save {tmp_path}/talk.xyz")


@pytest.mark.parametrize(
    "line",
    [
        f"%unload_engine {SECRET}",
        f"%engine use {SECRET}",
        f"%kani token {SECRET}",
        "%load_engine org/model token=verysecret",
        "%load_engine org/model --hf-tok verysecret",
        "%load_engine org/model --use-auth verysecret",
    ],
)
def test_no_magic_repeats_a_token(cells, line):
    printed = cells.bad(line)
    assert "a token does not belong into a cell" in printed
    assert SECRET not in printed
    assert "verysecret" not in printed


@pytest.mark.parametrize("cell", ["%%chat --help", "%%chat -h\n", "\n%%chat --help\n\n"])
def test_help_needs_no_body(cells, cell):
    assert "--max-new-tokens" in cells.good(cell)


def test_an_empty_cell_is_refused_in_our_own_words(cells):
    cells.good("%load_engine echo")
    assert "the prompt is empty" in cells.bad("%%chat")
    assert "the prompt is empty" in cells.bad("%%chat --max-new-tokens 5")


def test_a_terminal_still_waits_for_the_prompt_below_a_chat_line(cells):
    manager = cells.shell.input_transformer_manager
    assert isinstance(manager, TransformerManager)
    assert manager.check_complete("%%chat")[0] == "incomplete"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("%chat undo --help", "%chat undo [N]"),
        ("%chat system -h", "%chat system [TEXT|--clear]"),
        ("%chat retry --help", "--seed"),
        ("%chat save --help", "--overwrite"),
        ("%engine use -h", "%engine use NAME"),
        ("%engine prefetch --help", "%engine prefetch MODEL"),
        ("%kani doctor --help", "%kani doctor"),
    ],
)
def test_every_verb_says_how_it_is_used(cells, line, said):
    assert said in cells.good(line)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("%chat system --claer", "did you mean --clear?"),
        ("%chat list --everything", "%chat list [--all]"),
        ("%chat open --all", "no option '--all'"),
        ("%chat switch 9", "%chat branches"),
        ("%chat retry 9", "%chat history"),
        ("%chat edit 1 --sed 3 hi", "did you mean --seed?"),
        ("%chat edit 1 --seed 3", "the new text is empty"),
        ("%chat retry --seed x", "--seed is 'x': it must be a whole number"),
        ("%chat save --format json", "FILE is missing"),
        ("%load_engine echooo", "did you mean echo?"),
        ("%load_engine echo --threads", "--threads needs a value after it"),
        ("%load_engine echo --m 3", "unknown option '--m'"),
        ("%load_engine echo other", "other cannot stand here"),
    ],
)
def test_what_is_refused_names_what_helps(cells, clean_runtime, line, said):
    cells.good("%load_engine echo")
    cells.good("%%chat --system 'Be brief.'\nhello")
    assert said in cells.bad(line)
    assert clean_runtime.chat.system == "Be brief."
    assert prompts(clean_runtime) == ["hello"]


def test_an_edit_takes_generation_options_and_its_text_as_it_was_typed(cells, clean_runtime):
    cells.good("%load_engine echo")
    cells.good("%%chat\nhello")
    cells.good("%chat edit 1 --seed 3 --max-new-tokens=2 --no-sample it's  two --words $x")
    assert prompts(clean_runtime) == ["it's  two --words $x"]
    assert clean_runtime.chat.turns[0].answer.text == "it's  two"
    cells.good("%chat edit 1 -- --max-new-tokens is an option")
    assert prompts(clean_runtime) == ["--max-new-tokens is an option"]


def test_names_may_stand_in_quotes(cells, clean_runtime):
    cells.good("%load_engine echo --as mine\n%chat new 'two words'")
    assert clean_runtime.chat.conversation.name == "two words"
    cells.good('%chat rename "three words here"')
    assert clean_runtime.chat.conversation.name == "three words here"
    cells.good('%chat new it\'s\n%chat open "three words here"\n%engine use "mine"')
    assert {"it's", "three words here"} == set(clean_runtime.chats)
    cells.good("%unload_engine 'mine'")


def test_unloading_under_a_running_answer_says_so(cells, clean_runtime):
    cells.good("%load_engine echo:delay=0.05")

    async def begin():
        session = clean_runtime.chat
        events = session.stream("word " * 100)
        await events.__anext__()
        return asyncio.ensure_future(drain(events))

    async def drain(events):
        return [event async for event in events]

    running = clean_runtime.loop.run_sync(begin())
    printed = cells.good("%unload_engine")
    assert "still running on it" in printed
    clean_runtime.stop()
    clean_runtime.loop.run_sync(asyncio.wait_for(running, 10))


def test_the_same_words_twice_in_a_terminal_are_two_turns(cells, clean_runtime):
    cells.good("%load_engine echo")
    for text in ("hello", "more", "hello"):
        cells.good(f"%%chat\n{text}")
    assert prompts(clean_runtime) == ["hello", "more", "hello"]


def test_an_engine_without_a_cache_has_no_word_about_one(cells):
    cells.good("%load_engine echo")
    assert "cached" not in cells.good("%%chat\nhello there")
    assert "cached" not in cells.good("%engine stats")


def test_an_interrupted_prefetch_ends_as_an_interrupt_and_was_not_downloaded(cells, monkeypatch):
    from kani_nb.engines import sources

    def slow(model, progress=None, *, revision=None, cancelled):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        assert cancelled.wait(20)
        raise sources.ModelUnavailableError("interrupted")

    monkeypatch.setattr(sources, "prefetch", slow)
    result, printed = cells.run("%engine prefetch qwen3-0.6b")
    assert isinstance(result.error_in_exec, KeyboardInterrupt)
    assert "was not downloaded" in printed
    assert "was not loaded" not in printed


def test_an_interrupted_load_that_does_not_end_says_that_it_was_abandoned(cells, clean_runtime, monkeypatch):
    from kani_nb.notebook import magics_engine

    ended = threading.Event()

    async def prepare(self, progress=None):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        while not ended.is_set():
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                continue

    monkeypatch.setattr(magics_engine, "_LET_GO_S", 0.1)
    cells.good("%load_engine echo --as old")
    monkeypatch.setattr(EchoEngine, "prepare", prepare)
    result, printed = cells.run("%load_engine echo:delay=1 --as new")
    ended.set()
    assert isinstance(result.error_in_exec, KeyboardInterrupt)
    assert "what was downloaded is kept" in printed
    assert "abandoned" in printed
    assert "old still answers" in printed
