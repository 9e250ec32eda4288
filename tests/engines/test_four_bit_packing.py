"""Weights that bitsandbytes packed for this CPU are read back as they were loaded, bit for bit, or named as lost.

Packing is bitsandbytes' own function here, so that these tests say the same on every CPU.
"""

import copy
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kani_nb.engines.huggingface.four_bit_packing import (
    exact_state_dict,
    guard_state_dict,
    is_packed,
    lost_weights,
    unpack,
)
from kani_nb.errors import EngineError
from tests.engines.quantized import (
    assert_equal,
    assert_same_tensors,
    file_of,
    four_bit,
    four_bit_layers,
    load,
    logits,
    make_bfloat16,
    pack,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_bfloat16(tmp_path_factory.mktemp("bfloat16"))


def one_layer(weight, *, kind="nf4", nested=False, storage="uint8", bias=None):
    """A model of one 4-bit layer, as transformers makes them."""
    import bitsandbytes
    import torch

    outputs, inputs = weight.shape
    options = {"compute_dtype": torch.bfloat16, "compress_statistics": nested, "quant_type": kind}
    layer = bitsandbytes.nn.Linear4bit(
        inputs, outputs, bias=bias is not None, quant_storage=getattr(torch, storage), **options
    )
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}), assign=True, strict=False)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight,
        requires_grad=False,
        compress_statistics=nested,
        quant_type=kind,
        quant_storage=getattr(torch, storage),
        module=layer,
    )
    model = torch.nn.Sequential(layer.to("cpu"))
    model.dtype = weight.dtype
    return model


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def exact_state_of(model):
    with exact_state_dict(model):
        return state_of(model)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    tiles=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kind=st.sampled_from(["nf4", "fp4"]),
    storage=st.sampled_from(["uint8", "bfloat16", "float32"]),
    scale=st.sampled_from([0.0, 1e-38, 1e-3, 1.0, 3e38]),
)
def test_any_bfloat16_weights_come_back_bit_for_bit(seed, tiles, kind, storage, scale):
    import torch

    random = torch.Generator().manual_seed(seed)
    weight = (torch.randn(32 * tiles[0], 64 * tiles[1], generator=random).clamp(-1, 1) * scale).to(torch.bfloat16)
    model = one_layer(weight, kind=kind, storage=storage)
    expected = state_of(model)
    pack(model)
    assert not lost_weights(model)
    packed = copy.deepcopy(model[0].weight.data), model[0].weight.quant_state.absmax.clone()
    assert_equal(exact_state_of(model), expected)
    assert torch.equal(model[0].weight.data, packed[0])
    assert torch.equal(model[0].weight.quant_state.absmax, packed[1])
    unpack(model)
    assert_equal(state_of(model), expected)


@pytest.mark.parametrize(
    ("nested", "dtype", "why"),
    [
        (True, "bfloat16", "double-quantized scales were expanded and rounded"),
        (False, "float16", "made from float16 weights, were rounded to bfloat16"),
        (False, "float32", "made from float32 weights, were rounded to bfloat16"),
    ],
)
def test_what_cannot_come_back_is_named_whatever_is_done_afterwards(nested, dtype, why):
    import torch

    model = one_layer(torch.randn(64, 128, dtype=getattr(torch, dtype)), nested=nested)
    expected = state_of(model)
    assert not lost_weights(model)
    assert_equal(exact_state_of(model), expected)
    pack(model)

    def assert_lost():
        (lost,) = lost_weights(model)
        assert lost.name == "0.weight"
        assert why in lost.why
        with pytest.raises(EngineError, match=why):
            exact_state_of(model)

    assert_lost()
    unpack(model)
    assert_lost()
    pack(model)
    assert_lost()
    model.state_dict()  # bitsandbytes' own way back
    assert_lost()


def test_an_unpacked_model_can_be_dequantized(source):
    import torch

    expected = logits(load(source, "nf4").dequantize())
    model = pack(load(source, "nf4"))
    unpack(model)
    assert torch.equal(logits(model.dequantize()), expected)


def test_a_guarded_model_is_saved_by_anyone_and_keeps_its_answers(source, tmp_path):
    import torch

    expected_file = file_of(load(source, "nf4"), tmp_path / "theirs")
    model = load(source, "nf4")
    guard_state_dict(model)
    guard_state_dict(model)
    before = logits(model)
    packed = [is_packed(layer) for layer in four_bit_layers(model)]
    assert all(packed) or not any(packed)  # by the CPU
    model.save_pretrained(tmp_path / "ours")
    assert_same_tensors(tmp_path / "ours", expected_file)
    assert torch.equal(logits(model), before)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    assert_equal(dict(pickle.loads(pickle.dumps(twin)).state_dict()), state_of(model))


def test_a_guarded_model_refuses_what_would_be_wrong(source):
    model = load(source, "nf4 + double quant")
    guard_state_dict(model)
    assert model.state_dict()
    pack(model)
    with pytest.raises(EngineError, match="expanded and rounded"):
        model.state_dict()


def test_what_a_state_dict_of_bitsandbytes_turned_around_is_turned_back(source, tmp_path):
    expected = file_of(load(source, "nf4"), tmp_path / "theirs")
    model = pack(load(source, "nf4"))
    model.state_dict()
    assert not lost_weights(model)
    found = exact_state_of(model)
    assert_equal(found, {name: expected[name] for name in found})


def test_a_packing_that_is_not_understood_is_refused(monkeypatch):
    import torch
    from bitsandbytes import functional

    model = pack(one_layer(torch.randn(64, 128, dtype=torch.bfloat16)))
    real = functional._convert_weight_packed_for_cpu_inverse

    def another_order(weight, state):
        codes, state = real(weight, state)
        return codes.flip(0), state

    monkeypatch.setattr(functional, "_convert_weight_packed_for_cpu_inverse", another_order)
    with pytest.raises(EngineError, match="in an order of its own"):
        exact_state_of(model)


@pytest.mark.parametrize(
    ("compute", "values", "is_lost"),
    [
        ("float32", (0.0, 1e-9, 3e38), False),
        ("float16", (0.7, 1.0, 65280.0, -6.2e-5), False),
        ("float16", (0.7, 1e-9), True),
        ("float16", (0.7, 1e6), True),
    ],
)
def test_a_bias_comes_back_as_it_was_loaded_or_is_lost(compute, values, is_lost):
    import torch

    bias = torch.full((64,), 0.5, dtype=torch.bfloat16)
    bias[: len(values)] = torch.tensor(values)
    model = one_layer(torch.randn(64, 128, dtype=torch.bfloat16), bias=bias.clone())
    model[0].compute_dtype = getattr(torch, compute)
    with torch.inference_mode():
        model(torch.randn(3, 128, dtype=torch.bfloat16))
    assert model[0].bias.dtype == getattr(torch, compute)
    assert [each.name for each in lost_weights(model)] == (["0.bias"] if is_lost else [])
    if not is_lost:
        found = exact_state_of(model)["0.bias"]
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, bias)


def test_layers_that_never_packed_are_saved_as_they_are(source, tmp_path):
    expected = file_of(load(source, "nf4 + double quant"), tmp_path / "theirs")
    model = load(source, "nf4 + double quant", quantization_config=four_bit(double_quant=True))
    for layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False
    logits(model)
    assert not lost_weights(model)
    found = exact_state_of(model)
    assert_equal(found, {name: expected[name] for name in found})
