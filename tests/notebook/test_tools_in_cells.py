"""`%%chat --tools` and `%chat tools`: functions of the notebook, run on the main thread, shown as folded steps."""

import threading
import time

import pytest

SCRIPT = """
import threading
import kani_nb
from kani_nb import ai_function
from kani_nb.engines.scripted import ScriptedEngine
from kani_nb.messages import FunctionCall
ran_on = []

@ai_function(read_only=True)
def add(a: int, b: int) -> int:
    "Add two numbers."
    ran_on.append(threading.current_thread() is threading.main_thread())
    return a + b

def delete(path: str) -> str:
    "Delete a file."
    return f"deleted {path}"

engine = kani_nb.runtime().use(ScriptedEngine(CALL, "Done."), name="script")
"""


def script(cells, call):
    cells.good(SCRIPT.replace("CALL", call))


def test_a_function_of_the_notebook_is_run_on_the_main_thread_and_its_step_shown(cells):
    script(cells, "FunctionCall.with_args('add', a=2, b=3)")
    printed = cells.good("%%chat --tools add --into reply\n2 + 3?")
    assert "[add(a=2, b=3) → 5]" in printed
    assert "Done." in printed
    assert cells.shell.user_ns["ran_on"] == [True]
    assert cells.shell.user_ns["reply"].text == "Done."
    assert "[add(a=2, b=3) → 5]" in cells.good("%chat show")


def test_a_function_without_a_mark_is_asked_for(cells, monkeypatch):
    script(cells, "FunctionCall.with_args('delete', path='a.txt')")
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "y")
    printed = cells.good("%%chat --tools delete\ngo")
    assert asked == ["Run delete(path='a.txt')? [y]es, [n]o, [a]lways: "]
    assert '[delete(path="a.txt") → deleted a.txt]' in printed
    assert len(asked) == 1
    printed = cells.good("%%chat --append --tools delete --approve never\ngo")


def test_where_there_is_no_stdin_it_is_denied_and_says_so(cells, monkeypatch):
    script(cells, "FunctionCall.with_args('delete', path='a.txt')")

    def no_stdin(_question):
        raise EOFError

    monkeypatch.setattr("builtins.input", no_stdin)
    printed = cells.good("%%chat --tools delete\ngo")
    assert "failed: delete was not run: it needs the user's approval, and there is no stdin" in printed


def test_an_interrupt_inside_a_function_ends_the_cell_and_keeps_the_steps(cells):
    script(cells, "FunctionCall.with_args('hang')")
    cells.good("""
import time, signal
@ai_function(read_only=True)
def hang() -> None:
    threading.Timer(0.2, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
    time.sleep(20)
""")
    began = time.monotonic()
    printed = cells.bad("%%chat --tools hang\ngo")
    assert time.monotonic() - began < 10
    assert "interrupted" in printed
    turn = cells.good("%chat history")
    assert "1 turn" in turn


def test_a_function_that_hangs_on_the_main_thread_is_interrupted_after_its_time(cells):
    script(cells, "FunctionCall.with_args('hang')")
    cells.good("""
import time
@ai_function(read_only=True, timeout_s=0.3)
def hang() -> None:
    time.sleep(20)
""")
    began = time.monotonic()
    printed = cells.good("%%chat --tools hang\ngo")
    assert time.monotonic() - began < 10
    assert "[hang() failed: took longer than 0.3 s]" in printed
    assert "Done." in printed


def test_after_an_interrupt_no_other_function_of_the_message_is_run(cells):
    cells.good(SCRIPT.replace("CALL", "[FunctionCall.with_args('hang'), FunctionCall.with_args('drop')]"))
    cells.good("""
import time, signal
dropped = []
@ai_function(read_only=True)
def hang() -> None:
    threading.Timer(0.1, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)).start()
    time.sleep(20)
@ai_function(read_only=True)
def drop() -> None:
    dropped.append(1)
""")
    for number in range(3):
        cells.good(f"%chat new attempt-{number}")
        cells.bad("%%chat --quiet --tools hang,drop\ngo")
    assert cells.shell.user_ns["dropped"] == []
    assert "drop() failed: drop was not run: the user stopped it" in cells.good("%chat show")


def test_an_interrupt_at_the_question_keeps_what_was_called_before(cells, monkeypatch):
    cells.good(
        SCRIPT.replace("CALL", "[FunctionCall.with_args('add', a=1, b=2), FunctionCall.with_args('delete', path='x')]")
    )

    def interrupted(_question):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    cells.bad("%%chat --quiet --tools add,delete\ngo")
    shown = cells.good("%chat show")
    assert "[add(a=1, b=2) → 3]" in shown
    assert "deleted" not in shown


def test_a_function_that_ends_the_process_ends_only_itself(cells):
    script(cells, "FunctionCall.with_args('leave')")
    cells.good("import sys\n@ai_function(read_only=True)\ndef leave() -> None:\n    sys.exit(3)")
    assert "leave() failed: RuntimeError: it raised SystemExit: 3" in cells.good("%%chat --tools leave\ngo")


def test_a_function_that_was_defined_anew_is_the_one_that_is_called(cells):
    script(cells, "FunctionCall.with_args('add', a=2, b=3)")
    cells.good("%%chat --quiet --tools add\ngo")
    cells.good("@ai_function(read_only=True)\ndef add(a: int, b: int) -> int:\n    return 100")
    assert "add(a=2, b=3) → 100" in cells.good("%chat retry")
    cells.good("%chat new another\n%chat tools add")
    cells.good("@ai_function(read_only=True)\ndef add(a: int, b: int) -> int:\n    return 200")
    assert "add(a=2, b=3) → 200" in cells.good("%%chat\ngo on")


def test_always_holds_for_the_conversation(cells, monkeypatch):
    cells.good(
        SCRIPT.replace(
            'CALL, "Done."',
            "FunctionCall.with_args('delete', path='x'), 'a', FunctionCall.with_args('delete', path='y'), 'b'",
        )
    )
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "a")
    cells.good("%%chat --append --tools delete\ngo")
    assert "deleted y" in cells.good("%%chat --append --tools delete\nand on")
    assert len(asked) == 1


def test_stop_ends_a_function_that_runs_on_the_main_thread(cells):
    script(cells, "FunctionCall.with_args('hang')")
    cells.good("""
import time
@ai_function(read_only=True)
def hang() -> None:
    threading.Timer(0.2, kani_nb.runtime().stop).start()
    time.sleep(20)
""")
    began = time.monotonic()
    printed = cells.good("%%chat --tools hang\ngo")
    assert time.monotonic() - began < 10
    assert "hang was stopped by the user while it ran" in printed
    assert "stopped" in printed


def test_tools_of_the_conversation_hold_until_they_are_cleared(cells):
    script(cells, "FunctionCall.with_args('add', a=2, b=3)")
    assert "the model may call nothing" in cells.good("%chat tools")
    shown = cells.good("%chat tools add,delete --approve never")
    assert "Add two numbers." in shown
    assert "[add(a=2, b=3) → 5]" in cells.good("%%chat\n2 + 3?")
    shown = cells.good("%chat tools --approve always")
    assert shown.count("  runs") == 2
    assert "at most 8 rounds of calls" in shown
    cells.good("%chat tools --clear")
    assert "→ 5" not in cells.good("%%chat --append\nagain")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("--tools ad", "there is no function 'ad'\n→ did you mean add?"),
        ("--tools add,add", "two tools are called 'add'"),
        ("--tools number", "--tools number: 3 is not a function"),
        ("--tools ,", "--tools names no function"),
        ("--tools add --approve maybe", "maybe"),
        ("--tools add --max-steps 0", "max_steps is 0"),
        ("--tools untyped", "untyped has the parameter 'a' without a type\n→ a: str, or so"),
        ("--tools nameless", "'<lambda>' cannot be a function's name for a model"),
        ("--tools part", "cannot be a function's name for a model"),
        ("--tools len", "len is Python's own"),
        ("--tools add delete", "→ --tools add,delete"),
        ("--tools starred", "starred has the parameter *words: a model passes each argument by its name"),
    ],
)
def test_what_is_no_tool_is_refused_before_anything_is_asked(cells, line, complaint):
    script(cells, "'never'")
    cells.good("import functools\nnumber, nameless, part = 3, lambda: 1, functools.partial(delete)")
    cells.good("def starred(*words): pass\ndef untyped(a): pass")
    assert complaint in cells.bad(f"%%chat {line}\ngo")
    assert "0 turns" in cells.good("%chat history")


def test_other_threads_are_not_blocked_by_a_function_on_the_main_thread(cells):
    script(cells, "FunctionCall.with_args('wait')")
    cells.good("""
from concurrent.futures import Future
beaten = Future()
async def beat():
    beaten.set_result(True)
@ai_function(read_only=True)
def wait() -> bool:
    kani_nb.runtime().loop.submit(beat())
    return beaten.result(10)
""")
    assert "[wait() → True]" in cells.good("%%chat --tools wait\ngo")
    assert threading.active_count() < 50
