"""What was loaded is given back, however often."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kani_nb import ChatMessage
from tests.engines.llamacpp.tiny_gguf import write_gguf
from tests.memory import EXACT_ALLOCATOR, MIB, held_bytes

pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process holds"),
]

ROOT = Path(__file__).parents[3]
STATES_BYTES = 16 * MIB


def test_loading_and_closing_again_and_again_takes_no_more_memory(tmp_path):
    """In a process of its own: what other tests left in a worker comes and goes by more than a model's states."""
    path = write_gguf(tmp_path / "tiny.gguf", context=65536)
    command = [sys.executable, "-m", "tests.engines.llamacpp.test_freeing", str(path)]
    own = os.environ | EXACT_ALLOCATOR
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    rounds = json.loads(done.stdout)
    assert {each["states"] for each in rounds} == {STATES_BYTES}
    held = [each["held"] for each in rounds]
    assert max(held[2:]) - held[2] < STATES_BYTES // 2, held  # 0.3 MiB measured; one round's states would be 16


async def _load_and_close(path: Path, rounds: int) -> list[dict[str, int]]:
    from kani_nb.engines.llamacpp import LlamaCppEngine

    found = []
    for _ in range(rounds):
        engine = LlamaCppEngine(model_path=path, threads=1)
        await engine.predict([ChatMessage.user("hello")], max_new_tokens=3)
        states = engine.memory().kv_bytes
        await engine.close()
        found.append({"states": states, "held": held_bytes()})
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_load_and_close(Path(sys.argv[1]), rounds=8))))
