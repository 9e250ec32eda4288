"""The magics in real kernels: how cells end, what is kept, and that nothing is ever half there."""

import json
import os
import random
import signal
import threading
import time

import pytest

from tests.notebook.in_kernels import good, interrupt_when

pytestmark = pytest.mark.kernels

STATE = """
import json as _json, signal as _signal
import kani_nb as _kani_nb
_rt = _kani_nb.runtime()
_turns = [(t.prompt.text, t.answer.text, t.interrupted, t.metrics["finish_reason"]) for t in _rt.chat.turns]
print(_json.dumps({"turns": _turns, "all": len(_rt.chat.conversation.turns), "busy": _rt.chat.is_busy,
    "name": _rt.chat.conversation.name, "stored": [[s.name, s.turns] for s in _rt.list_chats()],
    "sigint": _signal.getsignal(_signal.SIGINT).__name__}))
"""
BROKEN = """
import kani_nb
from kani_nb.engines.base import BaseEngine
class Broken(BaseEngine):
    max_context_size = 99
    def prompt_len(self, messages, functions=None, **more):
        return 1
    async def stream(self, messages, functions=None, **more):
        yield 'some '
        1 / 0
kani_nb.runtime().use(Broken(), name='broken')
"""
SLOW_TO_PREPARE = """
import asyncio, kani_nb.engines.echo
async def prepare(self, progress=None):
    print('preparing', flush=True)
    await asyncio.sleep(30)
kani_nb.engines.echo.EchoEngine.prepare = prepare
"""


def state(kernel):
    return json.loads(good(kernel, STATE).text)


def interrupt_later(kernel, delay_s):
    """The signal itself, since the manager's call would leave an event loop in the timer's thread."""
    timer = threading.Timer(delay_s, os.kill, (kernel.manager.provisioner.pid, signal.SIGINT))
    timer.start()
    return timer


def ename(outcome):
    return outcome.reply.get("ename")


def records(outcome):
    """What our displays say of themselves in their metadata."""
    metadata = [output.get("metadata", {}) for output in outcome.outputs]
    return [each["kani_nb"] for each in metadata if "kani_nb" in each]


def test_a_chat_streams_into_one_display_and_gives_no_value(kernel):
    good(kernel, "%load_engine echo:delay=0.05")
    outcome = good(kernel, "%%chat\n" + "one two three four " * 12 + "last")
    assert len(outcome.outputs) == 1
    assert all(len(set(frames)) >= 5 for frames in outcome.frames.values())
    [record] = records(outcome)
    assert record["state"] == "done"
    assert record["metrics"]["completion_tokens"] == 49
    assert "last" in outcome.outputs[0]["data"]["text/html"]


def test_it_runs_under_time_and_capture_and_in_a_loop(kernel):
    good(kernel, "%load_engine echo")
    timed = good(kernel, "%%time\n%%chat\ntimed").text
    assert "Wall time" in timed
    assert "timed" in timed
    captured = good(kernel, "%%capture caught\n%%chat\nhidden")
    assert captured.outputs == []
    assert "hidden" in good(kernel, "caught.show()").text
    good(kernel, "for n in range(3):\n    get_ipython().run_cell_magic('chat', '', f'loop {n}')", "cell-loop")
    assert [turn[0] for turn in state(kernel)["turns"]] == ["timed", "hidden", "loop 0", "loop 1", "loop 2"]


def test_an_interrupt_keeps_what_was_said_fails_the_cell_in_one_line_and_stops_the_queue(kernel):
    good(kernel, "%load_engine echo:delay=0.05")
    running = kernel.send("%%chat\n" + "word " * 200)
    queued = [kernel.send("%%chat\nqueued"), kernel.send("print('queued too')")]
    look, asked = interrupt_when(kernel, "echo: word word")
    outcome = kernel.collect(running, on_output=look)
    assert time.monotonic() - asked[0] < 1.5
    assert (outcome.status, ename(outcome)) == ("error", "KeyboardInterrupt")
    assert len(outcome.reply["traceback"]) == 1
    assert len(outcome.error.splitlines()) == 1
    assert [kernel.collect(each).status for each in queued] == ["aborted", "aborted"]
    found = state(kernel)
    [(prompt, answer, interrupted, reason)] = found["turns"]
    assert interrupted
    assert reason == "interrupted"
    assert answer
    assert prompt.startswith(answer)
    good(kernel, "%%chat --max-new-tokens 3\nthe next cell works")
    assert len(state(kernel)["turns"]) == 2


def test_an_interrupt_before_the_first_word_leaves_nothing(kernel):
    good(kernel, "%load_engine echo:prefill=20")
    look, _ = interrupt_when(kernel, "never answered")
    outcome = kernel.collect(kernel.send("%%chat\nnever answered"), on_output=look)
    assert ename(outcome) == "KeyboardInterrupt"
    assert "nothing was added" in outcome.error
    found = state(kernel)
    assert found["turns"] == []
    assert not found["busy"]


def test_a_stop_from_elsewhere_ends_the_answer_and_the_cell_succeeds(kernel):
    good(kernel, "%load_engine echo:delay=0.05")
    good(kernel, "import threading, kani_nb\nthreading.Timer(0.7, lambda: kani_nb.runtime().chat.stop()).start()")
    assert "stopped" in good(kernel, "%%chat\n" + "word " * 200).text
    assert state(kernel)["turns"][-1][2:] == [True, "cancelled"]


@pytest.mark.timeout(300)
def test_twenty_interrupts_at_random_moments_never_leave_half_a_round(kernel):
    chance = random.Random(7)
    good(kernel, "%load_engine echo:delay=0.01,prefill=0.05")
    loop = "for n in range(9):\n    get_ipython().run_cell_magic('chat', '', f'{n} ' + 'a b c d e f g h i j ' * 2)"
    one = "%%chat --append\n" + "k l m n o p q r s t " * 20
    told = 0
    for number in range(20):
        # Well inside the cell's time: where the kernel itself is at work, an interrupt costs it the reply.
        code, longest_s = (loop, 0.9) if number % 2 else (one, 0.6)
        delay_s = chance.uniform(0.02, longest_s)
        timers = []

        def begin(message, delay_s=delay_s, timers=timers):
            if message["msg_type"] == "execute_input":
                timers.append(interrupt_later(kernel, delay_s))

        outcome = kernel.run(code, cell_id=f"cell-{number}", on_output=begin)
        timers[0].join()
        if outcome.status == "error":
            assert ename(outcome) == "KeyboardInterrupt"
            told += 1
        found = state(kernel)
        assert not found["busy"]
        assert found["sigint"] == "default_int_handler"
        for prompt, answer, interrupted, _ in found["turns"]:
            assert answer
            assert prompt.startswith(answer) if interrupted else prompt.rstrip() == answer.rstrip()
        assert dict(found["stored"]).get(found["name"], 0) == found["all"]
        assert all(record["state"] != "running" for record in records(outcome))
    assert told >= 15


def run_all(kernel, cells, *, with_ids):
    for number, code in enumerate(cells):
        good(kernel, code, f"cell-{number}" if with_ids else None)
    return state(kernel)


CELLS = ["%load_engine echo", "%%chat\nfirst", "%%chat\nsecond", "%%chat\nthird", "%%chat\nfourth"]


@pytest.mark.parametrize("with_ids", [True, False])
def test_run_all_twice_gives_the_same_conversation(kernel, with_ids):
    once = run_all(kernel, CELLS, with_ids=with_ids)
    twice = run_all(kernel, CELLS, with_ids=with_ids)
    assert twice["turns"] == once["turns"]
    assert [turn[0] for turn in once["turns"]] == ["first", "second", "third", "fourth"]


def test_running_the_second_of_four_cells_again_forks_there(kernel):
    run_all(kernel, CELLS, with_ids=True)
    good(kernel, "%%chat\nanother second", "cell-2")
    found = state(kernel)
    assert [turn[0] for turn in found["turns"]] == ["first", "another second"]
    assert found["all"] == 5
    assert "fourth" in good(kernel, "%chat branches").text


def test_turns_that_a_repeated_cell_leaves_out_are_told(kernel):
    run_all(kernel, CELLS, with_ids=True)
    assert "turns 3-4 are on branch 1 now" in good(kernel, "%%chat\nanother second", "cell-2").text


def test_without_cell_ids_a_conversation_that_starts_over_says_so(kernel):
    run_all(kernel, CELLS, with_ids=False)
    shown = good(kernel, "%%chat\nfirst").text
    assert "the conversation starts over" in shown
    assert "turns 2-4 are on branch 1 now" in shown


def test_a_chat_line_alone_is_answered_by_the_magic_itself(kernel):
    assert "--max-new-tokens" in good(kernel, "%%chat --help").text
    good(kernel, "%load_engine echo")
    assert "the prompt is empty" in kernel.run("%%chat --max-new-tokens 3").error


def test_lines_of_ours_are_completed_with_nothing_else(kernel, tmp_path):
    (tmp_path / "talk.json").write_text("{}")
    good(kernel, f"import os\nos.chdir({str(tmp_path)!r})")
    for line, expected in (("%chat hist", ["history"]), ("%chat load talk.js", ["talk.json"])):
        reply = kernel.client.complete(line, len(line), reply=True, timeout=30)["content"]
        assert [line[: reply["cursor_start"]] + each for each in reply["matches"]] == [
            line[: line.rindex(" ") + 1] + each for each in expected
        ]


def test_an_interrupted_load_fails_in_one_line_and_the_old_engine_answers(kernel):
    good(kernel, "%load_engine echo --as old")
    good(kernel, SLOW_TO_PREPARE)
    interrupt_later(kernel, 0.5)
    outcome = kernel.run("%load_engine echo:delay=1 --as new")
    assert ename(outcome) == "KeyboardInterrupt"
    assert "old still answers" in outcome.error
    assert "what was downloaded is kept" in outcome.error
    assert len(outcome.error.splitlines()) == 1
    assert outcome.duration_s < 5
    assert "old" in good(kernel, "%%chat\nhello").text


def test_an_expected_error_is_one_paragraph_and_the_cell_fails(kernel):
    short = kernel.run("%%chat\nhello")
    assert ename(short) == "NoEngineError"
    assert short.reply["traceback"] == ["NoEngineError: no engine is loaded\n→ %load_engine smollm2"]
    good(kernel, BROKEN)
    failed = kernel.run("%%chat\nhello")
    assert ename(failed) == "GenerationError"
    assert "ZeroDivisionError" in failed.error
    assert len(failed.error.splitlines()) <= 2
    assert records(failed)[0]["state"] == "error"
    assert state(kernel)["turns"] == []


def test_the_doctor_knows_the_kernel(kernel):
    shown = good(kernel, "%kani doctor").text
    assert "ipykernel" in shown
    assert "Stop button while a cell runs" in shown
    assert "nobody could press them here (ipywidgets" in shown
    seen = kernel.collect(kernel.send("%kani doctor", allow_stdin=True)).text
    assert "%chat panel, %engine dashboard: they can be pressed here (ipywidgets" in seen
    assert len(shown.splitlines()) <= 25


def test_the_figure_follows_the_answer_unless_it_is_turned_off(kernel):
    good(kernel, "%config KaniNB.plot = 'always'")
    good(kernel, "%load_engine echo")
    figure = good(kernel, "%%chat\nhello there you").outputs[-1]["data"]
    assert "application/vnd.plotly.v1+json" in figure
    assert "image/svg+xml" in figure
    good(kernel, "%config KaniNB.plot = 'ask'")
    assert len(good(kernel, "%%chat\nagain").outputs) == 1
    asked = good(kernel, "%engine stats")
    assert "image/svg+xml" in asked.outputs[0]["data"]
    assert "tok/s" in asked.text


def test_reloading_keeps_the_engine_and_the_conversation(kernel):
    good(kernel, "%load_engine echo --as mine")
    good(kernel, "%%chat\nhello")
    good(kernel, "%reload_ext kani_nb")
    assert "mine" in good(kernel, "%engine list").text
    good(kernel, "%%chat\nstill here")
    assert len(state(kernel)["turns"]) == 2
