"""Whether the driver may move a model into main memory by itself, and how much of one it must have."""

from __future__ import annotations

import platform

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kani_nb.hardware import spill

GIB = 2**30
WSL = "Linux version 5.15.167.4-microsoft-standard-WSL2 (root@f9c826d3017f) (gcc 11.2.0) #1 SMP"
LINUX = "Linux version 6.8.0-45-generic (buildd@lcy02-amd64-115) (x86_64-linux-gnu-gcc-13) #45-Ubuntu SMP"


@pytest.mark.parametrize(
    ("system", "kernel", "may"),
    [("Windows", "", True), ("Linux", WSL, True), ("Linux", LINUX, False), ("Linux", "", False), ("Darwin", "", False)],
)
def test_only_windows_and_wsl_may_spill(system, kernel, may):
    assert spill.may_spill(system, kernel) is may


def test_the_seeds_full_precision_llama_must_have_spilled():
    assert spill.spilled(int(26.6e9), 12 * GIB) == int(26.6e9) - 12 * GIB
    assert spill.spilled(5 * GIB, 12 * GIB) == 0
    assert spill.spilled(11 * GIB, 12 * GIB, others_bytes=2 * GIB) == GIB


@given(st.integers(0, 2**42), st.integers(0, 2**40), st.integers(0, 2**40))
def test_what_spilled_is_ours_and_no_more_than_does_not_fit(reserved, dedicated, others):
    found = spill.spilled(reserved, dedicated, others)
    assert 0 <= found <= reserved
    assert reserved - found <= max(0, dedicated - others) or found == 0


def test_a_cpu_and_this_kernel_spill_nothing():
    if platform.system() == "Windows":
        pytest.skip("it may spill here")
    assert spill.spilled_bytes("cpu") == 0
    assert spill.spilled_bytes("cuda:0", "cpu", "disk") == 0
