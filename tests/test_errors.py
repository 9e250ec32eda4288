"""Near misses: offered where they help, and not where any short word is like any other."""

import pytest

from kani_nb.errors import near_misses

OPTIONS = ["--max-new-tokens", "--min-p", "--seed", "--stop", "--system", "--top-k", "--top-p", "--to", "--help"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("--sed", ["--seed"]),
        ("--max-new-tokns", ["--max-new-tokens"]),
        ("--tpo-p", ["--top-p"]),
        ("--SEED", ["--seed"]),
        ("--bogus", []),
        ("--as", []),
        ("--n", []),
        ("--hlp", []),
        ("--held", []),
    ],
)
def test_only_what_was_probably_meant_is_offered(name, expected):
    assert near_misses(name, OPTIONS) == expected
