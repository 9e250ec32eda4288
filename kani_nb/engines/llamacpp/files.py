"""Which GGUF file a name means, and where it is: on this disk, in a repository of the Hub, or in a package.

`find_gguf` blocks and belongs in a worker thread. It reads headers only; a file that is cut off is refused here, with
the reason, before llama.cpp sees it.
"""

from __future__ import annotations

import fnmatch
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kani_nb.engines.base import ProgressCallback
from kani_nb.engines.hub import cached_snapshot, find_token
from kani_nb.engines.hub_download import RepoFile, described, place_file, repo_folder, repo_info, write_ref
from kani_nb.engines.hub_http import is_offline
from kani_nb.engines.llamacpp.packaged import obtain_gguf
from kani_nb.engines.sources_aliases import find_alias
from kani_nb.engines.sources_cache import Fetch, human_bytes, require_space
from kani_nb.engines.sources_gguf import GgufHeader, read_gguf_header
from kani_nb.errors import ConfigError, ModelFilesError, ModelUnavailableError, UnknownModelError, did_you_mean

_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
#: What llama.cpp's own programs take where a repository has several and none was named.
_USUAL = "q4_k_m"
#: Of a repository's file names, those that are wanted.
Choose = Callable[[list[str]], list[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufRequest:
    """Which file is wanted. Either `path`, or an `alias`, or `repo` with `filename` (a name, a pattern, or None)."""

    path: str | None = None
    alias: str | None = None
    repo: str | None = None
    filename: str | None = None
    revision: str | None = None
    token: str | None = None
    local_only: bool = False

    @property
    def name(self) -> str:
        """For people, and for `%load_engine`."""
        if self.repo is not None:
            return f"{self.repo}:{self.filename}" if self.filename else self.repo
        return self.path or self.alias or ""


@dataclass(frozen=True, slots=True)
class GgufFiles:
    """A model's files: `path` is the only one, or the first of its shards."""

    path: Path
    origin: str
    header: GgufHeader
    size_bytes: int


def parse_model(text: str) -> dict[str, str]:
    """What a `%load_engine` line names: fields of a `GgufRequest`.

    `FILE.gguf`, an alias, `org/model:FILE.gguf`, `org/model:Q4_K_M` or `org/model`, each with or without `llamacpp:`.

    Raises:
        ConfigError: nothing is named.
    """
    name = re.sub(r"^llamacpp:", "", text.strip(), flags=re.IGNORECASE).strip()
    if not name:
        raise ConfigError("no model was named", fix="%load_engine llamacpp:smollm2")
    if find_alias(name) is not None:
        return {"alias": name}
    repo, colon, filename = name.partition(":")
    if _REPO.fullmatch(repo) and not Path(name).expanduser().exists():
        if colon:
            return {"repo": repo, "filename": filename}
        if not name.lower().endswith(".gguf"):
            return {"repo": repo}
    return {"path": name}


def find_gguf(
    request: GgufRequest, progress: ProgressCallback | None = None, cancelled: threading.Event | None = None
) -> GgufFiles:
    """Find the file, fetching it when it is not on this disk. Blocks; setting `cancelled` ends it soon.

    Raises:
        UnknownModelError: there is no such file or repository; offers the near misses.
        ModelUnavailableError: it cannot be had from here.
        ModelFilesError: it is cut off, or a shard of it is missing.
        ConfigError: several files are meant.
    """
    fetch = Fetch(request.name, progress, cancelled)
    fetch.check()
    if request.alias is not None:
        return _packaged(request, fetch)
    if request.path is not None:
        path = _existing(Path(request.path).expanduser())
        return _whole(path, f"file {path}")
    return _from_hub(request, fetch)


def _packaged(request: GgufRequest, fetch: Fetch) -> GgufFiles:
    alias = find_alias(request.alias or "")
    assert alias is not None, "parse_model has seen it"
    if alias.wheel is None:
        raise UnknownModelError(
            f"the alias {alias.name} has no GGUF file",
            why=f"it stands for {alias.repo}, which holds safetensors",
            fix=f"%load_engine {alias.name} runs it with transformers; or name a repository of GGUF files",
        )
    path = obtain_gguf(alias.wheel, fetch)
    recipe = alias.wheel
    return _whole(path, f"the {recipe.package} {recipe.version} wheel ({recipe.quantization})")


def _existing(path: Path) -> Path:
    if path.is_dir():
        names = sorted(each.name for each in path.glob("*.gguf"))
        raise UnknownModelError(f"{path} is a folder", fix=f"name a file in it: {', '.join(names[:5]) or '*.gguf'}")
    if path.is_file():
        return path.absolute()
    near = [each.name for each in path.parent.glob("*.gguf")] if path.parent.is_dir() else []
    raise UnknownModelError(
        f"there is no file {path}",
        fix=did_you_mean(path.name, near) or f"the current folder is {Path.cwd()}; on the Hub: org/model:FILE.gguf",
    )


def shard_names(name: str) -> list[str]:
    """All shards of the model that `name` is a part of, in order; only itself where it is no shard."""
    match = _SHARD.search(name)
    if match is None:
        return [name]
    count = int(match[2])
    return [f"{name[: match.start()]}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _whole(path: Path, origin: str) -> GgufFiles:
    """The model that `path` belongs to, its shards all there and none of them cut off."""
    shards = [path.with_name(each) for each in shard_names(path.name)]
    if missing := [each.name for each in shards if not each.is_file()]:
        raise ModelFilesError(
            f"{len(missing)} of the {len(shards)} shards of {path.name} are missing",
            why=f"there is no {missing[0]} in {path.parent}",
            fix="download all of them into one folder",
        )
    headers = [read_gguf_header(each) for each in shards]
    size = sum(each.stat().st_size for each in shards)
    return GgufFiles(shards[0], f"{origin} (GGUF, {headers[0].architecture})", headers[0], size)


# -- the Hub -----------------------------------------------------------------------------------------------------------


def choose_files(repo: str, names: Sequence[str], pattern: str | None) -> list[str]:
    """The files of the one model among `names` that is meant: one, or all its shards.

    Raises:
        UnknownModelError: none is; offers the near misses.
        ConfigError: several are.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(each for each in names if each.lower().endswith(".gguf")):
        models.setdefault(_SHARD.sub(".gguf", name), []).append(name)
    if pattern is None:
        found = [each for each in models if "mmproj" not in each.lower()]
        usual = [each for each in found if _USUAL in each.lower()]
        found = usual if len(found) > 1 and len(usual) == 1 else found
    elif exact := [each for each, shards in models.items() if pattern == each or pattern in shards]:
        found = exact
    else:
        wanted = pattern if pattern.lower().endswith(".gguf") else f"*{pattern}*.gguf"
        found = [
            each
            for each, shards in models.items()
            if any(fnmatch.fnmatch(name.lower(), wanted.lower()) for name in (each, *shards))
        ]
    if len(found) == 1:
        return shard_names(models[found[0]][0])
    if not found:
        listed = ", ".join(models) or "none at all"
        raise UnknownModelError(
            f"{repo} has no GGUF file {pattern!r}" if pattern else f"{repo} has no GGUF file",
            why=f"it has {listed}",
            fix=did_you_mean(pattern, list(models)) if pattern else "%load_engine runs safetensors with transformers",
        )
    raise ConfigError(
        f"{repo} has {len(found)} models" + (f" that match {pattern!r}" if pattern else ""),
        why=f"they are {', '.join(found)}",
        fix=f"name one: %load_engine llamacpp:{repo}:{found[0]}",
    )


def _from_hub(request: GgufRequest, fetch: Fetch) -> GgufFiles:
    repo = request.repo or ""
    folder, names = fetch_from_hub(
        repo,
        lambda names: choose_files(repo, names, request.filename),
        fetch,
        revision=request.revision,
        token=request.token,
        local_only=request.local_only,
    )
    return _whole(folder / names[0], f"Hugging Face Hub, {repo}@{folder.name[:7]}, {names[0]}")


def fetch_from_hub(
    repo: str,
    choose: Choose,
    fetch: Fetch,
    *,
    revision: str | None = None,
    token: str | None = None,
    local_only: bool = False,
) -> tuple[Path, list[str]]:
    """The folder of a repository's revision in the Hub's cache, and the files in it that `choose` took. Blocks.

    The cache is taken when `choose` is content with what it holds.

    Raises:
        UnknownModelError, ModelUnavailableError, GatedModelError, ModelFilesError: as their names say.
    """
    if (held := _held(repo, choose, revision)) is not None:
        return held
    if local_only or is_offline():
        forbids = "local_only" if local_only else "HF_HUB_OFFLINE"
        raise ModelUnavailableError(
            f"{fetch.subject} is not in the local caches", why=f"and {forbids} forbids asking the Hub", fix="allow it"
        )
    secret = find_token(token)
    fetch.say("asking", f"the Hub for {repo}")
    info = repo_info(repo, revision, secret, fetch, 10.0)
    by_name = {each.path: each for each in info.files}
    wanted = choose(list(by_name))
    if missing := [each for each in wanted if each not in by_name]:
        raise ModelFilesError(f"{repo} lacks {missing[0]}", why=f"the model has {len(wanted)} shards")
    files: list[RepoFile] = [described(info, by_name[each], secret, fetch) for each in wanted]
    total = sum(each.size_bytes for each in files)
    snapshot = repo_folder(repo) / "snapshots" / info.commit
    fetch.say("download", f"{fetch.subject}: {human_bytes(total)} in {len(files)} files")
    require_space(snapshot, total, f"downloading {fetch.subject}")
    done = 0
    for file in files:
        place_file(info, file, snapshot, secret, fetch, done, total)
        done += file.size_bytes
    if revision != info.commit:
        write_ref(repo_folder(repo), revision or "main", info.commit)
    return snapshot, wanted


def _held(repo: str, choose: Choose, revision: str | None) -> tuple[Path, list[str]] | None:
    """The cached files, when exactly one model among those that are cached is meant."""
    folder = cached_snapshot(repo, revision)
    if folder is None:
        return None
    names = [each.relative_to(folder).as_posix() for each in folder.rglob("*") if each.is_file()]
    try:
        wanted = choose(names)
    except (ConfigError, UnknownModelError):
        return None
    return (folder, wanted) if set(wanted) <= set(names) else None
