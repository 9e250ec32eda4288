"""The table of engines: in the README as it is generated, and true of the classes."""

import inspect
import re
from pathlib import Path

import pytest

from kani_nb.engines.kinds import Ability, kinds, markdown_table
from kani_nb.engines.registry import our_engine_names, parse_spec

README = Path(__file__).parents[2] / "README.md"
KINDS = list(kinds())


def test_the_readme_has_the_table_that_is_generated():
    found = re.search(
        r"<!-- engines: kani-nb engines -->\n(.*?)\n<!-- /engines -->", README.read_text("utf-8"), re.DOTALL
    )
    assert found is not None
    assert found[1] == markdown_table(), "put the output of `kani-nb engines` into the README"


def test_each_engine_of_ours_is_in_it():
    assert [name for name, _, _ in KINDS] == our_engine_names()


@pytest.mark.parametrize(("name", "found", "kind"), KINDS, ids=[each[0] for each in KINDS])
def test_what_it_says_holds_for_the_class(name, found, kind, monkeypatch):
    monkeypatch.setattr("kani_nb.engines.registry._has_llamacpp", lambda: True)
    assert parse_spec(kind.example.removeprefix("%load_engine ").split(" --")[0]).engine == name
    holds = inspect.getattr_static(found, "holds_to_schemas")
    assert (Ability.SCHEMAS in kind.can) == (holds is True or isinstance(holds, property))
    extras = re.findall(r"kani-nb\[(\w+)\]", kind.install)
    assert all(f"\n{each} = [" in (README.parent / "pyproject.toml").read_text("utf-8") for each in extras)
