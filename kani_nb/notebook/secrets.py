"""Tokens never belong into a cell: one that is typed there is refused, and asked for without an echo instead.

A notebook is saved, shared and committed with its cells. Nothing here stores a token: it ends in this process's
environment, where huggingface_hub looks for it (after Colab's Secrets, which it reads by itself).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from kani_nb.errors import ConfigError

#: Options that would carry a secret as their value.
_OPTION = re.compile(
    r"(?:^|\s)--?(?:hf[-_]?|use[-_]auth[-_]|auth[-_]|access[-_])?(?:token|api[-_]?key|password)(?=[\s=]|$)"
)
#: What tokens of Hugging Face, OpenAI, GitHub and Google look like; a model's name has a slash or is shorter.
_TOKEN = re.compile(
    r"(?<![\w/])(?:hf_[A-Za-z0-9]{6,}|sk-[A-Za-z0-9_-]{10,}|gh[pousr]_[A-Za-z0-9]{16,}|AIza[\w-]{20,})(?![\w/])"
)

_ADVICE = (
    "set HF_TOKEN in the environment before the kernel starts, or in Colab's Secrets, or run %kani token and paste it "
    "at the hidden prompt; then remove it from this cell, and revoke it if the notebook was shared"
)


def refuse_secrets(line: str) -> None:
    """Raise if a magic's line holds a token, before anything can repeat it.

    Raises:
        ConfigError: the line holds a token, or an option that would; the message does not repeat it.
    """
    if _OPTION.search(line) or _TOKEN.search(line):
        raise ConfigError(
            "a token does not belong into a cell", why="it would be saved with the notebook", fix=_ADVICE
        ) from None


def without_secrets(text: str) -> str:
    """`text` with everything that looks like a token replaced."""
    return _TOKEN.sub("[token]", text)


def ask_token(ask: Callable[[str], str], variable: str = "HF_TOKEN") -> None:
    """Put a token, asked for at a hidden prompt, into this process's environment.

    Args:
        ask: `getpass.getpass`, or what stands in for it.
        variable: the environment variable to set; it ends with the process.

    Raises:
        ConfigError: there is nobody to ask, or nothing was entered.
    """
    try:
        token = ask(f"{variable} (not shown): ").strip()
    except (EOFError, NotImplementedError) as error:
        raise _nobody_to_ask(variable) from error
    except Exception as error:
        # ipykernel's own class; naming it would import the kernel into terminals.
        if type(error).__name__ != "StdinNotImplementedError":
            raise
        raise _nobody_to_ask(variable) from None
    if not token:
        raise ConfigError("nothing was entered", fix="%kani token asks again")
    os.environ[variable] = token


def _nobody_to_ask(variable: str) -> ConfigError:
    return ConfigError(
        "cannot ask for a token here", why="this front end takes no input", fix=f"set {variable} in the environment"
    )
