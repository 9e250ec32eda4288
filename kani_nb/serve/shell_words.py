"""What messages advise is written for notebooks; on a command line the same is said in its own commands."""

from __future__ import annotations

import re

_SAID = (
    (re.compile(r"%load_engine(?= [\w./~])"), "kani-nb chat"),
    (re.compile(r"%(?:kani )(?=doctor)"), "kani-nb "),
    (re.compile(r"%engine (?=plan|compare|prefetch)"), "kani-nb "),
    (re.compile(r"%(?=pip )"), ""),
    (re.compile(r" \(%unload_engine\)"), ""),
)


def for_shell(text: str) -> str:
    """`text` with the commands of a shell for the magics that have one."""
    for magic, command in _SAID:
        text = magic.sub(command, text)
    return text
