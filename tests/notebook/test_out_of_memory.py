"""Memory that really runs out, in a load and in an answer: the cell fails in one paragraph, nothing is lost."""

import pytest

from kani_nb.errors import OutOfMemoryError
from tests.memory import MIB, only_more

pytestmark = [pytest.mark.memory, pytest.mark.usefixtures("exact_allocator")]

OPTIONS = "--as wide --dtype float32 --threads 1 --no-sample"


def refused(cells, code):
    """What a cell that ran out of memory printed."""
    result, printed = cells.run(code)
    assert isinstance(result.error_in_exec, OutOfMemoryError)
    assert "Traceback" not in printed
    error = printed[printed.rindex("OutOfMemoryError") :]
    assert len(error.strip().splitlines()) == 2
    return printed


def test_a_load_that_does_not_get_its_memory_is_refused_and_succeeds_with_it(cells, clean_runtime, wide_model):
    with only_more(40 * MIB):
        printed = refused(cells, f"%load_engine {wide_model} {OPTIONS}")
    assert "out of memory while loading" in printed
    assert "%unload_engine another one first" in printed
    assert clean_runtime.engines == {}
    cells.good(f"%load_engine {wide_model} {OPTIONS}")
    cells.good("%%chat --max-new-tokens 4\nhello")


def test_an_answer_keeps_what_had_come_and_the_next_one_goes_on(cells, clean_runtime, wide_model):
    cells.good(f"%load_engine {wide_model} {OPTIONS}")
    cells.good("%%chat --max-new-tokens 4\nhello")
    with only_more(90 * MIB):
        printed = refused(cells, "%%chat --max-new-tokens 1000\nthe quick brown fox")
    assert "the answer so far is kept in the conversation" in printed
    assert "the engine still works" in printed
    cells.good("%%chat --max-new-tokens 4\nand now?")
    first, cut, after = clean_runtime.chat.turns
    assert (first.interrupted, cut.interrupted, after.interrupted) == (False, True, False)
    assert cut.prompt.text == "the quick brown fox"
    assert len(cut.answer.text) > 50
    assert cut.answer.text[:40] in printed
    assert cut.metrics["finish_reason"] == "error"
    assert 20 < cut.metrics["completion_tokens"] < 1000
    assert [each.turns for each in clean_runtime.list_chats()] == [3]
    assert "[interrupted]" in cells.good("%chat history")


def test_a_prompt_that_finds_no_room_adds_nothing(cells, clean_runtime, wide_model):
    cells.good(f"%load_engine {wide_model} {OPTIONS}")
    with only_more(90 * MIB):
        printed = refused(cells, "%%chat --max-new-tokens 4\n" + "the lazy dog " * 140)
    assert "not added to the conversation" in printed
    assert clean_runtime.chat.turns == ()
    cells.good("%%chat --max-new-tokens 4\nhello")
    assert len(clean_runtime.chat.turns) == 1
