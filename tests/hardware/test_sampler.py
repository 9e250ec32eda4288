"""The sampler sees memory rise, costs little, and leaves nothing running."""

from __future__ import annotations

import gc
import mmap
import threading
import time

import psutil
import pytest

from kani_nb.metrics.sampler import MemorySampler, resident_bytes


def test_a_peak_between_start_and_end_is_seen():
    gc.collect()  # so that little is given back meanwhile
    with MemorySampler(interval_s=0.005) as sampler:
        before = sampler.peak_bytes
        block = mmap.mmap(-1, 256 * 2**20)  # pages of its own: an allocator may have freed ones left to hand out
        block.write(b"x" * len(block))
        deadline = time.monotonic() + 10
        while sampler.peak_bytes < before + 100 * 2**20 and time.monotonic() < deadline:
            time.sleep(0.005)
        block.close()
    assert sampler.peak_bytes >= before + 100 * 2**20
    assert sampler.peak_source == "rss"
    assert max(value for _, value in sampler.series) == sampler.peak_bytes
    times = [at for at, _ in sampler.series]
    assert times == sorted(times)


def test_the_thread_is_gone_at_the_end_even_after_an_error():
    def names():
        return [thread.name for thread in threading.enumerate()]

    with pytest.raises(ValueError, match="inside"), MemorySampler():
        assert "kani-nb-memory" in names()
        raise ValueError("inside")
    assert "kani-nb-memory" not in names()


def test_the_series_is_bounded_and_spans_the_whole_time():
    with MemorySampler(interval_s=0.0002) as sampler:
        deadline = time.monotonic() + 30
        while sampler._readings < 1500 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert sampler._readings >= 1500
    series = sampler.series
    assert 250 <= len(series) <= 600
    assert series[0][0] < 0.1 * series[-1][0]


def test_resident_memory_agrees_with_psutil():
    assert resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


def test_one_reading_costs_microseconds():
    started = time.process_time()
    for _ in range(200):
        resident_bytes()
    assert (time.process_time() - started) / 200 < 0.002 * 0.05  # 0.2% of a CPU at one reading per 50 ms


@pytest.mark.gpu
def test_a_gpus_allocator_peak_is_exact():
    import torch

    with MemorySampler("cuda") as sampler:
        block = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
        del block
    assert sampler.peak_source == "cuda"
    assert sampler.peak_bytes >= 256 * 2**20
    assert sampler.peak_bytes == torch.cuda.max_memory_allocated()
