"""What a line says and what a configuration is: each the other's inverse, and bad values refused with their range."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kani_nb.config import EngineConfig, parse_config
from kani_nb.errors import ConfigError, near_misses
from kani_nb.generation_params import GenerationParams
from kani_nb.options import split_words
from kani_nb.quantization import DTYPES, STORAGES, Quantization

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12).filter(str.strip)
PARAMS = st.builds(
    GenerationParams,
    max_new_tokens=st.integers(1, 10**6),
    do_sample=st.none() | st.booleans(),
    temperature=st.none() | st.floats(0, 5),
    top_k=st.none() | st.integers(0, 1000),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1),
    repetition_penalty=st.none() | st.floats(0.1, 3),
    seed=st.none() | st.integers(0, 2**63 - 1),
    stop_strings=st.lists(WORDS, max_size=3),
    eos_token_id=st.none() | st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
)
QUANTIZATIONS = st.builds(
    Quantization,
    scheme=st.sampled_from(["none", "int8", "nf4"]) | WORDS.filter(lambda word: "+" not in word),
    double_quant=st.none() | st.booleans(),
    compute_dtype=st.sampled_from(DTYPES),
    quant_storage=st.none() | st.sampled_from(STORAGES),
    group_size=st.none() | st.sampled_from([32, 64, 128]),
    llm_int8_threshold=st.none() | st.floats(0, 100),
    llm_int8_skip_modules=st.none() | st.lists(WORDS, max_size=3),
    llm_int8_has_fp16_weight=st.none() | st.booleans(),
    llm_int8_enable_fp32_cpu_offload=st.none() | st.booleans(),
)
CONFIGS = st.builds(
    EngineConfig,
    model=WORDS,
    revision=st.none() | WORDS,
    dtype=st.sampled_from(DTYPES),
    quantization=QUANTIZATIONS,
    device=st.none() | st.sampled_from(["cpu", "cuda:1"]),
    device_map=st.none() | st.just('{"": 0, "lm_head": "cpu"}'),
    max_context_size=st.none() | st.integers(1, 10**7),
    cache_gib=st.none() | st.floats(0, 100),
    threads=st.none() | st.integers(1, 99),
    max_memory=st.none() | st.just("0=10GiB,cpu=30GiB"),
    allow_offload=st.booleans(),
    offload_folder=st.none() | WORDS,
    cache_quantized=st.booleans(),
    local_only=st.booleans(),
    trust_remote_code=st.booleans(),
    generation=PARAMS,
)


@given(CONFIGS)
def test_the_line_of_a_configuration_gives_an_equal_one(config):
    assert parse_config(config.to_line()) == config


@given(st.text(max_size=60))
@example("0\n\x0c\x850")
def test_any_line_gives_a_configuration_or_a_short_error(line):
    try:
        assert isinstance(parse_config(line), EngineConfig)
    except ConfigError as error:
        assert str(error)
        assert len(str(error).splitlines()) <= 3


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"temperature": -1}, "temperature is -1: it must be a number of at least 0"),
        ({"top_p": 0}, "top_p is 0: it must be in (0, 1]"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: it must be a whole number of at least 1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"seed": True}, "seed is True"),
        ({"stop_strings": [1]}, "stop_strings holds 1: it must be text"),
        ({"stop_strings": ["a", ""]}, "stop_strings holds an empty string"),
        ({"eos_token_id": "</s>"}, "eos_token_id holds '</s>': it must be a token id"),
        ({"temprature": 1}, "unknown generation parameter 'temprature'\n→ did you mean temperature?"),
    ],
)
def test_a_bad_generation_parameter_is_named_with_what_is_allowed(values, said):
    with pytest.raises(ConfigError) as caught:
        GenerationParams.from_kwargs(values)
    assert said in str(caught.value)


def test_numbers_of_numpy_are_numbers():
    import numpy as np

    params = GenerationParams(max_new_tokens=np.int64(5), temperature=np.float32(0.5))
    assert (params.max_new_tokens, params.temperature) == (5, 0.5)


def test_other_names_for_the_same_parameter_are_understood():
    assert GenerationParams.from_kwargs({"max_tokens": 3, "stop": "x"}) == GenerationParams(
        max_new_tokens=3, stop_strings=("x",)
    )
    assert EngineConfig("m", dtype="bf16") == EngineConfig("m", dtype="bfloat16")


def test_backslashes_belong_to_paths_on_windows_only(monkeypatch):
    line = r"C:\models\llama 'two words'"
    assert split_words(line) == ["C:modelsllama", "two words"]
    monkeypatch.setattr("os.name", "nt")
    assert split_words(line) == [r"C:\models\llama", "two words"]


def test_near_misses_are_near():
    assert near_misses("tempratur", ["temperature", "top_p", "seed"]) == ["temperature"]
    assert near_misses("xyz", ["temperature", "top_p", "seed"]) == []
