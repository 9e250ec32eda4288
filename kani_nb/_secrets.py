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

#: A name and a password before a server's host; a password may hold a slash, which ends any host. All of these have
#: bounds, because servers' own words are searched too, and some are made to be slow.
_USERINFO = re.compile(
    r"(?P<scheme>\bhttps?://)(?:[^\s/?#@]{0,256}|[^\s/?#@:\[\]]{0,64}:(?!\d{1,5}(?:[/?#]|$))[^\s@]{0,256})@",
    re.IGNORECASE,
)
#: The same where `http://` was forgotten; `openai:MODEL@host:8000` has a model before its host.
_BARE_USERINFO = re.compile(
    r"(?<![\w:/.-])(?!(?:openai|vllm|ollama|lmstudio|hf):)[\w.+-]{1,64}:[^\s@/:]{1,256}@"
    r"(?=localhost\b|\d{1,3}(?:\.\d{1,3}){3}|[\w.-]+:\d{2,5})",
    re.IGNORECASE,
)
#: A key in a server's address.
_IN_QUERY = re.compile(
    r"(?P<before>\bhttps?://[^\s'\"#]{0,512}[?&](?!(?:max|min)[-_])"
    r"[\w.-]{0,24}(?:key|token|secret|passw|auth|sig)[\w.-]{0,24}=)[^\s&#'\"]+",
    re.IGNORECASE,
)


def holds_secret(line: str) -> bool:
    """Whether a line holds a token, an option that would carry one, or a server's address with a password or a key."""
    return any(pattern.search(line) for pattern in (_OPTION, _ASSIGNED, _TOKEN, _USERINFO, _BARE_USERINFO, _IN_QUERY))


def without_secrets(text: str) -> str:
    """`text` with everything that looks like a token replaced, and without the passwords and keys of addresses."""
    text = _IN_QUERY.sub(lambda found: f"{found['before']}[secret]", text)
    text = _BARE_USERINFO.sub("", _USERINFO.sub(lambda found: found["scheme"], text))
    return _TOKEN.sub("[token]", text)
