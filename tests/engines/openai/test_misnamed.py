"""What stands in the wrong place, and models that a server does not list: one error each, which offers another way."""

from __future__ import annotations

import pytest

from kani_nb.config import parse_config
from kani_nb.engines.httpclient.client import ServerError
from kani_nb.engines.openai import OpenAIEngine
from kani_nb.engines.openai.address import read_address, with_scheme
from kani_nb.errors import ConfigError, UnknownModelError
from kani_nb.messages import ChatMessage
from tests.engines.openai.stand_in import StandIn, refuse

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8765/v1", "127.0.0.1:8765", "https://me:s3cret@h/v1"])
def test_an_address_in_the_place_of_the_model_is_refused(address):
    with pytest.raises(ConfigError, match="that is a server's address") as caught:
        OpenAIEngine("smol.gguf", address)
    assert "api_base=" in caught.value.fix
    assert "s3cret" not in str(caught.value)


def test_an_address_or_a_file_in_the_place_of_the_key_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="api_key is a server's address"):
        OpenAIEngine("http://127.0.0.1:8765/v1")
    (file := tmp_path / "model.bin").write_text("x")
    for each in (str(file), "smol.gguf"):
        with pytest.raises(ConfigError, match="api_key is the name of a file"):
            OpenAIEngine(each)
    OpenAIEngine("sk-" + "x" * 5000, "gpt-4o")  # too long for a file's name


@pytest.mark.parametrize("name", ["base_url", "openai_api_base", "url"])
def test_what_others_call_the_address_is_a_near_miss(name):
    with pytest.raises(ConfigError, match="did you mean api_base"):
        OpenAIEngine(**{name: "http://127.0.0.1:8765/v1"})


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("vllm:localhost:8000/v1", "vllm:http://localhost:8000/v1"),
        ("vllm:gpt-4o@127.0.0.1:8000", "vllm:gpt-4o@http://127.0.0.1:8000/v1"),
        ("openai:org/m@gpu.example.org:8000/v1", "openai:org/m@http://gpu.example.org:8000/v1"),
    ],
)
def test_a_scheme_that_is_missing_is_offered(text, meant):
    with pytest.raises(ConfigError, match="http:// is missing") as caught:
        read_address(text)
    assert caught.value.fix == f"did you mean {meant}?"


@pytest.mark.parametrize(
    "name", ["org/model", "mistral:7", "llama3.2:70", "gpt-4o", "org/m@rev", "qwen3:8b", "a/b:1234"]
)
def test_a_models_name_is_no_address(name):
    assert with_scheme(name) is None


# -- what a server lists ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("owner", ["somebody", "me", "llamacpp", "vllm", "library"])
async def test_a_name_that_is_not_listed_is_refused_by_every_kind_of_server(owner):
    with StandIn(owner=owner, models=("tiny", "other")) as server:
        engine = OpenAIEngine.from_config(parse_config(f"{server.base}#gpt-4"))
        with pytest.raises(UnknownModelError, match="it has tiny, other"):
            await engine.load()
        await engine.close()


@pytest.mark.parametrize(
    ("listed", "named"), [("llama3:latest", "llama3"), ("org/m@main", "org/m"), ("org/m", "org/m@main")]
)
async def test_a_tag_or_a_branch_that_goes_without_saying_is_no_other_name(listed, named):
    with StandIn(owner="library", models=(listed,)) as server:
        engine = OpenAIEngine(model=named, api_base=server.base)
        await engine.load()
        assert engine.model == named
        await engine.close()


async def test_a_folder_is_used_where_only_other_models_are_listed():
    with StandIn(owner="somebody") as server:
        engine = OpenAIEngine(model="/models/own", api_base=server.base)
        await engine.load()
        assert "does not list /models/own" in engine.details()["notes"]
        await engine.close()


@pytest.mark.parametrize("status", [405, 500, 501, 502, 503])
async def test_a_list_that_fails_prevents_nothing_where_the_model_is_named(server, status):
    server.usual["/v1/models"] = refuse(status, {"detail": "offline"})
    engine = OpenAIEngine.from_config(parse_config(server.base))
    with pytest.raises(ServerError, match=str(status)) as caught:
        await engine.load()
    assert f"name the model, {server.base}#MODEL" in caught.value.fix
    await engine.close()
    engine = OpenAIEngine.from_config(parse_config(f"{server.base}#tiny"))
    assert (await engine.predict([ChatMessage.user("hello there")])).message.text == "hello there"
    await engine.close()
