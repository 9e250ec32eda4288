"""Tools in real kernels: approval through the front end, the main thread, and an interrupt inside a function."""

import pytest

from tests.notebook.in_kernels import good, interrupt_when

pytestmark = pytest.mark.kernels

SCRIPT = """
import threading, time
import kani_nb
from kani_nb import ai_function
from kani_nb.engines.scripted import ScriptedEngine
from kani_nb.messages import FunctionCall

def delete(path: str) -> str:
    "Delete a file."
    return f"deleted {path} on the main thread: {threading.current_thread() is threading.main_thread()}"

@ai_function(read_only=True)
def hang() -> None:
    print("it hangs", flush=True)
    time.sleep(60)

kani_nb.runtime().use(ScriptedEngine(FunctionCall.with_args(NAME, ARGUMENTS), "Done."), name="script")
"""
DELETE = SCRIPT.replace("NAME, ARGUMENTS", "'delete', path='a.txt'")


@pytest.mark.parametrize(("answer", "result"), [("y", "deleted a.txt on the main thread: True"), ("n", "refused")])
def test_approval_is_asked_for_where_the_person_is(kernel, answer, result):
    good(kernel, DELETE)
    asked = []
    request = kernel.send("%%chat --tools delete\ngo", allow_stdin=True)
    outcome = kernel.collect(request, person=lambda question: asked.append(question) or answer)
    assert outcome.status == "ok", outcome.text
    assert asked == ["Run delete(path='a.txt')? [y]es, [n]o, [a]lways: "]
    assert result in outcome.text
    assert "Done." in outcome.text


def test_where_the_front_end_cannot_ask_it_is_a_denial(kernel):
    good(kernel, DELETE)
    outcome = good(kernel, "%%chat --tools delete\ngo")
    assert "needs the user's approval, and this front end cannot ask for input" in outcome.text


def test_an_interrupt_ends_a_function_and_the_cell_and_the_kernel_goes_on(kernel):
    good(kernel, SCRIPT.replace("NAME, ARGUMENTS", "'hang'"))
    look, asked = interrupt_when(kernel, "it hangs")
    outcome = kernel.run("%%chat --tools hang\ngo", on_output=look)
    assert asked
    assert outcome.status == "error"
    assert outcome.duration_s < 20
    assert "1 turn" in good(kernel, "%chat history").text
    assert kernel.value("1 + 1") == "2"


def test_an_async_function_runs_while_the_cell_waits(kernel):
    good(kernel, SCRIPT.replace("NAME, ARGUMENTS", "'later'"))
    good(
        kernel,
        "import asyncio\n@ai_function(read_only=True)\nasync def later() -> str:\n    await asyncio.sleep(0.01)\n"
        "    return 'now'",
    )
    assert "later() → now" in good(kernel, "%%chat --tools later\ngo").text
