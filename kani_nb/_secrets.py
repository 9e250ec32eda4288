"""What a token looks like, wherever one is typed: in a cell, on a command line. Nothing here reads or stores one."""

from __future__ import annotations

import re

#: Options that would carry a secret, abbreviated or not; the counts of tokens that engines take are none.
_OPTION = re.compile(
    r"(?:^|\s)--?(?:"
    r"(?!-?(?:max|min|eos|bos|pad))[\w-]*?(?:tok|toke|token|api[-_]?key|passw(?:or)?d|secret)"
    r"|(?:hf|auth|use[-_]auth|access)(?:[-_][\w-]*)?"
    r")(?=[\s=]|$)",
    re.IGNORECASE,
)
#: An assignment of one, with or without dashes before it.
_ASSIGNED = re.compile(
    r"(?<![\w-])(?!-*(?:max|min|eos|bos|pad))[\w-]*(?:token|api[-_]?key|password|secret)\s*=\s*['\"]?[\w.-]{6,}",
    re.IGNORECASE,
)
#: What tokens of Hugging Face, OpenAI, GitHub and Google look like; a model's name has a slash or is shorter.
_TOKEN = re.compile(
    r"(?<![\w/])(?:hf_[A-Za-z0-9]{6,}|sk-[A-Za-z0-9_-]{10,}|gh[pousr]_[A-Za-z0-9]{16,}|AIza[\w-]{20,})(?![\w/])"
)


def holds_secret(line: str) -> bool:
    """Whether a line holds a token, or an option that would carry one."""
    return any(pattern.search(line) for pattern in (_OPTION, _ASSIGNED, _TOKEN))


def without_secrets(text: str) -> str:
    """`text` with everything that looks like a token replaced."""
    return _TOKEN.sub("[token]", text)
