"""Completion of files, folders and branches, and of line magics further down a cell."""

import pytest
from IPython.core.completer import provisionalcompleter


def completed(shell, text):
    with provisionalcompleter():
        return [each.text for each in shell.Completer.completions(text, len(text))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "talk.json").write_text("{}")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").write_text("")
    (tmp_path / ".hidden").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%chat load ta", ["talk.json"]),
        ("%chat save mod", ["models/"]),
        ("%load_engine ./mod", ["./models/"]),
        ("%load_engine ./models/ti", ["./models/tiny.gguf"]),
        ("x = 1\n%chat hist", ["history"]),
    ],
)
def test_paths_are_completed_and_nothing_else(cells, folder, line, expected):
    assert completed(cells.shell, line) == expected


def test_branches_are_completed_by_their_numbers(cells):
    cells.good("%load_engine echo")
    cells.good("%%chat\nhello")
    cells.good("%chat retry")
    assert completed(cells.shell, "%chat switch ") == ["1", "2"]


def test_python_s_own_names_are_not_offered_on_a_line_of_ours(cells):
    assert "print" not in completed(cells.shell, "%chat undo pri")
    assert "print" not in completed(cells.shell, "%load_engine pri")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%%chat -a ta", ["talk.json"]),
        ("%%chat --attach mod", ["models/"]),
        ("%%chat --attach=models/ti", ["models/tiny.gguf"]),
        ("%%chat -a talk.json -a ./mod", ["./models/"]),
        ("%%chat --att", ["--attach"]),
    ],
)
def test_paths_are_completed_after_what_attaches_them(cells, folder, line, expected):
    assert completed(cells.shell, line) == expected
