"""What this process takes, and how to give it less: for tests of what happens when memory runs out."""

import asyncio
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kani_nb import ChatMessage
from kani_nb.engines.huggingface.library_errors import free_memory
from tests.conftest import make_model

MIB = 2**20
#: States of one token of the wide model, in bytes: 8 layers of 64 heads of 128 float32 keys and values.
WIDE_KV_BYTES = 2 * 8 * 64 * 128 * 4


def make_wide_model(folder: Path) -> Path:
    """A random Llama of 65 MiB whose KV cache grows by half a MiB with each token."""
    heads = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 128}
    return make_model(folder, num_hidden_layers=8, hidden_size=64, max_position_embeddings=4096, **heads)


#: Every piece from this size on from the system and back to it: the C library would else keep what is freed below a
#: threshold that grows, and the end of every thread's arena, up to 64 MiB of it, for whoever comes next.
EXACT_BYTES = 256 * 1024
#: The same for a process that is started with it.
EXACT_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(EXACT_BYTES)}


def held_bytes() -> int:
    """Bytes that this process has written and holds in memory, after what nobody uses was given back.

    Pages of files are not counted: the kernel drops and reads them again as it likes, by tens of MiB. Weights can be
    such pages: `has_mapped_weights` tells whether any are left.
    """
    free_memory()
    return sum(_status("RssAnon", "VmSwap"))


def has_mapped_weights() -> bool:
    """Whether a file of weights is still mapped into this process."""
    return ".safetensors" in Path("/proc/self/maps").read_text()


def _status(*names: str) -> list[int]:
    if sys.platform != "linux":
        pytest.skip("only Linux tells what a process holds, and limits it")
    status = Path("/proc/self/status").read_text()
    return [int(re.search(rf"^{name}:\s+(\d+) kB", status, re.M)[1]) * 1024 for name in names]


def held_once_warm(model_folder: Path) -> int:
    """What this process holds when it has loaded, asked and freed a model of every kind once."""
    from tests.engines.asking import answer, engine_of

    async def warm():
        for scheme in (None, "int8", "nf4"):
            engine = engine_of(model_folder, quantization=scheme)
            await answer(engine, [ChatMessage.user("the quick brown fox")], max_new_tokens=4)
            await engine.close()

    asyncio.run(warm())
    return held_bytes()


#: What may stay when a model of 65 MiB is gone: what the libraries' caches and the allocator keep. Measured were -6 to
#: 3 MiB.
SLACK_BYTES = 12 * MIB


@contextmanager
def only_more(extra_bytes: int) -> Iterator[None]:
    """Let this process take so many bytes more than it has now, and no more: real allocations then fail."""
    free_memory()
    (taken,) = _status("VmData")
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + extra_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
