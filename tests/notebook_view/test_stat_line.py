"""The stat line says in words what the metrics say in numbers."""

from __future__ import annotations

import json

import pytest

from kani_nb._amounts import in_words
from kani_nb.metrics.recorder import GenerationMetrics
from kani_nb.notebook.stat_line import context_use, seconds, stat_line

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
        " · peak 922 MiB (process RSS) · stop"
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
    assert (in_words(50 * 2**20), in_words(2**30)) == ("50 MiB", "1.0 GiB")
    assert (seconds(0.1234), seconds(42.4), seconds(150)) == ("0.12 s", "42 s", "2 min 30 s")


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"cuda:0": 0.62, "cpu": 0.38}, "62 % on cuda:0, 38 % on cpu"),
        ({"cpu": 0.003, "cuda:0": 0.997}, "over 99 % on cuda:0, under 1 % on cpu"),
        ({"cuda:0": 0.5, "cuda:1": 0.3, "disk": 0.2}, "50 % on cuda:0, 30 % on cuda:1, 20 % on disk"),
        ({"disk": 1.0}, "100 % on disk"),
    ],
)
def test_where_the_weights_are_is_said_when_it_is_not_one_device(held, said):
    assert f" · {said} · stop" in stat_line(GenerationMetrics(**FULL, placement=held))


@pytest.mark.parametrize("held", [{}, {"cuda:0": 1.0}, {"cpu": 1.0, "cuda:0": 0.0}])
def test_one_device_goes_without_saying(held):
    assert stat_line(GenerationMetrics(**FULL, placement=held)) == stat_line(GenerationMetrics(**FULL))


def test_memory_that_the_driver_moved_by_itself_is_said_with_what_it_costs():
    line = stat_line(GenerationMetrics(**FULL, spilled_bytes=int(3.2 * 2**30)))
    assert "3.2 GiB spilled into shared memory: 51 times slower was seen" in line


def test_metrics_that_were_stored_before_these_fields_are_still_read():
    old = GenerationMetrics(**FULL).to_dict()
    del old["placement"], old["spilled_bytes"]
    assert GenerationMetrics.from_dict(old) == GenerationMetrics(**FULL)


def test_placement_survives_its_stored_form():
    metrics = GenerationMetrics(**FULL, placement={"cuda:0": 0.75, "cpu": 0.25}, spilled_bytes=7)
    assert GenerationMetrics.from_dict(json.loads(json.dumps(metrics.to_dict()))) == metrics


def test_an_estimate_is_never_shown_as_a_count():
    line = stat_line(
        GenerationMetrics("m", prompt_tokens=19, is_estimated=True, context_tokens=30, max_context_size=100)
    )
    assert "about 19 prompt tokens" in line
    assert "context" not in line
    assert stat_line(GenerationMetrics("m", completion_tokens=5, steps=3)).startswith("5 tokens in 3 steps")
