"""Verbs under a noun."""

import pytest

from kani_nb.errors import ConfigError
from kani_nb.notebook.verbs import Verb, VerbTable, required, whole_number


@pytest.fixture
def calls():
    return []


@pytest.fixture
def table(calls):
    return VerbTable(
        "%chat",
        [Verb("undo [N]", "take back", calls.append), Verb("list", "all of them", calls.append)],
        examples=["%chat undo 2"],
        hint="%%chat is for prompts",
    )


def test_a_verb_gets_the_rest_of_its_line(table, calls):
    table.dispatch("undo  it's 2 ")
    assert calls == ["it's 2"]


def test_an_unknown_verb_offers_its_near_misses_and_the_hint(table, calls):
    with pytest.raises(ConfigError, match=r"no verb 'undoo'.*\n.*did you mean undo\?.*%%chat is for prompts"):
        table.dispatch("undoo 2")
    assert not calls


def test_a_verb_that_takes_nothing_says_so_and_does_nothing(table, calls):
    with pytest.raises(ConfigError, match=r"takes nothing after it.*\n.*%%chat is for prompts"):
        table.dispatch("list all the planets")
    assert not calls


@pytest.mark.parametrize("line", ["", "help", "--help"])
def test_help_lists_every_verb_and_an_example(table, capsys, line):
    table.dispatch(line)
    shown = capsys.readouterr().out
    assert "undo [N]" in shown
    assert "list" in shown
    assert "%chat undo 2" in shown


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two", "²"])
def test_only_whole_numbers_from_one_are_numbers(text):
    with pytest.raises(ConfigError, match="is not a number from 1"):
        whole_number(text, "%chat undo [N]")


def test_numbers_have_defaults_and_texts_are_required():
    assert whole_number("", "%chat undo [N]", 1) == 1
    assert whole_number("3", "%chat undo [N]") == 3
    with pytest.raises(ConfigError, match="needs something after it"):
        required("", "%chat open NAME")
