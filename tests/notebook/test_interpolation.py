"""Prompts are literal, and `{{expr}}` is the one interpolation."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kani_nb.errors import PromptError
from kani_nb.messages import ImagePart
from kani_nb.notebook.interpolation import interpolate

LITERAL = [
    '{"a": {"b": [1, 2]}}',
    "$HOME and $x and ${y} cost $5",
    r"\frac{1}{2} and $\sum_{i=0}^{n} x_{i}$ and \begin{align}{a}\end{align}",
    "f'{x}' and {x!r:>10} and {} and {{}}",
    "an opening {{ that never closes",
    "a closing }} that never opened",
    "%magic !shell ?help ;suppress",
    "def f():\n\treturn {'k': {1, 2}}\n",
    "\u00e9\U0001f600 \x00 tab\t",
]


@pytest.mark.parametrize("text", LITERAL)
def test_braces_dollars_json_and_latex_pass_untouched(text):
    assert interpolate(text, {"x": "WRONG", "HOME": "WRONG"}) == text


@given(st.text().filter(lambda text: "{{" not in text))
def test_any_text_without_two_braces_is_literal(text):
    assert interpolate(text, {}) == text


@given(st.text(alphabet="ab{}$\\\"' \n"))
def test_no_text_of_braces_raises_anything_but_a_prompt_error(text):
    try:
        result = interpolate(text, {"a": "A", "b": "B", "ab": "AB"})
    except PromptError as error:
        assert "nothing was sent" in str(error)
    else:
        assert isinstance(result, str)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{name}}", "Ada"),
        ("Hello {{ name.upper() }}!", "Hello ADA!"),
        ("{{name}}{{1 + 1}}", "Ada2"),
        ("{{ {'a': {'b': 1}}['a'] }}", "{'b': 1}"),
        ("{{ {1: 2}}}", "{1: 2}"),
        ("{{ '}}' }} end", "}} end"),
        ("{{name}}}", "Ada}"),
        ("{{\n  max(1,\n  2)\n}}", "2"),
        (r"\{{name}}", "{{name}}"),
        (r"\{{name}} is {{name}}", "{{name}} is Ada"),
        ("{{nothing}}", "None"),
        ("{{[n for n in range(3) if n in kept]}}", "[0, 2]"),
    ],
)
def test_an_expression_is_replaced_by_its_value(text, expected):
    assert interpolate(text, {"name": "Ada", "nothing": None, "kept": {0, 2}}) == expected


def test_what_an_expression_gave_is_not_looked_at_again():
    assert interpolate("{{a}}", {"a": "{{b}}", "b": "WRONG"}) == "{{b}}"


def test_each_expression_is_evaluated_once():
    calls = []
    assert interpolate("{{ calls.append(1) or len(calls) }}", {"calls": calls}) == "1"
    assert calls == [1]


def test_an_expression_that_raises_is_named_and_the_error_is_short():
    with pytest.raises(PromptError, match=r"\{\{1 / zero\}\} raised ZeroDivisionError") as caught:
        interpolate("before {{1 / zero}} after", {"zero": 0})
    assert len(str(caught.value).splitlines()) <= 2
    assert caught.value.__suppress_context__


def test_what_is_not_python_is_refused_with_the_escape():
    with pytest.raises(PromptError, match=r"is not a Python expression") as caught:
        interpolate("{{ for x in }} {{ok}}", {"ok": 1})
    assert r"\{{" in str(caught.value)


def test_a_table_is_given_as_markdown_and_as_text_where_it_cannot_be():
    class Table:
        def to_markdown(self):
            return "| a |\n|---|\n| 1 |"

    class Bare:
        def to_markdown(self):
            raise ImportError("tabulate")

        def __str__(self):
            return "a\n1"

    assert interpolate("{{t}}", {"t": Table()}) == "| a |\n|---|\n| 1 |"
    assert interpolate("{{t}}", {"t": Bare()}) == "a\n1"


def test_a_message_part_makes_the_prompt_a_tuple_of_parts():
    picture = ImagePart(b"png", "image/png")
    assert interpolate("see {{p}} there", {"p": picture}) == ("see ", picture, " there")
