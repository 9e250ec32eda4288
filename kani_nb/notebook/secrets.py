"""Tokens never belong into a cell: one that is typed there is refused, and asked for without an echo instead.

A notebook is saved, shared and committed with its cells. Nothing here stores a token: it ends in this process's
environment, where huggingface_hub looks for it (after Colab's Secrets, which it reads by itself).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from kani_nb._secrets import holds_secret, without_secrets
from kani_nb.errors import ConfigError

__all__ = ["ask_token", "error_words", "refuse_secrets", "without_secrets"]

_ADVICE = (
    "set HF_TOKEN in the environment before the kernel starts, or in Colab's Secrets, or run %kani token and paste it "
    "at the hidden prompt; then remove it from this {place}, and revoke it if the notebook was shared"
)

#: The same where a server is named: Hugging Face's token would not help there.
_SERVER_ADVICE = (
    "set KANI_NB_API_KEY in the environment before the kernel starts (OPENAI_API_KEY for OpenAI itself), and name the "
    "bare address; a server that wants a name and a password, or a key in its address, is given whole in "
    "OPENAI_BASE_URL and loaded with openai:MODEL; then remove it from this {place}, and revoke it if the notebook was "
    "shared"
)
_SERVER = re.compile(r"(?i)\bhttps?://|(?:^|\s)(?:openai|vllm):|:[^\s@/]+@")


def refuse_secrets(line: str, place: str = "cell") -> None:
    """Raise if a magic's line, or a control of a panel, holds a token, before anything can repeat it.

    Raises:
        ConfigError: the line holds a token, an option that would, or an address with a password or a key; the message
            does not repeat it.
    """
    if not holds_secret(line):
        return
    what, advice = ("a password or a key", _SERVER_ADVICE) if _SERVER.search(line) else ("a token", _ADVICE)
    why, fix = "it would be saved with the notebook", advice.format(place=place)
    raise ConfigError(f"{what} does not belong into a {place}", why=why, fix=fix) from None


def error_words(error: Exception) -> str:
    """An error that nobody thought of, for a page: its class, and what it says without secrets."""
    return without_secrets(f"{type(error).__name__}: {str(error)[:300]}")


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
