"""`%%chat --schema TYPE --into NAME` and `--logprobs` in cells."""

import pytest

SCRIPT = """
import kani_nb, pydantic
from kani_nb.engines.scripted import ScriptedEngine
class City(pydantic.BaseModel):
    name: str
    people: int
number = 3
engine = kani_nb.runtime().use(ScriptedEngine(ANSWERS), name="script")
"""
PARIS = '{"name": "Paris", "people": 2100000}'


def script(cells, *answers):
    cells.good(SCRIPT.replace("ANSWERS", ", ".join(map(repr, answers))))


def test_into_gets_the_object(cells):
    script(cells, PARIS)
    printed = cells.good("%%chat --schema City --into city\na city")
    assert PARIS in printed
    assert cells.shell.user_ns["city"].people == 2_100_000


def test_an_expression_may_be_the_type(cells):
    script(cells, "[1, 2]")
    cells.good("%%chat --schema list[int] --into found\ngo")
    assert cells.shell.user_ns["found"] == [1, 2]


def test_a_try_that_did_not_fit_is_shown_and_is_no_part_of_the_turn(cells):
    script(cells, "Paris.", PARIS)
    printed = cells.good("%%chat --schema City --into city\na city")
    assert "the answer does not fit City: Invalid JSON" in printed
    assert "the model tries again" in printed
    assert "Paris." not in cells.good("%chat show")


def test_a_type_that_is_never_met_fails_the_cell_and_keeps_nothing(cells):
    script(cells, "no idea")
    printed = cells.bad("%%chat --quiet --schema City --into city\na city")
    assert "no answer fitted City in 3 tries" in printed
    assert "city" not in cells.shell.user_ns
    assert "0 turns" in cells.good("%chat history")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("Cty", "there is no type 'Cty'\n→ did you mean City?"),
        ("number", "3 cannot be an answer's type"),
        ("'list[integer]'", "--schema 'list[integer]' is no type: name 'integer' is not defined"),
        ("'1 +'", "is no type"),
        ("City.nothing", "City has no 'nothing'"),
    ],
)
def test_what_is_no_type_is_refused_before_anything_is_asked(cells, name, complaint):
    script(cells, "never")
    assert complaint in cells.bad(f"%%chat --schema {name}\ngo")
    assert "0 turns" in cells.good("%chat history")


def test_an_answer_that_the_token_limit_cuts_says_so_and_is_not_asked_for_again(cells):
    script(cells, '{"name": "a very long name of a city that goes on"')
    printed = cells.bad("%%chat --quiet --schema City --max-new-tokens 3\na city")
    assert "the answer was cut at 3 tokens, before it was a whole City" in printed
    assert "--max-new-tokens" in printed


def test_the_reply_is_there_beside_the_object(cells):
    script(cells, PARIS)
    cells.good("%%chat --schema City --into city\na city")
    assert cells.shell.user_ns["kani_nb"].runtime().chat.reply.value == cells.shell.user_ns["city"]


def test_probabilities_are_in_the_reply_or_the_engine_says_that_it_has_none(cells, tiny_model):
    script(cells, "hello")
    assert "this engine gives no probabilities of tokens" in cells.good("%%chat --logprobs --into reply\ngo")
    cells.good(f"%load_engine {tiny_model} --dtype float32 --threads 1")
    cells.good("%%chat --logprobs 2 --max-new-tokens 4 --into reply\ngo")
    reply = cells.shell.user_ns["reply"]
    assert "".join(each.text for each in reply.logprobs) == reply.text
    assert all(len(each.alternatives) == 2 for each in reply.logprobs)
    assert "logprobs is 99" in cells.bad("%%chat --logprobs 99\ngo")
