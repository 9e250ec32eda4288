"""What argparse says of a wrong line, as sentences for people."""

from __future__ import annotations

import re

_KINDS = {"int": "a whole number", "float": "a number"}
_REWRITTEN = (
    (
        re.compile(r"argument (?P<name>\S+): invalid (?P<kind>int|float) value: (?P<value>.+)"),
        "{name} is {value}: it must be {kind}",
    ),
    (re.compile(r"argument (?P<name>\S+): invalid \S+ value: (?P<value>.+)"), "{name} cannot be {value}"),
    (
        re.compile(r"argument (?P<name>\S+): invalid choice: (?P<value>.+) \(choose from (?P<known>.+)\)"),
        "{name} is {value}: it must be one of {known}",
    ),
    (re.compile(r"argument (?P<name>\S+): expected (?:one|at least one) argument"), "{name} needs a value after it"),
    (
        re.compile(r"argument (?P<name>\S+): ignored explicit argument (?P<value>.+)"),
        "{name} takes no value, not {value}",
    ),
    (re.compile(r"unrecognized arguments: (?P<value>.+)"), "{value} cannot stand here"),
    (re.compile(r"the following arguments are required: (?P<name>.+)"), "{name} is missing"),
    (re.compile(r"ambiguous option: (?P<name>\S+) could match (?P<known>.+)"), "{name} may mean {known}"),
)


def in_plain_words(message: str) -> str:
    """What argparse said of a wrong line, without its own terms; as it is where it says something else."""
    message = " ".join(message.split())
    for pattern, sentence in _REWRITTEN:
        found = pattern.fullmatch(message)
        if found is not None:
            words = {
                name: value.replace("'", "") if name == "known" else value for name, value in found.groupdict().items()
            }
            return sentence.format(**{**words, "kind": _KINDS.get(words.get("kind", ""), "")})
    return message
