"""What this process takes, and how to give it less: for tests of what happens when memory runs out."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from kani_nb.engines.huggingface.library_errors import free_memory
from tests.conftest import make_model

MIB = 2**20
#: States of one token of the wide model, in bytes: 8 layers of 64 heads of 128 float32 keys and values.
WIDE_KV_BYTES = 2 * 8 * 64 * 128 * 4


def make_wide_model(folder: Path) -> Path:
    """A random Llama of 65 MiB whose KV cache grows by half a MiB with each token."""
    heads = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 128}
    return make_model(folder, num_hidden_layers=8, hidden_size=64, max_position_embeddings=4096, **heads)


def resident_bytes() -> int:
    """Bytes of this process that are in memory, after what nobody uses was given back."""
    free_memory()
    return int(psutil.Process().memory_info().rss)


@contextmanager
def only_more(extra_bytes: int) -> Iterator[None]:
    """Let this process take so many bytes more than it has now, and no more: real allocations then fail."""
    if sys.platform != "linux":
        pytest.skip("only Linux limits the memory of a process")
    import resource

    free_memory()
    status = Path("/proc/self/status").read_text()
    taken = int(status.split("VmData:")[1].split()[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + extra_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
