"""What a device computes in and which schemes it runs; the devices are only described."""

from __future__ import annotations

import pytest

from kani_nb.hardware import bitsandbytes_check, precision
from kani_nb.hardware.cpu_probe import CpuProbe, cpu_speeds, probe_cpu
from kani_nb.hardware.gptq_check import needs_of
from kani_nb.hardware.plans import Budget
from kani_nb.hardware.precision import choose_dtype, cpu_features, missing_packages, slow_cpu_note, why_not
from kani_nb.hardware.schemes import find_scheme, our_schemes

T4, V100, A100, MAXWELL = (7, 5), (7, 0), (8, 0), (5, 2)


def device(name="cuda:0", capability=None, description="a card", **more):
    return Budget(
        name=name,
        description=description,
        total_bytes=2**34,
        usable_bytes=2**34,
        compute_capability=capability,
        **more,
    )


@pytest.mark.parametrize(
    ("asked", "checkpoint", "kind", "capability", "dtype"),
    [
        # A T4 has no bfloat16, whether it was asked for or stored.
        ("auto", "bfloat16", "cuda", T4, "float16"),
        ("bfloat16", "float32", "cuda", T4, "float16"),
        ("bfloat16", None, "cuda", V100, "float16"),
        ("auto", "bfloat16", "cuda", MAXWELL, "float32"),
        ("float16", None, "cuda", MAXWELL, "float32"),
        # A CPU emulates float16: only where it was asked for.
        ("auto", "float16", "cpu", None, "float32"),
    ],
)
def test_what_a_device_cannot_compute_is_replaced_and_said(asked, checkpoint, kind, capability, dtype):
    choice = choose_dtype(asked, checkpoint, kind, capability)
    assert choice.dtype == dtype
    assert f"so {dtype} is taken instead" in choice.reason


@pytest.mark.parametrize(
    ("asked", "checkpoint", "kind", "capability", "dtype"),
    [
        ("auto", "float16", "cuda", T4, "float16"),
        ("auto", "bfloat16", "cuda", A100, "bfloat16"),
        ("auto", "float16", "cuda", (5, 3), "float16"),
        ("float32", "bfloat16", "cuda", T4, "float32"),
        ("auto", "bfloat16", "cuda", None, "bfloat16"),  # AMD
        ("auto", "bfloat16", "cpu", None, "bfloat16"),
        ("auto", "float32", "cpu", None, "float32"),
        ("auto", "bfloat16", "mps", None, "bfloat16"),
        ("auto", "float16", "mps", None, "float16"),
        # Unknown until the weights are read.
        ("auto", None, "cpu", None, "auto"),
        ("auto", "float8_e4m3fn", "cuda", A100, "auto"),
    ],
)
def test_what_a_device_can_compute_is_kept_without_a_word(asked, checkpoint, kind, capability, dtype):
    choice = choose_dtype(asked, checkpoint, kind, capability)
    assert (choice.dtype, choice.reason) == (dtype, "")


def test_the_reason_names_the_device_and_what_it_lacks():
    reason = choose_dtype("auto", "bfloat16", "cuda", T4).reason
    assert "compute capability 7.5 has no bfloat16 (8.0 is the first)" in reason
    assert "65,504" in reason
    assert "bfloat16 (5.3 is the first with float16)" in choose_dtype("auto", "bfloat16", "cuda", MAXWELL).reason


def test_torchs_packed_products_take_bfloat16_unless_another_was_asked_for():
    packed, plain = find_scheme("cpu-int8"), find_scheme("none")
    for stored in ("float16", "float32"):
        choice = choose_dtype("auto", stored, "cpu", None, packed)
        assert choice.dtype == "bfloat16"
        assert f"fast in bfloat16 only, which is taken for {stored}" in choice.reason
    assert choose_dtype("auto", "bfloat16", "cpu", None, packed).reason == ""
    assert choose_dtype("float32", "bfloat16", "cpu", None, packed).dtype == "float32"
    assert choose_dtype("auto", "float16", "cpu", None, plain).dtype == "float32"


def test_float16_that_was_asked_for_on_a_cpu_is_given_with_a_warning():
    choice = choose_dtype("float16", "bfloat16", "cpu")
    assert choice.dtype == "float16"
    assert "emulates float16 slowly" in choice.reason


@pytest.mark.parametrize(
    ("scheme", "where", "message"),
    [
        ("int8", device(capability=V100, description="V100"), "int8 needs compute capability 7.5, and V100 has 7.0"),
        ("nf4", device(capability=MAXWELL, description="M60"), "nf4 needs compute capability 6.0, and M60 has 5.2"),
        ("cpu-int8", device(capability=T4), "cpu-int8 runs on a CPU only, and cuda:0 is a CUDA device"),
        ("nf4", device("mps"), "nf4 runs on a CPU and a CUDA device only, and mps is an Apple GPU"),
    ],
)
def test_a_scheme_that_a_device_cannot_run_is_refused_in_one_sentence(scheme, where, message):
    assert why_not(find_scheme(scheme), where) == message


def test_a_scheme_that_a_device_can_run_is_not_refused():
    assert why_not(find_scheme("nf4"), device(capability=V100)) == ""
    assert why_not(find_scheme("int8"), device(capability=T4)) == ""
    assert why_not(find_scheme("int8"), device()) == ""  # AMD, whose devices have no such capability
    assert [why_not(each, device("cpu")) for each in our_schemes() if each.backend in ("torch", "packed")] == [""] * 3
    assert why_not(find_scheme("none"), device("mps")) == ""


def test_a_package_that_is_missing_or_too_old_is_named_with_the_line_that_mends_it(monkeypatch):
    lowest = dict((*find_scheme("nf4").needs, *find_scheme("gptq").needs))
    versions = {"bitsandbytes": "0.0.9", "optimum": lowest["optimum"]}
    monkeypatch.setattr(precision, "installed_version", versions.get)
    assert missing_packages(find_scheme("nf4")) == (
        f'nf4 cannot run: bitsandbytes is 0.0.9; %pip install -U "bitsandbytes>={lowest["bitsandbytes"]}"'
    )
    # gptqmodel replaces torch: what is said of it is the same wherever it is said.
    if (lacking := needs_of("gptq")) is not None:
        assert missing_packages(find_scheme("gptq")) == f"{lacking.what}: {lacking.why}; {lacking.fix}"
    versions.clear()
    assert missing_packages(find_scheme("cpu-int8")) == ""
    assert why_not(find_scheme("nf4"), device(capability=A100)).startswith("nf4 cannot run: bitsandbytes is not")
    # What is installed here says nothing about a card that is not here.
    assert why_not(find_scheme("nf4"), device(capability=A100, is_here=False)) == ""


def test_the_packages_of_this_environment_are_really_looked_at():
    installed = bitsandbytes_check.installed_version("bitsandbytes")
    lowest = dict(find_scheme("nf4").needs)["bitsandbytes"]
    is_new_enough = installed is not None and bitsandbytes_check.release(installed) >= bitsandbytes_check.release(
        lowest
    )
    assert (missing_packages(find_scheme("nf4")) == "") == is_new_enough


def test_the_features_of_a_cpu_are_read_as_linux_describes_it(tmp_path):
    x86, arm = tmp_path / "x86", tmp_path / "arm"
    x86.write_text("processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu sse avx2 avx512f avx512_bf16 amx_tile\n\n")
    arm.write_text("processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm\n")
    assert cpu_features(x86) == ("avx2", "avx512f", "avx512_bf16")
    assert cpu_features(arm) == ("asimd",)


def test_without_linux_torch_tells_what_the_cpu_has(tmp_path, monkeypatch):
    import torch

    monkeypatch.setattr(precision.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert cpu_features(tmp_path / "none") == ("avx2", "avx512f")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert cpu_features(tmp_path / "none") == ()
    monkeypatch.setattr(precision.platform, "machine", lambda: "arm64")
    assert cpu_features(tmp_path / "none") == ("asimd",)


def test_a_cpu_without_the_instructions_of_a_scheme_is_told_to_be_slow():
    old, new = device("cpu", cpu_features=("avx2",)), device("cpu", cpu_features=("avx512_bf16",))
    assert slow_cpu_note(find_scheme("nf4"), old) == "slow here: this CPU has no avx512_bf16"
    assert slow_cpu_note(find_scheme("nf4"), new) == ""
    assert slow_cpu_note(find_scheme("int8"), old) == ""
    assert slow_cpu_note(find_scheme("nf4"), device(capability=T4)) == ""


def test_the_schemes_of_a_cpu_are_really_multiplied_and_the_fastest_is_named():
    probe = probe_cpu(seconds=0.05)
    assert set(probe.seconds) | set(probe.left_out) == {"none", "cpu-int8", "cpu-int4"}
    assert all(0 < seconds < 10 for seconds in probe.seconds.values())
    assert probe.speeds["none"] == 1
    assert probe.speeds[probe.fastest] == max(probe.speeds.values())
    assert probe.to_text().startswith(f"{probe.fastest} multiplies fastest on this CPU")
    assert cpu_speeds() is cpu_speeds()


def test_a_probe_says_its_figures_in_one_sentence():
    probe = CpuProbe({"none": 0.009, "cpu-int8": 0.0045, "nf4": 0.002}, {"cpu-int4": "RuntimeError: no"}, threads=1)
    assert probe.to_text() == ("nf4 multiplies fastest on this CPU (1 thread; times bfloat16: nf4 4.5, cpu-int8 2.0)")
    assert CpuProbe({"none": 1.0}, {}, threads=2).to_text().endswith("(2 threads; times bfloat16: nothing else runs)")
