"""The Hugging Face Hub as the rest of the package sees it: what is cached, how to get more, what the doctor shows.

Requests and their refusals are in `hub_http`, one repository's download in `hub_download`.
"""

from __future__ import annotations

import contextlib
import os
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from kani_nb.engines.hub_download import download, repo_folder, repo_info
from kani_nb.engines.hub_http import HubToken, ca_bundle, endpoint, find_token, is_offline, public_url
from kani_nb.engines.sources_cache import Fetch, cache_folder, free_bytes, hub_cache_folder, is_writable
from kani_nb.engines.wheel_model import read_stamp

__all__ = [
    "CachedModel",
    "HubEnvironment",
    "HubToken",
    "cached_models",
    "cached_snapshot",
    "fetch_repo",
    "find_token",
    "hub_environment",
]


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model on this disk: the name to load it by, its folder, its bytes, and where it came from."""

    name: str
    folder: Path
    size_bytes: int
    origin: str


@dataclass(frozen=True, slots=True)
class HubEnvironment:
    """What would be used to reach the Hub, free of secrets."""

    endpoint: str
    is_offline: bool
    proxies: dict[str, str]
    ca_bundle: str | None
    ca_bundle_exists: bool
    hub_cache: Path
    hub_cache_is_writable: bool
    hub_cache_free_bytes: int
    own_cache: Path
    own_cache_is_writable: bool
    own_cache_free_bytes: int
    token_source: str | None


def cached_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of `repo` at `revision` (branch, tag or commit; default main) in the Hub's cache, complete or not."""
    root = repo_folder(repo)
    commit = revision or "main"
    with contextlib.suppress(OSError, ValueError):
        commit = (root / "refs" / commit).read_text(encoding="utf-8").strip()
    snapshots = root / "snapshots"
    if not commit or Path(commit).name != commit:
        return None
    if (snapshots / commit).is_dir():
        return snapshots / commit
    return None


def fetch_repo(
    repo: str,
    revision: str | None,
    fetch: Fetch,
    *,
    allow_pickle: bool = False,
    token: HubToken | None = None,
    answer_within_s: float = 10.0,
) -> Path:
    """Download what loading `repo` takes into the Hub's cache, and give the folder. Blocks.

    Raises:
        UnknownModelError: no such repository or revision.
        GatedModelError: access must be granted first.
        ModelUnavailableError: no answer, no space, a broken connection, interrupted.
        ModelFilesError: no weights that may be loaded, or other bytes than the Hub announced.
    """
    fetch.say("asking", f"{public_url(endpoint())} for {repo}")
    info = repo_info(repo, revision, token, fetch, answer_within_s)
    return download(info, revision, fetch, allow_pickle=allow_pickle, token=token)


def cached_models() -> list[CachedModel]:
    """Every model with weights in the Hub's cache and in our own, by name."""
    found = [*_own_models(cache_folder() / "models"), *_hub_models(hub_cache_folder())]
    return sorted(found, key=lambda each: each.name.lower())


def _own_models(folder: Path) -> list[CachedModel]:
    found = []
    for path in _folders(folder):
        stamp = read_stamp(path)
        if stamp is not None and not path.name.startswith("."):
            found.append(CachedModel(str(stamp.get("alias")), path, _folder_bytes(path), str(stamp.get("origin"))))
    return found


def _hub_models(cache: Path) -> list[CachedModel]:
    found = []
    for root in _folders(cache):
        if not root.name.startswith("models--"):
            continue
        repo = root.name.removeprefix("models--").replace("--", "/", 1)
        snapshots = _folders(root / "snapshots")
        snapshot = cached_snapshot(repo) or (snapshots[-1] if snapshots else None)
        if snapshot is None or not (snapshot / "config.json").is_file():
            continue
        weights = [*snapshot.glob("*.safetensors"), *snapshot.glob("pytorch_model*.bin")]
        if any(path.is_file() for path in weights):
            origin = f"Hugging Face Hub, {repo}@{snapshot.name[:7]}"
            found.append(CachedModel(repo, snapshot, _folder_bytes(snapshot), origin))
    return found


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def hub_environment() -> HubEnvironment:
    """The addresses, proxies, certificates, caches and login in use here; asks nobody.

    Raises:
        ConfigError: `HF_ENDPOINT` is not an http address.
    """
    bundle = ca_bundle()
    token = find_token()
    hub, own = hub_cache_folder(), cache_folder()
    return HubEnvironment(
        endpoint=public_url(endpoint()),
        is_offline=is_offline(),
        proxies={name: _public_proxy(name, url) for name, url in sorted(urllib.request.getproxies().items())},
        ca_bundle=bundle,
        ca_bundle_exists=bundle is None or Path(bundle).exists(),
        hub_cache=hub,
        hub_cache_is_writable=is_writable(hub),
        hub_cache_free_bytes=free_bytes(hub),
        own_cache=own,
        own_cache_is_writable=is_writable(own),
        own_cache_free_bytes=free_bytes(own),
        token_source=token.source if token else None,
    )


def _public_proxy(name: str, url: str) -> str:
    if name == "no":
        return url
    has_scheme = "://" in url
    shown = public_url(url if has_scheme else f"http://{url}")
    return shown if has_scheme else shown.removeprefix("http://").rstrip(os.sep)
