"""The contract holds for a GPT-2 of the old kind and for LLaMA 2's chat format."""

from __future__ import annotations

from pathlib import Path

import pytest

from kani_nb.engines.ctransformers import CTransformersEngine, LlamaCTransformersEngine
from kani_nb.testing import EngineContract
from tests.engines.ctransformers.tiny_ggml import write_ggml

pytestmark = pytest.mark.slow  # each test starts a process


class Plain(CTransformersEngine):
    """As little as a subclass must say."""

    def build_prompt(self, messages):
        return "".join(f"{message.role.value}: {message.text}\n" for message in messages)


class TestGpt2(EngineContract):
    @pytest.fixture(autouse=True)
    def written(self, tmp_path: Path) -> None:
        self.path = write_ggml(tmp_path / "tiny.bin", "gpt2")

    def make_engine(self) -> CTransformersEngine:
        return Plain(str(self.path), model_load_kwargs={"model_type": "gpt2", "threads": 1})


class TestLlama2(EngineContract):
    @pytest.fixture(autouse=True)
    def written(self, tmp_path: Path) -> None:
        self.path = write_ggml(tmp_path / "tiny.bin", "llama")

    def make_engine(self) -> CTransformersEngine:
        return LlamaCTransformersEngine(str(self.path), None, 256, {"threads": 1})
