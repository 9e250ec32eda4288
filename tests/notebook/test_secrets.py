"""A token typed in a cell is refused, and never repeated."""

import os

import pytest

from kani_nb.errors import ConfigError
from kani_nb.notebook.secrets import ask_token, refuse_secrets, without_secrets

SECRET = "hf_abcdefghijKLMNOP"


@pytest.mark.parametrize(
    "line",
    [
        f"org/model --token {SECRET}",
        f"org/model --token={SECRET}",
        "org/model --token anything",
        "org/model --hf-token x",
        "org/model --api-key x",
        f"org/model {SECRET}",
        f"{SECRET}",
        f"--system='my token is {SECRET}'",
        "org/model token=verysecret",
        "org/model HF_TOKEN='verysecret'",
        "org/model --tok verysecret",
        "org/model --hf-toke verysecret",
        "org/model --hf verysecret",
        "org/model --use-auth verysecret",
        "org/model -token verysecret",
    ],
)
def test_a_line_with_a_token_is_refused_with_advice_and_without_repeating_it(line):
    with pytest.raises(ConfigError) as caught:
        refuse_secrets(line)
    text = str(caught.value)
    assert "HF_TOKEN" in text
    assert "Colab's Secrets" in text
    assert "%kani token" in text
    assert SECRET not in text
    assert "sk-proj" not in text
    assert "verysecret" not in text


@pytest.mark.parametrize(
    "line",
    [
        "openai:gpt sk-proj-verysecret0123",
        "http://me:verysecret@127.0.0.1:8765/v1 --as pw",
        "http://verysecret@h/v1",
        "vllm:m@https://me:verysecret@h/v1",
        "http://me:very/verysecret@h/v1",
        "me:verysecret@127.0.0.1:8765/v1",
        "http://h:8000/v1?api_key=verysecret",
        "http://h:8000/v1?x=1&api-key=ab",
        "http://h/v1 --api-key verysecret",
    ],
)
def test_a_secret_for_a_server_is_refused_with_the_servers_own_variable(line):
    with pytest.raises(ConfigError) as caught:
        refuse_secrets(line)
    text = str(caught.value)
    assert "KANI_NB_API_KEY" in text
    assert "HF_TOKEN" not in text
    assert "verysecret" not in text
    assert "verysecret" not in without_secrets(line.partition(" --")[0])


@pytest.mark.parametrize(
    "line",
    [
        "smollm2",
        "http://127.0.0.1:8000/v1#org/m@rev",
        "http://[::1]:8000/v1#m@rev",
        "openai:m@http://h:8000/v1 --as pw",
        "openai:m@host:8000/v1",
        "http://h/v1?model=m&max_tokens=5",
        "org/model@main --dtype float32",
        "org/hf_model",
        "./hf_models/x.gguf",
        "smollm2 --max-new-tokens 5",
        "smollm2 --max-new-token 5 --min-new-tok=3 --eos-token-id 2 --eos-tok 2",
        "--to poems --append",
        "system Count every token = one word",
        "org/token-classifier",
        "hf_x",
    ],
)
def test_a_line_without_one_is_not(line):
    refuse_secrets(line)


def test_tokens_in_a_text_are_blotted_out():
    assert SECRET not in without_secrets(f"401 for {SECRET}")


def test_a_token_asked_for_ends_in_the_environment(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    ask_token(lambda prompt: f" {SECRET} ")
    assert os.environ["HF_TOKEN"] == SECRET
    monkeypatch.delenv("HF_TOKEN")


def test_where_nobody_can_be_asked_the_error_says_what_to_do(monkeypatch):
    def ask(prompt):
        raise EOFError

    with pytest.raises(ConfigError, match="set HF_TOKEN in the environment"):
        ask_token(ask)
    with pytest.raises(ConfigError, match="nothing was entered"):
        ask_token(lambda prompt: "")


def test_a_line_with_a_password_in_an_address_shows_nothing_but_one_error(cells):
    printed = cells.bad("%load_engine http://me:s3cret@127.0.0.1:8765/v1 --as pw")
    assert "a password or a key does not belong into a cell" in printed
    assert "was not loaded" not in printed
    assert "s3cret" not in printed
