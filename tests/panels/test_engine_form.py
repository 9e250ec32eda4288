"""The panel's controls, the magic line and its printed form say the same; each mistake is told at its control."""

import json

import pytest
from hypothesis import given

from kani_nb.config import EngineConfig, parse_config
from kani_nb.notebook.panels.engine_form import read_form, sections, values_of
from kani_nb.options import LOAD_OPTIONS
from tests.test_config import CONFIGS


@given(CONFIGS)
def test_the_controls_the_line_and_the_configuration_are_equal(config):
    sent = json.loads(json.dumps(values_of(config)))
    form = read_form(sent)
    assert not form.errors
    assert form.config == config == parse_config(config.to_line())
    assert form.config.to_line() == config.to_line()
    assert values_of(form.config) == sent


def test_every_option_has_a_control_of_its_own():
    shown = [field["name"] for section in sections() for field in section["fields"]]
    assert sorted(shown) == sorted(["model", *(option.dest for option in LOAD_OPTIONS)])
    assert all(field["help"] for section in sections() for field in section["fields"])
    json.dumps(sections())


def test_nothing_said_is_the_default():
    said = {name: None if value is not False else False for name, value in values_of(EngineConfig("m")).items()}
    assert read_form({**said, "model": "m"}).config == EngineConfig("m")
    assert read_form({"model": "m", "threads": "", "stop_strings": []}).config == EngineConfig("m")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("model", "", "no model was named"),
        ("threads", "two", "CPU threads is 'two': it must be a whole number"),
        ("threads", "2.5", "CPU threads is '2.5': it must be a whole number"),
        ("threads", "0", "threads is 0"),
        ("max_context_size", "-3", "max_context_size is -3"),
        ("cache_gib", "nan", "cache_gib is nan"),
        ("dtype", "int3", "dtype is 'int3'"),
        ("compute_dtype", "int3", "compute_dtype is 'int3'"),
        ("scheme", "nf4+q", "'q' in the scheme"),
        ("group_size", "7", "group_size is 7"),
        ("llm_int8_threshold", "-1", "llm_int8_threshold is -1.0"),
        ("quant_storage", "int2", "quant_storage is 'int2'"),
        ("double_quant", "yes", "double_quant is 'yes'"),
        ("allow_offload", "yes", "allow_offload is 'yes'"),
        ("temperature", "-1", "temperature is -1.0"),
        ("top_p", "2", "top_p is 2.0"),
        ("eos_token_id", ["1", "x"], "it must be a whole number"),
        ("max_new_tokens", "0", "max_new_tokens is 0"),
        ("seed", "-1", "seed is -1"),
    ],
)
def test_a_mistake_is_told_at_its_control(name, value, said):
    form = read_form({"model": "m", name: value})
    assert form.config is None
    assert list(form.errors) == [name]
    assert said in form.errors[name]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "hf_abcdefghijklmnopqrstuv"),
        ("model", "https://me:pa55word@host:8000/v1"),
        ("model", "vllm:http://host:8000/v1?api_key=pa55word"),
        ("revision", "hf_abcdefghijklmnopqrstuv"),
        ("stop_strings", ["END", "hf_abcdefghijklmnopqrstuv"]),
    ],
)
def test_a_secret_is_refused_at_its_control_and_never_repeated(name, value):
    form = read_form({"model": "m", name: value})
    assert form.config is None
    assert list(form.errors) == [name]
    assert "does not belong into a panel" in form.errors[name]
    assert "hf_abc" not in str(form)
    assert "pa55word" not in str(form)


def test_mistakes_in_several_controls_are_all_told():
    values = {"model": "m", "threads": "x", "group_size": "7", "temperature": "-1", "max_context_size": "0"}
    assert set(read_form(values).errors) == {"threads", "group_size", "temperature", "max_context_size"}
