"""`await chat.ask(...)` in a cell, and its interrupt, in kernels of every version."""

import time

import pytest

from tests.kernels.driver import VERSIONS, kernel

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("version", VERSIONS)
def test_an_awaited_answer_is_interrupted_at_once_and_kept(own_home, version):
    with kernel(version, env={"KANI_NB_HOME": str(own_home)}) as running:
        assert running.run("%load_ext kani_nb\n%load_engine echo:delay=0.1").status == "ok"
        running.run("import kani_nb; chat = kani_nb.runtime().chat")
        assert running.value("(await chat.ask('hello there')).text") == "hello there"
        request = running.send("await chat.ask('word ' * 100)")
        time.sleep(1)
        asked = time.monotonic()
        running.interrupt()
        outcome = running.collect(request)
        assert outcome.status == "error"
        assert time.monotonic() - asked < 3, "the answer alone would have taken ten seconds"
        # It is committed on the loop's thread, which nobody waits for where the cell itself was interrupted.
        while running.value("chat.turns[-1].interrupted") != "True":
            assert time.monotonic() - asked < 6
        streamed = "[event async for event in chat.stream('one two three')][-1].text"
        assert running.value(streamed) == "one two three"
