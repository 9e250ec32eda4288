"""Which server, model and key a line means; and that a key goes to nobody it was not meant for."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kani_nb.config import EngineConfig, parse_config
from kani_nb.engines.httpclient.client import AccessRefusedError
from kani_nb.engines.openai import OpenAIClient, OpenAIEngine
from kani_nb.engines.openai.address import OPENAI_BASE, VLLM_BASE, find_key, read_address
from kani_nb.errors import ConfigError, KaniNbError, UnknownModelError
from tests.engines.openai.stand_in import StandIn


@pytest.mark.parametrize(
    ("text", "base", "model"),
    [
        ("openai:gpt-4o", OPENAI_BASE, "gpt-4o"),
        ("OpenAI:gpt-4o", OPENAI_BASE, "gpt-4o"),
        ("openai:", OPENAI_BASE, None),
        ("openai:m@http://h:1/v1", "http://h:1/v1", "m"),
        ("openai:org/model@https://h/v1", "https://h/v1", "org/model"),
        ("openai:http://h:1/v1", "http://h:1/v1", None),
        ("vllm:http://h:8000/v1", "http://h:8000/v1", None),
        ("vllm:org/m@http://h:8000/v1", "http://h:8000/v1", "org/m"),
        ("vllm:org/m", VLLM_BASE, "org/m"),
        ("http://h:1", "http://h:1/v1", None),
        ("http://h:1/", "http://h:1/v1", None),
        ("http://h:1/v1/", "http://h:1/v1", None),
        ("http://h:1/v1#m", "http://h:1/v1", "m"),
        ("http://h:1/v1#org/m%20x", "http://h:1/v1", "org/m x"),
        ("http://h:1/v1/models/org/m", "http://h:1/v1", "org/m"),
        ("http://h:1/v1?model=m", "http://h:1/v1", "m"),
        ("https://h/api/v3?model=m&api-version=2", "https://h/api/v3?api-version=2", "m"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1", None),
        ("http://user:pw@h:1/v1#m", "http://user:pw@h:1/v1", "m"),
        ("openai:m@http://user:pw@h:1/v1", "http://user:pw@h:1/v1", "m"),
        ("http://[::1]:8000", "http://[::1]:8000/v1", None),
    ],
)
def test_every_way_to_name_a_server_is_read(text, base, model):
    found = read_address(text)
    assert (found.api_base, found.model) == (base, model)
    assert found.is_vllm is text.startswith("vllm:")
    assert "pw" not in repr(found)


@pytest.mark.parametrize("text", ["http://", "openai:ftp://h/v1", "http://h:x/v1", "nothing", "https:///v1"])
def test_what_names_no_server_is_refused_in_words(text):
    with pytest.raises(ConfigError):
        read_address(text)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_in_words(text):
    for start in ("openai:", "vllm:", "http://", "openai:m@http://"):
        try:
            read_address(start + text)
        except KaniNbError as error:
            assert str(error)


def test_openai_base_url_is_where_openai_is(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://h:1/v1")
    assert read_address("openai:m").api_base == "http://h:1/v1"
    assert OpenAIClient().address == "http://h:1/v1"


# -- keys --------------------------------------------------------------------------------------------------------------

OPENAIS, OWN = "sk-openais-own-key", "key-for-my-servers"


@pytest.fixture
def keys(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", OPENAIS)
    monkeypatch.setenv("KANI_NB_API_KEY", OWN)


def key_for(base):
    found = find_key(base)
    return found.value if found else None


@pytest.mark.usefixtures("keys")
def test_openais_key_goes_to_openai_alone():
    assert key_for(OPENAI_BASE) == OPENAIS
    for other in (
        "http://api.openai.com/v1",  # anybody on the way could read it
        "https://api.openai.com.evil.example/v1",
        "https://api.openai.com@evil.example/v1",
        "https://evil.example/v1?host=api.openai.com",
        "http://127.0.0.1:8000/v1",
        "https://api.openai.com:8443/v1",
    ):
        assert key_for(other) == OWN


@pytest.mark.usefixtures("keys")
def test_openais_key_goes_to_the_server_of_openai_base_url_too(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://gateway:4000/v1")
    assert key_for("http://gateway:4000/v1") == OPENAIS
    assert key_for("http://gateway:4001/v1") == OWN


@pytest.mark.usefixtures("keys")
def test_the_own_key_goes_to_one_server_alone_where_that_is_named(monkeypatch):
    monkeypatch.setenv("KANI_NB_API_BASE", "http://mine:8000/v1")
    assert key_for("http://mine:8000/other") == OWN
    assert key_for("http://theirs:8000/v1") is None


def test_the_own_key_never_goes_to_openai(monkeypatch):
    monkeypatch.setenv("KANI_NB_API_KEY", OWN)
    assert key_for(OPENAI_BASE) is None


@pytest.mark.usefixtures("keys")
def test_a_key_that_is_passed_goes_where_it_was_passed():
    assert find_key("http://h/v1", " given-key\n").value == "given-key"


@pytest.mark.usefixtures("keys")
async def test_what_a_server_really_receives(server):
    engine = OpenAIEngine.from_config(parse_config(server.base))
    await engine.load()
    assert {each.headers.get("Authorization") for each in server.requests} == {f"Bearer {OWN}"}
    assert OPENAIS not in json.dumps([each.headers for each in server.requests])
    assert OWN not in repr(engine) + repr(engine.details()) + repr(engine.client) + repr(engine.client.key)
    assert engine.details()["key"] == "from KANI_NB_API_KEY"
    await engine.close()


async def test_openai_without_a_key_is_refused_before_anything_is_sent():
    engine = OpenAIEngine.from_config(parse_config("openai:gpt-4o"))
    with pytest.raises(AccessRefusedError, match="OPENAI_API_KEY"):
        await engine.load()


# -- the model ---------------------------------------------------------------------------------------------------------


async def test_the_only_model_is_taken(server):
    engine = OpenAIEngine.from_config(parse_config(f"vllm:{server.base}"))
    assert "only model" in repr(engine)
    await engine.load()
    assert engine.model == "tiny"
    assert (engine.max_context_size, engine.details()["context_from"]) == (400, "told by the server")
    await engine.close()


async def test_several_models_are_named():
    with StandIn(models=("one", "two")) as server:
        engine = OpenAIEngine(api_base=server.base)
        with pytest.raises(ConfigError, match=r"has 2 models.*it has one, two"):
            await engine.load()
        chosen = OpenAIEngine(api_base=f"{server.base}#two")
        await chosen.load()
        assert chosen.model == "two"
        await chosen.close()
        await engine.close()


async def test_names_of_models_that_are_none_are_left_out():
    with StandIn(models=("a\x1b[31m\nb", "x" * 10_000, "", "tiny")) as server:
        engine = OpenAIEngine(api_base=server.base)
        await engine.load()
        assert engine.model == "tiny"
        await engine.close()


async def test_no_model_at_all_is_said():
    with StandIn(models=()) as server:
        engine = OpenAIEngine(api_base=server.base)
        with pytest.raises(UnknownModelError, match="lists no model"):
            await engine.load()
        await engine.close()


async def test_a_model_that_is_not_there_is_refused_with_the_near_misses():
    with StandIn(models=("qwen2.5-7b", "llama-3-8b")) as server:
        engine = OpenAIEngine(model="qwen2.5-7B-it", api_base=server.base)
        with pytest.raises(UnknownModelError, match=r"did you mean qwen2\.5-7b"):
            await engine.load()
        await engine.close()


async def test_a_server_without_a_list_is_used_by_name(server):
    del server.usual["/v1/models"]
    engine = OpenAIEngine(model="tiny", api_base=server.base)
    await engine.load()
    assert "does not list its models" in engine.details()["notes"]
    assert (engine.max_context_size, engine.details()["context_from"]) == (8192, "assumed")
    await engine.close()


async def test_what_the_server_decides_cannot_be_asked_for(server):
    with pytest.raises(ConfigError, match="quantization cannot be chosen"):
        OpenAIEngine.from_config(parse_config(f"{server.base} --quant nf4"))
    with pytest.raises(ConfigError, match="local_only excludes http://example"):
        OpenAIEngine.from_config(parse_config("http://example.org/v1 --local-only"))
    OpenAIEngine.from_config(parse_config(f"{server.base} --local-only --max-context-size 100 --temperature 0.5"))


@pytest.mark.parametrize(
    "model",
    [
        "http://someone:hunter22@h/v1",
        "vllm:m@http://hunter22@h/v1",
        "https://h/v1?api_key=hunter22",
        "http://h?token=hunter22#m",
    ],
)
def test_a_secret_in_a_line_is_refused_and_not_repeated(model):
    with pytest.raises(ConfigError, match="does not belong into a line") as caught:
        OpenAIEngine.from_config(EngineConfig(model))
    assert "hunter22" not in str(caught.value)


def test_an_address_with_a_secret_can_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://someone:hunter22@127.0.0.1:8000/v1?key=abcdef123")
    engine = OpenAIEngine.from_config(EngineConfig("openai:org/m@rev"))
    assert (engine.model, engine.client.address) == ("org/m@rev", "http://127.0.0.1:8000/v1")
    assert not any(secret in repr(engine) + repr(engine.details()) for secret in ("hunter22", "abcdef123"))


def test_wrong_arguments_are_refused_in_words():
    with pytest.raises(ConfigError, match="did you mean temperature"):
        OpenAIEngine(model="m", api_base="http://h/v1", temprature=1)
    with pytest.raises(ConfigError, match="vendor"):
        OpenAIEngine(client=object())
    with pytest.raises(ConfigError, match="max_context_size"):
        OpenAIEngine(max_context_size=0)
    with pytest.raises(ConfigError, match="Authorization") as caught:
        OpenAIEngine("schlüssel")
    assert "schl" not in str(caught.value)
