"""Puts a folder on the Hugging Face Hub as one commit, with the Hub's own library, and says its refusals in our words.

What is in the folder is no matter here. A token is sent to the Hub alone, and stands in no message.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kani_nb._secrets import without_secrets
from kani_nb.engines.hub_http import HubToken, endpoint, find_token, is_offline, public_url
from kani_nb.errors import ConfigError, EngineError, GatedModelError, ModelUnavailableError, UnknownModelError

#: Weights of an earlier push that the new ones replace, so that no loader finds a mixture. Their history stays.
_REPLACED = ["model*.safetensors", "model.safetensors.index.json"]


def require_push(repo_id: str, token: str | None = None) -> HubToken:
    """Refuse before anything is written when a push to `repo_id` cannot succeed; else the token to do it with.

    Raises:
        ConfigError: there is no token, or `repo_id` cannot be a repository's name.
        GatedModelError: the token is none of the Hub's.
        ModelUnavailableError: offline, or the Hub does not answer.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(
            f"a repository cannot be called {repo_id!r}", why=str(error).splitlines()[0], fix="write you/your-model"
        ) from None
    if is_offline():
        raise ModelUnavailableError(
            f"{repo_id} cannot be pushed to", why="HF_HUB_OFFLINE forbids asking the Hub", fix="unset it"
        )
    access = find_token(token)
    if access is None:
        raise ConfigError(
            f"pushing to {repo_id} needs a token, and none was found",
            fix="make one with the role 'write' on https://huggingface.co/settings/tokens and set HF_TOKEN "
            "(in Colab: Secrets), or log in with `hf auth login`",
        )
    with _refusals(repo_id, access):
        _api(access).whoami()
    return access


def push_folder(folder: Path, repo_id: str, access: HubToken, *, private: bool | None, commit_message: str) -> str:
    """Push every file of `folder` to `repo_id` in one commit, and give the repository's address.

    The repository is made when it is not there, and filled further when it is. Blocks. Until the commit at the end
    nothing of it is seen on the Hub, so that an interrupted push changes nothing there.

    Raises:
        GatedModelError: the token may not write there.
        UnknownModelError: there is no such user or organization.
        ModelUnavailableError: the Hub does not answer, or refuses for now.
    """
    api = _api(access)
    with _refusals(repo_id, access), _no_progress_bars():
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            folder_path=folder, repo_id=repo.repo_id, commit_message=commit_message, delete_patterns=_REPLACED
        )
        return f"{public_url(endpoint())}/{repo.repo_id}"


def _api(access: HubToken) -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint(), token=access.value)


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Progress is shown once, by whoever asked for it."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _refusals(repo_id: str, access: HubToken) -> Iterator[None]:
    """Errors of the Hub's library in our words; it brings its own HTTP library, which differs by version."""
    from huggingface_hub.errors import HfHubHTTPError

    transport = HfHubHTTPError.__mro__[1]
    try:
        yield
    except (RuntimeError, OSError, transport) as outer:
        # A file that could not be sent is told as a RuntimeError around the reason.
        error = outer.__cause__ if isinstance(outer, RuntimeError) and outer.__cause__ is not None else outer
        if isinstance(error, HfHubHTTPError):
            raise _refusal(error, repo_id, access) from None
        if isinstance(error, RuntimeError) or not isinstance(error, transport | OSError):
            raise
        raise ModelUnavailableError(
            f"{repo_id} could not be pushed, since {public_url(endpoint())} could not be reached",
            why=_clean(str(error) or type(error).__name__, access),
            fix="check the network and the proxy (`%kani doctor` shows what was found), and run it again",
        ) from None


def _refusal(error: Any, repo_id: str, access: HubToken) -> EngineError:
    code = error.response.status_code
    said = _clean(getattr(error, "server_message", None) or "", access)
    if code in (401, 403):
        return GatedModelError(
            f"{repo_id} cannot be pushed to ({code})",
            why=f"{access} was refused" + (f": {said}" if said else ""),
            fix="take a token with the role 'write' for that user or organization "
            f"({public_url(endpoint())}/settings/tokens)",
        )
    if code == 404:
        return UnknownModelError(
            f"there is no repository {repo_id!r} on {public_url(endpoint())}, and it could not be made", why=said
        )
    return ModelUnavailableError(
        f"{public_url(endpoint())} answered {code} when {repo_id} was pushed",
        why=said or ("the server failed" if code >= 500 else "the request was refused"),
        fix="nothing was changed there; run it again later",
    )


def _clean(text: str, access: HubToken) -> str:
    """One line of `text`, with no token in it."""
    first = next(iter(text.strip().splitlines()), "")
    return without_secrets(first.replace(access.value, "[token]"))[:300]
