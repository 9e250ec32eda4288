"""A configuration is had without a byte of weights: from a folder, a cache, what ships with us, and the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kani_nb.engines.sources import prefetch
from kani_nb.engines.sources_config import config_of
from kani_nb.errors import GatedModelError, ModelFilesError, ModelUnavailableError, UnknownModelError
from tests.sources.hub_stand_in import COMMIT, HubStandIn, Repo
from tests.sources.tiny import model_files


def repo_files() -> dict[str, bytes]:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "dtype": "bfloat16"}
    return model_files() | {"config.json": json.dumps(config).encode()}


def test_of_a_repository_only_the_configuration_is_fetched(hub: HubStandIn) -> None:
    hub.repos["org/tiny"] = Repo(repo_files())
    source = config_of("org/tiny")
    assert (source.config.model_type, source.config.hidden_size) == ("llama", 64)
    assert source.file_bytes == len(model_files()["model.safetensors"])
    assert source.origin == f"the Hugging Face Hub, org/tiny@{COMMIT[:7]}"
    fetched = [each.path for each in hub.seen if "/resolve/" in each.path]
    assert fetched == [f"/org/tiny/resolve/{COMMIT}/config.json"]


def test_what_is_in_the_cache_is_read_there(hub: HubStandIn) -> None:
    hub.repos["org/tiny"] = Repo(repo_files())
    prefetch("org/tiny")
    before = len(hub.seen)
    source = config_of("org/tiny")
    assert source.folder is not None
    assert source.file_bytes == len(model_files()["model.safetensors"])
    assert len(hub.seen) == before


def test_the_embedded_model_needs_no_network(hub: HubStandIn) -> None:
    source = config_of("smollm2")
    assert (source.config.hidden_size, source.config.tie_word_embeddings) == (576, True)
    assert not hub.seen


def test_folders_and_gguf_files_are_read_where_they_are(tmp_path: Path, tiny_model: Path) -> None:
    source = config_of(str(tiny_model))
    assert source.config.hidden_size == 64
    assert source.file_bytes == (tiny_model / "model.safetensors").stat().st_size
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelFilesError, match="is a single file, and not a GGUF"):
        config_of(str(tmp_path / "notes.txt"))
    with pytest.raises(ModelFilesError, match=r"no model's folder: it has no config\.json"):
        config_of(str(tmp_path))


def test_refusals_are_those_of_a_download(hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/gated"] = Repo(repo_files(), file_error=(403, "GatedRepo", 9))
    with pytest.raises(GatedModelError, match="org/gated"):
        config_of("org/gated")
    hub.repos["org/bare"] = Repo({"README.md": b"nothing"})
    with pytest.raises(ModelFilesError, match=r"org/bare has no config\.json"):
        config_of("org/bare")
    with pytest.raises(UnknownModelError, match="there is no model 'smolm2'"):
        config_of("smolm2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnavailableError, match="HF_HUB_OFFLINE forbids asking the Hub"):
        config_of("org/elsewhere")
