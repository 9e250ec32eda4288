"""How far predictions are from a reference's: numbers that can be worked out another way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kani_nb.errors import ConfigError
from kani_nb.metrics.divergence import QualityTotals, Reference


def log_probs(rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    return torch.log_softmax(3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)), dim=-1)


def quality(ids, other, reference=None):
    totals = QualityTotals()
    totals.add(ids, other, reference)
    return totals.quality


def test_a_case_worked_out_by_hand():
    reference = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log()
    other = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    found = quality([0, 1], other, reference)
    assert found.kl_nats == pytest.approx(0.5 * (0.25 * math.log(1 / 3) + 0.75 * math.log(3)))
    assert found.top1_agreement == 0.5
    assert found.perplexity == pytest.approx(2)  # of the second token, of which the first row knows nothing
    assert found.positions == 2


@given(st.integers(2, 80), st.integers(2, 50), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_it_agrees_with_torchs_own_and_is_never_negative(rows, vocabulary, seed):
    reference, other = log_probs(rows, vocabulary, seed), log_probs(rows, vocabulary, seed + 1)
    ids = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    found = quality(ids, other, reference)
    expected = torch.nn.functional.kl_div(other.double(), reference.double(), reduction="sum", log_target=True) / rows
    assert found.kl_nats == pytest.approx(float(expected), abs=1e-9)
    assert found.kl_nats >= 0
    loss = torch.nn.functional.nll_loss(other[:-1], torch.tensor(ids[1:]))
    assert found.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)


def test_the_same_predictions_are_no_distance_apart():
    same = log_probs(40, 30, 1)
    found = quality(list(range(30)) + list(range(10)), same, same)
    assert (found.kl_nats, found.top1_agreement) == (0, 1)


def test_pieces_add_up_to_the_mean_over_all_their_positions():
    reference, other, ids = log_probs(50, 20, 1), log_probs(50, 20, 2), [each % 20 for each in range(50)]
    pieces = QualityTotals()
    for start, end in ((0, 11), (11, 50)):
        pieces.add(ids[start:end], other[start:end], reference[start:end])
    assert pieces.quality.kl_nats == pytest.approx(quality(ids, other, reference).kl_nats)
    assert pieces.quality.positions == 50


def test_what_the_reference_excludes_counts_nothing():
    reference = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).log()
    other = torch.tensor([[0.5, 0.5], [0.0, 1.0]]).log()
    assert quality([1, 1], other, reference).kl_nats == pytest.approx(math.log(2) / 2)


def test_without_a_reference_there_is_a_perplexity_alone():
    found = quality([0, 1], torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log())
    assert (found.perplexity, found.kl_nats, found.top1_agreement) == (pytest.approx(2), None, None)


def test_a_single_token_has_no_perplexity():
    with pytest.raises(ValueError, match="at least two tokens"):
        quality([0], log_probs(1, 5, 0))


def test_the_reference_comes_back_as_it_was_and_leaves_nothing_behind():
    first, second = log_probs(3, 7, 0), log_probs(2, 7, 1)
    with Reference(5) as kept:
        kept.add(first)
        kept.add(second)
        assert torch.equal(kept.read(0), first)
        assert torch.equal(kept.read(1), second)
        folder = kept._folder
        assert len(list(folder.iterdir())) == 2
        kept.clear()
        assert len(kept) == 0
        with pytest.raises(IndexError):
            kept.read(0)
    assert not folder.exists()


def test_a_text_whose_probabilities_take_too_much_disk_is_refused_before_any_is_written():
    with Reference(1000, limit_bytes=4 * 7 * 100) as kept:
        with pytest.raises(ConfigError, match=r"the text has 1,000 tokens.*disk[\s\S]*at most 100 tokens"):
            kept.add(log_probs(2, 7, 0))
        assert len(kept) == 0
