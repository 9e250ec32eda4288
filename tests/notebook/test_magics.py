"""The magics in a real shell: what they do, and how short they are about what cannot be done."""

import gc
import os
import signal
import threading
import weakref

import pytest

from kani_nb.engines.echo import EchoEngine
from kani_nb.notebook.shell import cell_ref, notebook_path

TOKEN = "hf_abcdefghijklMNOP"


def prompts(runtime):
    return [turn.prompt.text for turn in runtime.chat.turns]


def test_a_prompt_is_literal_but_for_two_braces(cells, clean_runtime):
    cells.good("%load_engine echo\nx = 'WRONG'; country = 'France'")
    body = '{"x": {x}} $x $HOME \\frac{1}{2} %time !ls ?x\n\n    indented {{country}} \\{{literal}}'
    cells.good(f"%%chat\n{body}")
    assert prompts(clean_runtime) == [body.replace("{{country}}", "France").replace("\\{{", "{{")]


def test_a_prompt_keeps_its_lines_and_indentation_and_loses_blank_ones_around_it(cells, clean_runtime):
    cells.good("%load_engine echo")
    cells.good("%%chat\n\n\n    def f():\n        return 1\n\n")
    assert prompts(clean_runtime) == ["    def f():\n        return 1"]


def test_the_answer_is_shown_and_the_cell_has_no_value(cells):
    cells.good("%load_engine echo")
    result, printed = cells.run("%%chat\nhello there")
    assert result.result is None
    assert "hello there" in printed
    assert "2 tokens" in printed


def test_a_reply_can_be_kept_in_a_variable_and_shown_nowhere(cells, clean_runtime):
    cells.good("%load_engine echo")
    assert cells.good("%%chat --into reply --quiet\nhello") == ""
    assert cells.shell.user_ns["reply"].text == "hello"
    assert cells.shell.user_ns["reply"].metrics is not None


def test_options_of_the_answer_reach_the_engine(cells, clean_runtime):
    cells.good("%load_engine echo")
    cells.good("%%chat --max-new-tokens 2 --into r\none two three")
    assert cells.shell.user_ns["r"].text == "one two"
    assert cells.shell.user_ns["r"].metrics.finish_reason == "length"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("%%chat --bogus 1\nx", "unknown option '--bogus'"),
        ("%%chat --max-new-token x\nx", "--max-new-tokens is 'x'"),
        ("%%chat --temperature -1\nx", "temperature is -1.0"),
        ("%%chat --top-p 7\nx", "top_p is 7.0"),
        ("%%chat 'unclosed\nx", "no closing quotation"),
        ("%%chat What is this?\nx", "write the prompt on the lines below"),
        ("%%chat --into 2x\nx", "not a variable's name"),
        ("%%chat --into class\nx", "not a variable's name"),
        ("%%chat --engine other\nx", "no engine is called 'other'"),
        ("%%chat\n   \n  ", "the prompt is empty"),
        ("%%chat\n{{''}}", "the prompt is empty"),
        ("%%chat\n{{1/0}}", "{{1/0}} raised ZeroDivisionError"),
        ("%%chat\n{{nobody}}", "raised NameError"),
        (f"%%chat --token {TOKEN}\nx", "a token does not belong into a cell"),
        (f"%%chat --system 'use {TOKEN}'\nx", "a token does not belong into a cell"),
        ("%%chat\n" + "word " * 200_000, "tokens"),
        ("%chat tell me a joke", "prompts go below %%chat"),
        ("%chat undoo", "did you mean undo?"),
        ("%chat history of France", "takes nothing after it"),
        ("%chat undo -1", "is not a number from 1"),
        ("%chat undo", "nothing to undo"),
        ("%chat switch 9", "there is no branch 9"),
        ("%chat edit 7 hello", "there is no turn 7"),
        ("%chat edit 1", "the new text is empty"),
        ("%chat retry", "there is no turn"),
        ("%chat retry --bogus", "unknown option"),
        ("%chat open nothing", "there is no conversation 'nothing'"),
        ("%chat delete nothing", "there is no conversation 'nothing'"),
        ("%chat resume", "no earlier conversation"),
        ("%chat save", "needs something after it"),
        ("%chat load /nowhere/at/all.json", "there is no file"),
        ("%engine dance smollm2", "no verb 'dance'"),
        ("%engine lst", "did you mean list?"),
        ("%engine use other", "no engine is called 'other'"),
        ("%kani doctr", "did you mean doctor?"),
        ("%load_engine --dtype float32", "no model was named"),
        ("%load_engine echo --bogus", "unknown option '--bogus'"),
        ("%load_engine echo --dtype int3", "it must be one of auto, float32"),
        ("%load_engine echo --threads 0", "threads is 0"),
        ("%load_engine echo:delay=x", "it must be a number"),
        ("%load_engine smollm", "did you mean smollm2"),
        (f"%load_engine org/model --token {TOKEN}", "a token does not belong into a cell"),
        (f"%load_engine {TOKEN}", "a token does not belong into a cell"),
        ("%unload_engine other", "no engine is called 'other'"),
    ],
)
def test_what_cannot_be_done_is_said_shortly_and_nothing_is_changed(cells, clean_runtime, cell, said):
    cells.good("%load_engine echo")
    engine = clean_runtime.engine
    printed = cells.bad(cell)
    assert said in printed
    assert TOKEN not in printed
    assert clean_runtime.engine is engine
    assert clean_runtime.chat.turns == ()
    assert not clean_runtime.chat.is_busy


def test_a_chat_before_any_engine_names_the_line_that_loads_one(cells):
    assert "%load_engine smollm2" in cells.bad("%%chat\nhello")


def test_two_engines_stand_side_by_side_and_one_cell_may_ask_the_other(cells, clean_runtime):
    cells.good("%load_engine echo --as first")
    cells.good("%load_engine echo:reply=second! --as second")
    assert set(clean_runtime.engines) == {"first", "second"}
    assert "second!" in cells.good("%%chat\nhello")
    assert "hello again" in cells.good("%%chat --engine first\nhello again")
    assert clean_runtime.engine_name == "second"
    cells.good("%engine use first")
    assert clean_runtime.engine_name == "first"


def test_an_equal_engine_is_kept_another_takes_its_place_and_ones_own_is_found_by_name(cells, clean_runtime):
    cells.good("%load_engine echo")
    first = clean_runtime.engine
    assert "nothing was done" in cells.good("%load_engine echo")
    assert clean_runtime.engine is first
    cells.good("%load_engine echo:delay=0.001")
    assert clean_runtime.engine is not first
    assert len(clean_runtime.engines) == 1
    clean_runtime.use(EchoEngine(reply="mine"), name="own")
    cells.good("%load_engine echo")
    cells.good("%load_engine own")
    assert "mine" in cells.good("%%chat\nhello")


def test_another_conversation_is_asked_for_one_cell_only(cells, clean_runtime):
    cells.good("%load_engine echo")
    cells.good("%%chat\nhere")
    cells.good("%%chat --to poems\nthere")
    assert prompts(clean_runtime) == ["here"]
    cells.good("%chat open poems")
    assert prompts(clean_runtime) == ["there"]


def test_the_verbs_walk_through_the_conversation(cells, clean_runtime, tmp_path):
    cells.good("%load_engine echo")
    cells.good("%%chat --system 'Be brief.'\nfirst")
    cells.good("%%chat\nsecond")
    assert "Be brief." in cells.good("%chat system")
    assert "1 turn left" in cells.good("%chat undo")
    cells.good("%chat edit 1 It's another $x {first}")
    assert prompts(clean_runtime) == ["It's another $x {first}"]
    assert "second" in cells.good("%chat branches")
    cells.good("%chat switch 1")
    assert prompts(clean_runtime) == ["first", "second"]
    cells.good("%chat retry --max-new-tokens 1")
    assert len(clean_runtime.chat.conversation.branches()) == 3
    shown = cells.good("%chat show")
    assert "You: first" in shown
    cells.good(f"%chat save {tmp_path}/talk.json")
    cells.good("%chat rename talk")
    cells.good("%chat new")
    assert clean_runtime.chat.turns == ()
    cells.good("%chat delete talk")
    assert "2 turns" in cells.good(f"%chat load {tmp_path}/talk.json")
    cells.good("%chat system --clear")
    assert clean_runtime.chat.system is None
    cells.good("%chat clear")
    assert clean_runtime.chat.turns == ()
    for verb in ("list", "list --all", "history", "help"):
        assert cells.good(f"%chat {verb}")


def test_a_conversation_is_resumed_after_the_process_that_held_it(cells, clean_runtime, monkeypatch):
    import kani_nb._runtime as module

    cells.good("%load_engine echo")
    cells.good("%%chat\nbefore the restart")
    clean_runtime.close()
    later = module.Runtime()
    monkeypatch.setattr(module, "_RUNTIME", later)
    printed = cells.good("%chat resume")
    assert prompts(later) == ["before the restart"]
    assert "conversations.db" in printed
    later.close()


def test_an_unexpected_error_keeps_its_traceback(cells, clean_runtime):
    cells.good("%load_engine echo")
    clean_runtime.metrics.listen(lambda metrics: 1 / 0)
    cells.good("class Odd:\n    def __str__(self): raise KeyError('odd')")
    assert "raised KeyError" in cells.bad("%%chat\n{{Odd()}}")
    cells.shell.user_ns["interrupting"] = None
    clean_runtime.new_chat = None  # what nobody expects
    result, printed = cells.run("%chat new")
    assert not result.success
    assert "TypeError" in printed
    assert "chat_verbs.py" in printed


def test_a_failed_cell_pins_nothing_of_the_frames_it_failed_in(cells, clean_runtime):
    class Weights:
        pass

    held = []

    class Failing(EchoEngine):
        async def stream(self, messages, functions=None, **params):
            weights = Weights()
            held.append(weakref.ref(weights))
            raise ValueError("inside the model")
            yield

    clean_runtime.use(Failing(), name="failing")
    assert "inside the model" in cells.bad("%%chat\nhello")
    gc.collect()
    assert held[0]() is None


def test_unloading_says_what_it_gave_back_and_who_still_holds_the_model(cells, clean_runtime):
    class WithModel(EchoEngine):
        def __init__(self):
            super().__init__()
            self.model = type("Model", (), {})()

        async def close(self):
            self.model = None

    clean_runtime.use(WithModel(), name="big")
    cells.good("m = __import__('kani_nb').runtime().engine.model")
    printed = cells.good("%unload_engine")
    assert "big is unloaded" in printed
    assert "held by the variable m" in printed
    assert clean_runtime.engine is None
    clean_runtime.use(WithModel(), name="big")
    assert "held" not in cells.good("%unload_engine big")


def test_help_shows_examples_and_sends_nothing(cells, clean_runtime):
    cells.good("%load_engine echo")
    assert "%%chat --to poems" in cells.good("%%chat --help\nhello")
    assert "--as second" in cells.good("%load_engine --help")
    assert "%chat undo" in cells.good("%%chat?")
    assert "%engine use" in cells.good("%engine help")
    assert clean_runtime.chat.turns == ()


def test_without_a_model_the_loader_says_what_is_loaded_and_how_to_load(cells):
    assert "%load_engine smollm2" in cells.good("%load_engine")
    cells.good("%load_engine echo --as mine")
    assert "mine" in cells.good("%load_engine")
    assert "echo" in cells.good("%engine info")


def test_a_cell_is_known_by_the_id_and_the_request_of_its_message(bare_shell):
    class Kernel:
        def get_parent(self, channel):
            return {"header": {"msg_id": "request-7"}, "metadata": {"cellId": "cell-3"}}

    class InKernel:
        kernel = Kernel()
        execution_count = 9

    ref = cell_ref(InKernel())
    assert (ref.cell_id, ref.execution_id) == ("cell-3", "request-7")
    plain = cell_ref(bare_shell)
    assert plain.cell_id is None
    assert plain.execution_id == cell_ref(bare_shell).execution_id


def test_the_notebook_is_known_by_what_servers_and_editors_say(bare_shell, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert notebook_path(bare_shell) == ""
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/ada/talk.ipynb")
    assert notebook_path(bare_shell) == "/home/ada/talk.ipynb"
    monkeypatch.setitem(bare_shell.user_ns, "__vsc_ipynb_file__", "/home/ada/code.ipynb")
    assert notebook_path(bare_shell) == "/home/ada/code.ipynb"


def test_sixty_interrupts_at_any_bytecode_leave_whole_rounds_only(cells, clean_runtime):
    """The signal comes from another thread after a drawn time, so it falls anywhere in the magic's own code."""
    import random

    chance = random.Random(11)
    cells.good("%load_engine echo:delay=0.001")
    handler = signal.getsignal(signal.SIGINT)
    interrupted = 0
    for number in range(60):
        timer = threading.Timer(chance.uniform(0.0, 0.06), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            with_loop = number % 3 == 0
            code = "get_ipython().run_cell_magic('chat', '--append --quiet', 'a b c d e f g h i j k l')"
            result = cells.shell.run_cell(f"for _ in range(3): {code}" if with_loop else code)
            interrupted += not result.success
            timer.join()
        except KeyboardInterrupt:  # outside the cell: it fell into the shell's own code, or after it
            timer.join()
        assert signal.getsignal(signal.SIGINT) is handler
        assert not clean_runtime.chat.is_busy
        for turn in clean_runtime.chat.turns:
            assert turn.answer.text
            assert turn.interrupted or turn.answer.text == turn.prompt.text
        stored = {each.name: each.turns for each in clean_runtime.list_chats()}
        assert stored.get(clean_runtime.chat.conversation.name, 0) == len(clean_runtime.chat.conversation.turns)
    assert interrupted > 5
