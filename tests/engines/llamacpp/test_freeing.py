"""What was loaded is given back, however often."""

import pytest

from kani_nb import ChatMessage
from kani_nb.engines.llamacpp import LlamaCppEngine
from tests.engines.llamacpp.tiny_gguf import write_gguf
from tests.memory import held_bytes

pytestmark = [pytest.mark.llamacpp, pytest.mark.usefixtures("exact_allocator")]


async def test_loading_and_closing_again_and_again_takes_no_more_memory(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", context=65536)  # 16 MiB of states
    held = []
    for _ in range(8):
        engine = LlamaCppEngine(model_path=path, threads=1)
        await engine.predict([ChatMessage.user("hello")], max_new_tokens=3)
        assert engine.memory().kv_bytes == 16 * 2**20
        await engine.close()
        held.append(held_bytes())
    assert held[-1] - held[2] < 16 * 2**20
