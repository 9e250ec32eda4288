"""Tiny GGUF files, and a skip where llama.cpp is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kani_nb.engines.llamacpp import LlamaCppEngine
from tests.engines.llamacpp.tiny_gguf import write_gguf


@pytest.fixture(autouse=True)
def llama_cpp_is_installed() -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: pip install llama-cpp-python")


@pytest.fixture(scope="session")
def llama_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="session")
def spm_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "spm.gguf", vocabulary="spm")


@pytest.fixture
async def engine(llama_gguf: Path):
    """A loaded engine whose prompts take several chunks."""
    engine = LlamaCppEngine(model_path=llama_gguf, threads=1, model_load_kwargs={"n_batch": 8, "n_ubatch": 8})
    await engine.load()
    yield engine
    await engine.close()
