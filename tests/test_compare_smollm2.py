"""The schemes of a CPU side by side on the real small model: orders that hold on any machine, and no times."""

from __future__ import annotations

import asyncio

import pytest

import kani_nb._runtime
from kani_nb import EngineConfig
from kani_nb._runtime import Runtime
from kani_nb.compare import compare
from kani_nb.planning import read_schemes

pytestmark = [pytest.mark.quant, pytest.mark.timeout(900)]

MIB = 2**20
#: MiB of weights and scales, counted from the storages of transformers' own models in an earlier study.
KNOWN_MIB = {"none": 256.57, "int8": 155.91, "fp4": 111.03, "nf4": 111.03, "nf4 + double quant": 106.52}


@pytest.fixture(scope="module")
def compared(smollm2):
    with pytest.MonkeyPatch.context() as patch:
        rt = Runtime()
        patch.setattr(kani_nb._runtime, "_RUNTIME", rt)
        schemes = read_schemes("none,int8,fp4,nf4,nf4+dq,cpu-int8,cpu-int4")
        yield asyncio.run(compare(EngineConfig(str(smollm2), device="cpu"), schemes, runs=3, max_new_tokens=24))
        rt.close()


def kl(compared, label):
    return compared.row(label).kl_nats


def test_every_scheme_is_measured(compared):
    assert [row.reason for row in compared.rows] == [""] * 7
    assert compared.reference == "float32 weights"
    assert all(len(row.tpot_runs_s) == 3 for row in compared.rows)


@pytest.mark.parametrize("label", KNOWN_MIB)
def test_the_weights_are_what_they_are_known_to_be(compared, label):
    assert compared.row(label).weight_bytes / MIB == pytest.approx(KNOWN_MIB[label], rel=0.01)


def test_fewer_bits_are_further_away(compared):
    assert kl(compared, "fp4") > kl(compared, "nf4") > kl(compared, "int8") > 0
    assert kl(compared, "int8") > kl(compared, "none") > 0
    # Not compared with each other: cpu-int4's groups of 32 with a zero are the grid that these weights come from.
    assert min(kl(compared, "cpu-int8"), kl(compared, "cpu-int4")) > kl(compared, "none")
    assert (
        compared.row("none").top1_agreement > compared.row("int8").top1_agreement > compared.row("fp4").top1_agreement
    )
    assert compared.row("none").perplexity < compared.row("nf4").perplexity < compared.row("fp4").perplexity


def test_that_the_weights_were_codes_of_four_bits_once_is_said(compared):
    assert any("These weights were made from Q4_1 codes" in remark for remark in compared.remarks)


def test_quantizing_the_scales_costs_next_to_nothing(compared):
    assert kl(compared, "nf4 + double quant") == pytest.approx(kl(compared, "nf4"), rel=0.1)


def test_the_closest_schemes_still_know_the_answer(compared):
    for label in ("none", "int8", "cpu-int8"):
        assert "Paris" in compared.row(label).answer


def test_no_model_stays(compared):
    """Libraries that are imported on the way do, and what they keep for their threads."""
    assert all(row.left_bytes < 0.8 * row.weight_bytes for row in compared.rows)
    assert sum(row.left_bytes for row in compared.rows) < 250 * MIB
