"""Linear layers in 8 and 4 bits: what they store, how near the original they are, and that they multiply right."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kani_nb.errors import ConfigError
from kani_nb.hardware.packed import kernel_support, packed_class
from kani_nb.hardware.packed_codes import KernelLayout, find_layout, group_size_for, packed, unpacked
from kani_nb.hardware.schemes import find_scheme
from kani_nb.quantization import Quantization

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPERATIONS = ("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu")


@pytest.fixture(autouse=True)
def fresh_trials():
    """Whether the kernels can be used is found out anew by each test."""
    kernel_support.cache_clear()
    yield
    kernel_support.cache_clear()


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(bits, weight, bias=None, group_size=32, *, finish=True):
    options = {} if bits == 8 else {"group_size": group_size}
    layer = packed_class(bits).from_weight(weight, bias, **options)
    if finish:
        layer.finish()
    return layer


def lines_of(layer):
    """Scale and zero (N, K / g) of an int4 layer."""
    return layer.scale_and_zero.float().permute(1, 0, 2).unbind(2)


def exact_weight(layer):
    """What codes and scales stand for, without any rounding; and the magnitudes of what is added up for it."""
    if layer.bits == 8:
        weight = layer.codes.double() * layer.scale.double()[:, None]
        return weight, weight.abs()
    scale, zero = (each.double().repeat_interleave(layer.group_size, dim=1) for each in lines_of(layer))
    scaled = (unpacked(layer.portable_codes()).double() - 8) * scale
    return scaled + zero, scaled.abs() + zero.abs()


def assert_right(layer, inputs, product):
    """Within a few roundings, in the inputs' dtype, of what codes and scales give exactly."""
    weight, magnitudes = exact_weight(layer)
    exact = inputs.double() @ weight.t()
    if layer.bias is not None:
        exact = exact + layer.bias.double()
    roundings = inputs.double().abs() @ magnitudes.t() + exact.abs()
    assert product.dtype == inputs.dtype
    error = (product.double() - exact).abs() - 2 * torch.finfo(inputs.dtype).eps * roundings
    assert error.numel() == 0 or error.max() <= 1e-6


shapes = st.tuples(st.integers(1, 12), st.integers(1, 9))  # outputs / 16, inputs / 32


@settings(max_examples=40, deadline=None)
@given(shapes, st.sampled_from((8, 4)), st.sampled_from(DTYPES), st.sampled_from((1, 2, 7, 21, 90)), st.booleans())
def test_products_are_those_of_the_dequantized_weight(shape, bits, dtype, rows, has_bias):
    outputs, inputs = 16 * shape[0], 32 * shape[1]
    weight = numbers(outputs, inputs, dtype=dtype) / 20
    bias = numbers(outputs, dtype=dtype, seed=1) if has_bias else None
    layer = make(bits, weight, bias)
    given_rows = numbers(rows, inputs, dtype=dtype, seed=2)
    assert_right(layer, given_rows, layer(given_rows))
    portable = make(bits, weight, bias, finish=False)
    assert_right(portable, given_rows, portable(given_rows))


@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_have_any_leading_shape_and_their_own_dtype(bits):
    layer = make(bits, numbers(48, 64, dtype=torch.bfloat16))
    rows = numbers(2, 3, 64, dtype=torch.bfloat16)
    assert layer(rows).shape == (2, 3, 48)
    assert torch.equal(layer(rows)[1, 2], layer(rows[1, 2]))
    assert torch.equal(layer(rows.transpose(0, 1)), layer(rows).transpose(0, 1))
    assert layer(rows[:0]).shape == (0, 3, 48)
    for dtype in DTYPES:
        flat = rows.view(6, 64).to(dtype)
        assert_right(layer, flat, layer(flat))


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from(DTYPES), st.floats(0.001, 3), st.floats(-1, 1))
def test_eight_bit_codes_are_the_nearest(shape, dtype, width, shift):
    weight = (numbers(16 * shape[0], 32 * shape[1]) * width + shift).to(dtype)
    layer = make(8, weight)
    steps = layer.scale.float()[:, None]
    assert ((weight.float() - layer.codes * steps).abs() <= 0.51 * steps).all()


@settings(max_examples=30, deadline=None)
@given(
    shapes,
    st.sampled_from((32, 64, 128)),
    st.sampled_from(DTYPES),
    st.sampled_from((0.01, 1.0)),
    st.sampled_from((0, 2.0)),
)
def test_four_bit_lines_are_never_worse_than_the_range_of_the_group(shape, group, dtype, width, shift):
    weight = (numbers(16 * shape[0], group * shape[1]) * width + shift).to(dtype)
    layer = make(4, weight, group_size=group)
    groups = weight.float().view(weight.shape[0], -1, group)
    held = exact_weight(layer)[0].float().view_as(groups)
    scale, zero = lines_of(layer)
    levels = torch.arange(-8, 8) * scale[..., None] + zero[..., None]
    # Each code is the nearest of its line ...
    nearest = (groups[..., None] - levels[:, :, None]).abs().amin(3)
    assert ((groups - held).abs() <= nearest + 1e-5 * levels.abs().amax()).all()
    # ... and the line at least as near as that from the smallest to the largest weight.
    low, high = groups.aminmax(dim=2, keepdim=True)
    scale = ((high - low) / 15).to(dtype).float()
    zero = ((high + low + (high - low) / 15) / 2).to(dtype).float()
    ranged = ((groups - zero) / scale).round().clamp(-8, 7) * scale + zero
    ours, theirs = ((each - groups).square().sum(2) for each in (held, ranged))
    assert (ours <= theirs * 1.001 + 1e-6 * groups.square().sum(2)).all()


def test_weights_that_have_sixteen_values_a_group_come_back_exactly():
    codes = torch.randint(0, 16, (64, 96), generator=torch.Generator().manual_seed(0))
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = (codes.float() * 0.25 - 1.5).to(torch.bfloat16)  # steps that bfloat16 holds
    assert torch.equal(make(4, weight).dequantized(), weight)


def test_flat_and_empty_rows_are_held_without_a_division_by_zero():
    weight = torch.zeros(16, 64, dtype=torch.bfloat16)
    weight[1] = 0.5
    for bits in (8, 4):
        assert torch.allclose(make(bits, weight).dequantized(), weight, atol=0, rtol=2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (112, 576), (192, 96)])
def test_they_store_what_their_scheme_says_to_the_byte(outputs, inputs, dtype):
    size = torch.empty(0, dtype=dtype).element_size()
    for bits, group in ((8, None), (4, None), (4, 64), (4, 256)):
        scheme = find_scheme(f"cpu-int{bits}")
        wanted = scheme.linear_bytes(outputs, inputs, Quantization(scheme.name, group_size=group), size)
        layer = make(bits, numbers(outputs, inputs, dtype=dtype), group_size=group_size_for(inputs, group or 32))
        assert sum(each.untyped_storage().nbytes() for each in layer.buffers()) == wanted
        assert not list(layer.parameters())
        assert sum(each.nbytes for each in layer.state_dict().values()) == wanted


@pytest.mark.parametrize("bits", [8, 4])
def test_a_state_dict_is_the_same_before_and_after_packing_and_loads_into_either(bits):
    weight, bias = numbers(112, 64, dtype=torch.bfloat16), numbers(112, dtype=torch.bfloat16)
    raw, finished = make(bits, weight, bias, finish=False), make(bits, weight, bias)
    saved = finished.state_dict()
    for name, tensor in raw.state_dict().items():
        assert torch.equal(saved[name], tensor), name
    rows = numbers(3, 64, dtype=torch.bfloat16)
    for other in (make(bits, -weight, bias, finish=False), make(bits, -weight, bias)):
        other.load_state_dict(saved)
        other.finish()
        assert torch.equal(other(rows), finished(rows))


def reference_packing(codes, block, has_halves):
    """The order that `KernelLayout` describes, written down byte by byte."""
    rows, inputs = codes.shape
    found = []
    for start in range(0, rows, block):
        part = codes[start : start + block]
        size = len(part)
        for each in part.t():
            if has_halves and size == block:
                found.append(each[: size // 2] | each[size // 2 :] << 4)
            else:
                found.append(each[::2] | each[1::2] << 4)
    return torch.cat(found).to(torch.uint8).view(rows, inputs // 2)


@pytest.mark.parametrize("layout", [KernelLayout(b, h) for b in (64, 32, 16) for h in (True, False)], ids=str)
def test_the_order_of_other_cpus_is_recognized_and_turned_back(layout):
    assert find_layout(lambda codes, _: reference_packing(codes, layout.block, layout.has_halves)) == layout
    for rows in (16, 48, 64, 112, 256):
        codes = torch.randint(0, 16, (rows, 32), generator=torch.Generator().manual_seed(rows))
        ordered = reference_packing(codes, layout.block, layout.has_halves)
        assert torch.equal(layout.portable(ordered, 0, rows), packed(codes.to(torch.uint8)))
        if rows > 64:
            assert torch.equal(layout.portable(ordered, 64, rows), packed(codes[64:].to(torch.uint8)))


def raising(*_):
    raise RuntimeError("not implemented for this build")


BREAKAGES = {
    "missing": (None, "AttributeError"),
    "refusing": (raising, "not implemented for this build"),
    "wrong": (lambda *arguments: torch.zeros(5, 112, dtype=torch.bfloat16), "wrong here by 100.0%"),
    "not a number": (lambda *arguments: torch.full((5, 112), torch.nan, dtype=torch.bfloat16), "wrong here"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_build_whose_kernel_is_broken_multiplies_right_without_it_and_says_so(bits, breakage, monkeypatch):
    replacement, words = BREAKAGES[breakage]
    product = OPERATIONS[0] if bits == 8 else OPERATIONS[1]
    if replacement is None:
        monkeypatch.delattr(torch, product)
    else:
        monkeypatch.setattr(torch, product, replacement)
    layer = make(bits, numbers(112, 64, dtype=torch.bfloat16), numbers(112, dtype=torch.bfloat16))
    assert layer.product.startswith("dequantized: ")
    assert words in layer.product
    for count in (1, 100):
        rows = numbers(count, 64, dtype=torch.bfloat16, seed=count)
        assert_right(layer, rows, layer(rows))
    # The other kernel is not suspected.
    assert kernel_support(4 if bits == 8 else 8).works


def test_an_order_of_codes_that_nobody_knows_is_not_used(monkeypatch):
    real = torch._convert_weight_to_int4pack_for_cpu
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack_for_cpu", lambda codes, k: real(codes, k).flip(0))
    layer = make(4, numbers(64, 64, dtype=torch.bfloat16))
    assert layer.product == "dequantized: torch orders 4-bit codes in a way that is not known"
    rows = numbers(1, 64, dtype=torch.bfloat16)
    assert_right(layer, rows, layer(rows))


def test_a_finished_layer_can_do_without_the_kernel_too(monkeypatch):
    layer = make(4, numbers(112, 64, dtype=torch.bfloat16))
    assert layer.product == "packed"
    assert layer.layout is not None
    kernel_support.cache_clear()
    monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", raising)
    rows = numbers(1, 64, dtype=torch.bfloat16)
    assert_right(layer, rows, layer(rows))


def test_the_trial_does_not_depend_on_where_it_is_made():
    with torch.device("meta"), torch.inference_mode():
        assert kernel_support(8).works
        assert kernel_support(4).works


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_than_bfloat16_are_multiplied_as_they_are(dtype):
    for bits in (8, 4):
        layer = make(bits, numbers(64, 64, dtype=dtype))
        assert layer.product == "dequantized: torch's kernel is fast in bfloat16 only"


def test_sums_that_half_precision_could_not_hold_are_scaled_first():
    layer = make(8, torch.full((16, 4096), 0.01, dtype=torch.float16))
    assert torch.allclose(layer(torch.ones(30, 4096, dtype=torch.float16)), torch.tensor(40.96).half(), rtol=0.01)


@pytest.mark.parametrize("bits", [8, 4])
def test_addresses_that_end_the_process_in_torchs_kernel_are_not_given_to_it(bits):
    layer = make(bits, numbers(64, 64, dtype=torch.bfloat16), finish=False)
    rows = numbers(4, 64, dtype=torch.bfloat16)
    shifted = torch.cat([rows.new_zeros(1), rows.view(-1)])[1:].view(4, 64)
    assert shifted.data_ptr() % 32
    layer.codes = torch.cat([layer.codes.new_zeros(1), layer.codes.view(-1)])[1:].view_as(layer.codes)
    expected = make(bits, numbers(64, 64, dtype=torch.bfloat16))(rows)
    assert torch.allclose(layer(shifted), expected, rtol=0.02, atol=0.1)
    layer.finish()
    assert layer.codes.data_ptr() % 64 == 0
    assert torch.equal(layer(shifted), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_pass_through_to_the_inputs(bits):
    layer = make(bits, numbers(48, 64, dtype=torch.bfloat16))
    rows = numbers(2, 64, dtype=torch.bfloat16).requires_grad_()
    layer(rows).sum().backward()
    expected = layer.dequantized().float().sum(0)
    assert torch.allclose(rows.grad[0].float(), expected, rtol=0.05, atol=0.3)


def test_a_model_that_looks_at_the_weight_finds_the_weight():
    for bits in (8, 4):
        weight = numbers(48, 64, dtype=torch.bfloat16)
        layer = make(bits, weight)
        assert layer.weight.dtype == torch.bfloat16
        assert layer.weight.shape == weight.shape
        assert (layer.weight - weight).norm() < 0.15 * weight.norm()


@pytest.mark.parametrize(
    ("bits", "inputs", "outputs", "options", "words"),
    [
        (8, 40, 64, {}, r"40 inputs and 64 outputs cannot be held in 8 bits: .*multiple of 16"),
        (4, 48, 64, {}, r"48 inputs and 64 outputs cannot be held in 4 bits: .*group of 32"),
        (4, 96, 64, {"group_size": 64}, r"96 inputs .*group of 64"),
        (4, 64, 40, {}, r"40 outputs .*outputs of 16"),
        (4, 64, 64, {"group_size": 16}, r"group of 16"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(bits, inputs, outputs, options, words):
    with pytest.raises(ConfigError, match=words):
        packed_class(bits)(inputs, outputs, **options)


OTHER_CPU = """
import sys, torch
from kani_nb.hardware.packed import packed_class
saved = torch.load(sys.argv[1])
for bits in (8, 4):
    layer = packed_class(bits)(64, 112, dtype=torch.bfloat16)
    layer.load_state_dict(saved[bits])
    layer.finish()
    assert layer.product.startswith("packed" if "avx" in sys.argv[2] else "dequantized: torch's kernel is not vec")
    product = layer(saved["rows"])
    assert torch.allclose(product, saved["products"][bits], rtol=0.02, atol=0.1), bits
    assert all(torch.equal(saved[bits][name], value) for name, value in layer.state_dict().items())
    print(bits, getattr(layer, "layout", None))
"""


@pytest.mark.quant
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_what_was_saved_is_the_same_on_a_cpu_with_another_instruction_set(tmp_path, capability):
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("torch can be told to use fewer instructions on x86 only")
    layers = {bits: make(bits, numbers(112, 64, dtype=torch.bfloat16)) for bits in (8, 4)}
    rows = numbers(3, 64, dtype=torch.bfloat16, seed=5)
    saved = {bits: dict(layer.state_dict()) for bits, layer in layers.items()}
    saved |= {"rows": rows, "products": {bits: layer(rows) for bits, layer in layers.items()}}
    torch.save(saved, tmp_path / "saved.pt")
    ran = subprocess.run(
        [sys.executable, "-c", OTHER_CPU, str(tmp_path / "saved.pt"), capability],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    if capability == "avx2":
        assert "block=32, has_halves=True" in ran.stdout
