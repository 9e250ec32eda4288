"""A model's configuration without its weights: what a plan needs, in a second, from a folder, a cache or the Hub.

Of a repository only `config.json` is fetched, and the sizes of its weight files are asked for. Nothing is kept on the
disk, so that a plan never leaves half a model in the Hub's cache.
"""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kani_nb.engines.base import ProgressCallback
from kani_nb.engines.gptq_checkpoint import refuse_or_explain
from kani_nb.engines.hub import cached_snapshot, find_token
from kani_nb.engines.hub_download import fetch_small_file, needed_files, repo_info
from kani_nb.engines.hub_http import HubToken, is_offline
from kani_nb.engines.sources import has_repository_name, unknown_model
from kani_nb.engines.sources_aliases import find_alias, shipped_config
from kani_nb.engines.sources_cache import Fetch
from kani_nb.engines.sources_checks import weight_files
from kani_nb.engines.sources_gguf import read_gguf_header
from kani_nb.engines.typed_paths import typed_path
from kani_nb.errors import ConfigError, ModelFilesError, ModelUnavailableError

_ANSWER_WITHIN_S = 10.0
_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """A configuration, and what is known of the weights that belong to it.

    Attributes:
        config: transformers' configuration object.
        name: what was asked for.
        folder: where the files are, when they are on this disk.
        file_bytes: of the weight files; None where that is not known.
        origin: where it was read, in a few words.
    """

    config: Any
    name: str
    folder: Path | None
    file_bytes: int | None
    origin: str


def config_of(
    model: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    progress: ProgressCallback | None = None,
    cancelled: threading.Event | None = None,
) -> ConfigSource:
    """The configuration of an alias, `org/model`, a folder or a `.gguf` file; no weights are read or fetched. Blocks.

    Raises:
        UnknownModelError: nothing has this name; offers the near misses.
        GatedModelError: its owner must grant access first.
        ModelUnavailableError: it is not on this disk, and the Hub does not answer.
        ModelFilesError: it is missing, broken, or of an architecture that this transformers does not know.
    """
    name = model.strip()
    fetch = Fetch(name, progress, cancelled)
    fetch.check()
    alias = find_alias(name)
    path = typed_path(name)
    if alias is None and path.exists():
        return _on_this_disk(name, path, trust_remote_code)
    if alias is None and not has_repository_name(name):
        raise unknown_model(name)
    repo = alias.repo if alias is not None else name
    folder = cached_snapshot(repo, revision)
    if folder is not None and (folder / _CONFIG).is_file():
        sizes = [each.stat().st_size for each in weight_files(folder)]
        config = _read(folder, name, trust_remote_code)
        return ConfigSource(config, name, folder, sum(sizes) or None, f"the Hub's cache, {repo}")
    if alias is not None and revision is None and shipped_config(alias.name) is not None:
        return _shipped(alias.name, trust_remote_code)
    if is_offline():
        raise ModelUnavailableError(
            f"{repo} is not in the local caches",
            why="and HF_HUB_OFFLINE forbids asking the Hub",
            fix=f"run `kani-nb prefetch {repo}` where there is a network, or drop HF_HUB_OFFLINE",
        )
    return _from_hub(name, repo, revision, find_token(token), fetch, trust_remote_code)


def _on_this_disk(name: str, path: Path, trust_remote_code: bool) -> ConfigSource:
    if path.is_dir():
        if not (path / _CONFIG).is_file():
            why = f"it has no {_CONFIG}"
            raise ModelFilesError(f"{name} is no model's folder", why=why, fix="name the folder that has one")
        config = _read(path, name, trust_remote_code)
        sizes = [each.stat().st_size for each in weight_files(path)]
        return ConfigSource(config, name, path, sum(sizes) or None, f"folder {path}")
    if path.suffix.lower() != ".gguf":
        raise refuse_or_explain(path)
    read_gguf_header(path)
    config = _read(path.parent, name, trust_remote_code, gguf_file=path.name)
    return ConfigSource(config, name, path.parent, path.stat().st_size, f"file {path}")


def _shipped(alias: str, trust_remote_code: bool) -> ConfigSource:
    import json

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _CONFIG).write_text(json.dumps(shipped_config(alias)), encoding="utf-8")
        config = _read(Path(folder), alias, trust_remote_code)
    return ConfigSource(config, alias, None, None, "shipped with kani_nb")


def _from_hub(
    name: str, repo: str, revision: str | None, token: HubToken | None, fetch: Fetch, trust_remote_code: bool
) -> ConfigSource:
    info = repo_info(repo, revision, token, fetch, _ANSWER_WITHIN_S)
    files = {each.path: each for each in info.files}
    if _CONFIG not in files:
        raise ModelFilesError(f"{repo} has no {_CONFIG}", why="it is not a transformers model")
    with tempfile.TemporaryDirectory() as folder:
        body = fetch_small_file(info, files[_CONFIG], token, fetch, _ANSWER_WITHIN_S)
        (Path(folder) / _CONFIG).write_bytes(body)
        config = _read(Path(folder), name, trust_remote_code)
    weights = [each for each in needed_files(info, allow_pickle=True) if each.path.endswith((".safetensors", ".bin"))]
    sizes = [each.size_bytes for each in weights]
    known = sum(sizes) if sizes and min(sizes) >= 0 else None
    return ConfigSource(config, name, None, known, f"the Hugging Face Hub, {repo}@{info.commit[:7]}")


def _read(folder: Path, name: str, trust_remote_code: bool, gguf_file: str | None = None) -> Any:
    from transformers import AutoConfig

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    try:
        return AutoConfig.from_pretrained(str(folder), **options)
    except Exception as error:  # a config.json may hold anything, and each class reads it its own way
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"the configuration of {name} needs the repository's own Python code",
                why="and that is not run to make a plan",
                fix=f"%load_engine {name} --trust-remote-code runs it; read it first",
            ) from None
        is_unknown = "architecture" in first or "model type" in first
        fix = "%pip install -U transformers, then restart the kernel" if is_unknown else f"look at its {_CONFIG}"
        raise ModelFilesError(f"the configuration of {name} could not be read", why=first[:300], fix=fix) from error
