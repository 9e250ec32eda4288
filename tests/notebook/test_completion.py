"""Tab completion of the magics' first line."""

import pytest

from kani_nb.notebook.completion import GENERATION_FLAGS, LOAD_FLAGS, Grammar, complete
from kani_nb.notebook.names import grammars
from kani_nb.notebook.verbs import VerbTable

GRAMMARS = {
    "%load_engine": Grammar({**LOAD_FLAGS, "--as": lambda: ["mine"]}, first=lambda: ["smollm2", "org/model"]),
    "%%chat": Grammar(
        {**GENERATION_FLAGS, "--to": lambda: ["holiday", "work"], "--tools": lambda: ["add", "ask"]},
        list_flags=("--tools",),
    ),
    "%chat": Grammar(first=lambda: ["open", "undo"], after={"open": lambda: ["holiday", "work"]}),
}


@pytest.mark.parametrize(
    ("line", "fragment", "names"),
    [
        ("%load_engine sm", "sm", ["smollm2"]),
        ("%load_engine org/", "org/", ["org/model"]),
        ("%load_engine --dt", "--dt", ["--dtype"]),
        ("%load_engine smollm2 --dtype bf", "bf", ["bfloat16"]),
        ("%load_engine smollm2 --dtype bfl", "bfl", ["bfloat16"]),
        ("%load_engine smollm2 --dtype=fl", "fl", ["float32", "float16"]),
        ("%load_engine smollm2 --as ", "", ["mine"]),
        ("%load_engine smollm2 --no-t", "--no-t", ["--no-trust-remote-code"]),
        ("%%chat --max", "--max", ["--max-new-tokens"]),
        ("%%chat --to w", "w", ["work"]),
        ("%%chat --tools a", "a", ["add", "ask"]),
        ("%%chat --tools add,as", "add,as", ["add,ask"]),
        ("%%chat --tools=add,as", "add,as", ["add,ask"]),
        ("%chat ", "", ["open", "undo"]),
        ("%chat un", "un", ["undo"]),
        ("%chat open ho", "ho", ["holiday"]),
        ("%chat undo ", "", []),
        ("  %chat un", "un", ["undo"]),
    ],
)
def test_options_verbs_and_names_are_completed(line, fragment, names):
    found = complete(GRAMMARS, line)
    assert found.fragment == fragment
    assert list(found.names) == names


@pytest.mark.parametrize("line", ["", "print(", "%chat", "%loa", "%%time x", "x = %chat un"])
def test_other_lines_are_left_to_others(line):
    assert complete(GRAMMARS, line) is None


def test_functions_and_types_of_the_notebook_are_offered_and_nothing_else(cells):
    cells.good("""
import pydantic, math
from kani_nb import ai_function
@ai_function
def add(a: int, b: int) -> int:
    return a + b
def plain(text: str): ...
class City(pydantic.BaseModel):
    name: str
number, _hidden = 3, plain
""")
    chat = grammars(*[VerbTable("%x", [])] * 3, lambda: cells.shell.user_ns)["%%chat"]
    assert list(complete({"%%chat": chat}, "%%chat --tools ").names) == ["add", "ai_function", "plain"]
    assert list(complete({"%%chat": chat}, "%%chat --schema C").names) == ["City"]
    assert list(complete({"%%chat": chat}, "%%chat --approve n").names) == ["never"]
