"""The old ways of asking for a precision mean what they meant, and what the caller passed stays as it was."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BitsAndBytesConfig

from kani_nb.errors import ConfigError
from kani_nb.hardware.legacy_kwargs import translate
from kani_nb.hardware.scheme_configs import bitsandbytes_config
from kani_nb.hardware.schemes import find_scheme
from kani_nb.quantization import Quantization


@pytest.mark.parametrize(
    ("quantization", "load", "arguments", "expected"),
    [
        ("nf4", {}, {}, Quantization("nf4")),
        (find_scheme("int8"), {}, {}, Quantization("int8")),
        ("4bit", {}, {}, Quantization("4bit")),
        (None, {"load_in_4bit": True}, {}, Quantization("fp4")),
        (None, {"load_in_8bit": True}, {}, Quantization("int8")),
        (None, {"load_in_8bit": False}, {}, Quantization()),
        (None, {}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, Quantization("nf4")),
        ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {}, Quantization("nf4")),
        (
            None,
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16, "bnb_4bit_use_double_quant": True},
            {},
            Quantization("fp4", double_quant=True, compute_dtype="bfloat16"),
        ),
        (None, {}, {"llm_int8_threshold": 10}, Quantization("int8", llm_int8_threshold=10.0)),
        ({"llm_int8_skip_modules": ["lm_head"]}, {}, {}, Quantization("int8", llm_int8_skip_modules=("lm_head",))),
        (
            BitsAndBytesConfig(load_in_4bit=True),
            {},
            {},
            # The object's own default, which says that products are in float32.
            Quantization("fp4", compute_dtype="float32"),
        ),
        (BitsAndBytesConfig(), {}, {}, Quantization()),
        (
            None,
            {"quantization_config": BitsAndBytesConfig(llm_int8_enable_fp32_cpu_offload=True)},
            {},
            Quantization("int8", llm_int8_enable_fp32_cpu_offload=True),
        ),
    ],
)
def test_every_way_of_asking_means_one_scheme(quantization, load, arguments, expected):
    assert translate(quantization, load, arguments).quantization == expected


def test_nothing_the_caller_passed_is_changed():
    config = BitsAndBytesConfig(load_in_4bit=True)
    load = {
        "quantization_config": config,
        "device_map": {"": "cpu"},
        "torch_dtype": torch.float16,
        "use_auth_token": "hf_secret",
        "attn_implementation": "eager",
    }
    arguments = {"double_quant": None}
    before = (copy.deepcopy(load), config.to_dict())
    said = translate(None, load, arguments)
    assert load.keys() == before[0].keys()
    assert config.to_dict() == before[1]
    assert (said.dtype, said.device_map, said.token) == ("float16", {"": "cpu"}, "hf_secret")
    assert said.rest == {"attn_implementation": "eager"}


def test_a_config_of_a_method_without_a_scheme_is_passed_on_as_it_is():
    from transformers import FineGrainedFP8Config

    config = FineGrainedFP8Config()
    said = translate(None, {"quantization_config": config}, {})
    assert said.foreign_config is config
    assert said.quantization.is_none


BITS = st.builds(
    Quantization,
    scheme=st.sampled_from(["fp4", "nf4"]),
    double_quant=st.sampled_from([None, True]),
    compute_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    quant_storage=st.sampled_from([None, "bfloat16", "float32"]),
    llm_int8_skip_modules=st.sampled_from([None, ("lm_head",), ("a", "b")]),
    llm_int8_enable_fp32_cpu_offload=st.sampled_from([None, True]),
) | st.builds(
    Quantization,
    scheme=st.just("int8"),
    llm_int8_threshold=st.none() | st.floats(0, 100).filter(lambda value: value != 6.0),
    llm_int8_skip_modules=st.sampled_from([None, ("lm_head",)]),
    llm_int8_has_fp16_weight=st.sampled_from([None, True]),
)


@given(BITS)
def test_a_config_object_made_from_settings_says_the_same_settings(settings):
    config = bitsandbytes_config(settings, "bfloat16")
    assert translate(config, {}, {}).quantization == settings


@pytest.mark.parametrize(
    ("quantization", "load", "arguments", "said"),
    [
        ("nf4", {"load_in_8bit": True}, {}, "the scheme is given as nf4 and as int8"),
        (None, {"load_in_8bit": True, "load_in_4bit": True}, {}, "load_in_4bit and load_in_8bit are both given"),
        ("nf4", {"quantization_config": {"load_in_8bit": True}}, {}, "quantization and quantization_config are both"),
        (None, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, {}, "bnb_4bit_quant_type is 'nf3'"),
        (None, {"quantization_config": {"bits": 4}}, {}, "quantization_config holds 'bits'"),
        (None, {"quantization_config": {"quant_method": "gptq"}}, {}, "quant_method is 'gptq' in a dict"),
        (None, {}, {"double_quant": True}, "double_quant was given without a scheme"),
        (4, {}, {}, "quantization is 4: it must be the name of a scheme"),
        (None, {"torch_dtype": torch.float16, "dtype": "float32"}, {}, "dtype is given as"),
        (None, {"load_in_4bit": True, "llm_int8_threshold": "six"}, {}, "llm_int8_threshold is 'six'"),
        (None, {"load_in_4bit": True, "bnb_4bit_compute_dtype": "int3"}, {}, "compute_dtype is 'int3'"),
    ],
)
def test_contradictions_and_bad_values_are_one_short_error(quantization, load, arguments, said):
    with pytest.raises(ConfigError) as caught:
        translate(quantization, load, arguments)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
