"""The stat line says in words what the metrics say in numbers."""

from __future__ import annotations

import pytest

from kani_nb.metrics.recorder import GenerationMetrics
from kani_nb.notebook.stat_line import context_use, seconds, size, stat_line

FULL = {
    "model": "smollm2",
    "ttft_s": 0.12,
    "tokens_per_s": 31.2,
    "prompt_tokens": 1634,
    "cached_tokens": 1494,
    "completion_tokens": 128,
    "peak_bytes": int(0.9 * 2**30),
    "context_tokens": 812,
    "max_context_size": 8192,
    "finish_reason": "stop",
}


def test_everything_known_is_one_line():
    assert stat_line(GenerationMetrics(**FULL)) == (
        "128 tokens · 31.2 tok/s · first after 0.12 s · 1,494 of 1,634 prompt tokens cached · context 812/8,192"
        " · peak 0.9 GiB (process RSS) · stop"
    )


def test_what_is_not_known_is_left_out():
    assert stat_line(GenerationMetrics("x", finish_reason="stop")) == "stop"
    assert stat_line(GenerationMetrics("x")) == ""


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("cancelled", "stopped"),
        ("interrupted", "interrupted"),
        ("length", "stopped at the token limit"),
        ("error", "failed"),
    ],
)
def test_the_end_is_said_in_words(reason, words):
    assert stat_line(GenerationMetrics(**{**FULL, "finish_reason": reason})).endswith(f" · {words}")


def test_one_token_is_singular_and_a_long_wait_is_said():
    line = stat_line(
        GenerationMetrics("x", completion_tokens=1, queued_s=2.5, peak_bytes=3 * 2**30, peak_source="cuda")
    )
    assert line == "1 token · waited 2.50 s for the engine · peak 3.0 GiB (CUDA allocator)"


def test_a_context_nearly_full_is_warned_of():
    assert context_use(6143, 8192) == "context 6,143/8,192"
    assert context_use(6144, 8192) == "context 6,144/8,192 (75% full)"
    assert context_use(None, 8192) == context_use(5, None) == ""


def test_sizes_and_durations_have_the_digits_that_matter():
    assert (size(50 * 2**20), size(2**30)) == ("50 MiB", "1.0 GiB")
    assert (seconds(0.1234), seconds(42.4), seconds(150)) == ("0.12 s", "42 s", "2 min 30 s")
