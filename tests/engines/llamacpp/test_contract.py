"""The contract holds for models whose states can be cut anywhere, within a window, and not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from kani_nb.engines.llamacpp import LlamaCppEngine
from kani_nb.testing import EngineContract
from tests.engines.llamacpp.tiny_gguf import write_gguf

pytestmark = pytest.mark.llamacpp


class TestLlama(EngineContract):
    kind = "llama"

    @pytest.fixture(autouse=True)
    def written(self, tmp_path: Path) -> None:
        self.path = write_gguf(tmp_path / "tiny.gguf", self.kind)

    def make_engine(self) -> LlamaCppEngine:
        return LlamaCppEngine(model_path=str(self.path), threads=1)


class TestSlidingWindows(TestLlama):
    kind = "gemma3"


class TestRecurrent(TestLlama):
    kind = "mamba"
