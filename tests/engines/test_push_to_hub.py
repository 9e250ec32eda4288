"""A pushed model is on the Hub in one commit, and whoever pulls it gets the same logits; a Hub on loopback listens."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from kani_nb.engines.huggingface import saving
from kani_nb.engines.sources import resolve
from kani_nb.engines.sources_cache import cache_folder
from kani_nb.errors import ConfigError, EngineError, GatedModelError, ModelUnavailableError
from tests.conftest import make_tokenizer
from tests.engines.hub_push_stand_in import Account, PushHub
from tests.engines.quantized import assert_same_tensors, file_of, load, logits, make_bfloat16, pack

# The Hub's library gives its HTTP library a file in a way that this calls old.
pytestmark = [pytest.mark.quant, pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")]

TOKEN, READ_ONLY = "hf_" + "w" * 20, "hf_" + "r" * 20


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The only Hub that this test sees, caches of its own, and no login."""
    stand_in = PushHub({TOKEN: Account("ada", organizations=("lab",)), READ_ONLY: Account("ada", may_write=False)})
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", stand_in.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("KANI_NB_CACHE", str(tmp_path / "own"))
    # The store of large files that the Hub has besides is no part of the stand-in.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield stand_in
    stand_in.close()
    leftovers = list((cache_folder() / "pushes").iterdir()) if (cache_folder() / "pushes").exists() else []
    assert not leftovers


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_bfloat16(tmp_path_factory.mktemp("bfloat16"))


def push_model(model, tokenizer, repo_id, *, private=None, commit_message=None, **options):
    """Both steps of a push, and the repository's address."""
    return saving.prepare_push(model, tokenizer, repo_id, **options).send(private, commit_message)


@pytest.mark.parametrize("scheme", ["int8", "nf4", "nf4 + double quant"])
def test_what_is_pushed_comes_back_bit_for_bit(scheme, hub, source, tokenizer, tmp_path):
    import torch

    expected = file_of(load(source, scheme), tmp_path / "theirs")
    model = pack(load(source, scheme)) if scheme.startswith("nf4") else load(source, scheme)
    address = push_model(model, tokenizer, "ada/first", token=TOKEN, source=source, reload=lambda: load(source, scheme))
    assert address == f"{hub.url}/ada/first"
    pulled = resolve("ada/first")
    assert_same_tensors(pulled.folder, expected)
    again = load(pulled.folder)
    assert torch.equal(logits(again), logits(load(source, scheme)))
    # a model that was loaded quantized, and has answered, pushes too
    push_model(again, tokenizer, "ada/second", token=TOKEN, source=pulled.folder, reload=lambda: load(pulled.folder))
    first, second = (hub.repos[f"ada/{name}"].files for name in ("first", "second"))
    assert second["model.safetensors"] == first["model.safetensors"]
    assert second.keys() == first.keys()


def test_a_push_is_one_commit_and_replaces_the_weights_of_the_last(hub, source, tokenizer):
    model = load(source, "nf4")
    push_model(model, tokenizer, "lab/shared", token=TOKEN, private=True, commit_message="First weights")
    repo = hub.repos["lab/shared"]
    assert repo.is_private
    assert [commit.message for commit in repo.commits[1:]] == ["First weights"]
    repo.files["README.md"] = b"# ours"
    repo.files["model-00001-of-00002.safetensors"] = b"of an earlier push"
    push_model(model, tokenizer, "lab/shared", token=TOKEN)
    assert repo.commits[-1].message == "Upload nf4 weights with kani_nb"
    assert {"README.md", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= repo.files.keys()
    assert "model-00001-of-00002.safetensors" not in repo.files
    assert "model-00001-of-00002.safetensors" in repo.commits[-2].files


def test_nothing_of_this_machine_is_published(hub, source, tokenizer):
    push_model(load(source, "nf4"), tokenizer, "ada/first", token=TOKEN, source=source)
    published = b"".join(hub.repos["ada/first"].files.values())
    assert TOKEN.encode() not in published
    assert str(source.parent).encode() not in published
    origin = json.loads(hub.repos["ada/first"].files["kani_nb.json"])["origin"]
    assert origin == f"{source.name}, quantized to nf4"


def test_the_token_goes_to_the_hub_and_to_no_store_of_files(hub, source, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push_model(load(source), tokenizer, "ada/first")
    stored = [asked for asked in hub.asked if asked.path.startswith("/storage/")]
    assert stored
    assert not any(asked.authorization for asked in stored)
    assert {asked.authorization for asked in hub.asked} == {None, f"Bearer {TOKEN}"}


@pytest.mark.parametrize(
    ("repo_id", "token", "error", "says"),
    [
        ("ada/first", None, ConfigError, "needs a token, and none was found"),
        ("ada/first", "hf_" + "x" * 20, GatedModelError, r"\(401\): a token from the token argument was refused"),
        ("ada/first", READ_ONLY, GatedModelError, r"\(403\): .*rights to write to ada\n→ take a token with the role"),
        ("other/first", TOKEN, GatedModelError, r"\(403\): .*rights to write to other"),
        ("ada/first model", TOKEN, ConfigError, "cannot be called 'ada/first model'"),
        ("a/b/c", TOKEN, ConfigError, "cannot be called 'a/b/c'"),
    ],
)
def test_what_the_hub_refuses_is_said_without_the_token(repo_id, token, error, says, hub, source, tokenizer):
    with pytest.raises(error, match=says) as caught:
        push_model(load(source), tokenizer, repo_id, token=token)
    assert token is None or token not in str(caught.value)
    assert not hub.repos


def test_offline_and_an_absent_hub_are_told_apart(hub, source, tokenizer, monkeypatch):
    model = load(source)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnavailableError, match="HF_HUB_OFFLINE forbids"):
        push_model(model, tokenizer, "ada/first", token=TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://user:secret@127.0.0.1:9")
    with pytest.raises(ModelUnavailableError, match=r"http://127.0.0.1:9 could not be reached") as caught:
        push_model(model, tokenizer, "ada/first", token=TOKEN)
    assert "secret" not in str(caught.value)
    assert not hub.asked


def test_a_push_that_fails_on_the_way_changes_nothing_there(hub, source, tokenizer):
    hub.repos.clear()
    hub.failures["/api/models/ada/first/commit/"] = [500] * 10
    with pytest.raises(ModelUnavailableError, match=r"(?s)answered 500 when ada/first .*nothing was changed"):
        push_model(load(source), tokenizer, "ada/first", token=TOKEN)
    assert not hub.repos["ada/first"].files


@pytest.mark.parametrize(("status", "error"), [(403, GatedModelError), (400, ModelUnavailableError)])
def test_a_store_of_files_that_refuses_is_told_like_the_hub(status, error, hub, source, tokenizer):
    hub.failures["/storage/"] = [status]
    with pytest.raises(error, match=f"{status}.*ada/first|ada/first.*{status}"):
        push_model(load(source), tokenizer, "ada/first", token=TOKEN)
    assert not hub.repos["ada/first"].files


def test_what_cannot_be_saved_is_not_pushed_and_no_repository_is_made(hub, source, tokenizer):
    with pytest.raises(EngineError, match="expanded and rounded"):
        push_model(pack(load(source, "nf4 + double quant")), tokenizer, "ada/first", token=TOKEN)
    assert not hub.repos


PUSH = """
import sys
from kani_nb import HuggingEngine

async def push():
    engine = HuggingEngine("smollm2", quantization="nf4", dtype="bfloat16")
    completion = await engine.predict(MESSAGES, do_sample=False, max_new_tokens=12)
    print("ANSWER", completion.message.text)
    print("ADDRESS", await engine.push_to_hub("ada/smollm2-nf4", private=False))

if __name__ == "__main__":
    import asyncio
    from kani_nb import ChatMessage
    MESSAGES = [ChatMessage.user("What is the capital of France?")]
    asyncio.run(push())
"""
PULL = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("ada/smollm2-nf4")
tokenizer = AutoTokenizer.from_pretrained("ada/smollm2-nf4")
messages = [{"role": "user", "content": "What is the capital of France?"}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**ids, do_sample=False, max_new_tokens=12)
print("ANSWER", tokenizer.decode(answer[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))
"""


@pytest.mark.quant
@pytest.mark.timeout(300)
def test_a_process_pushes_and_another_pulls_with_plain_transformers(hub, smollm2, tmp_path, monkeypatch):
    monkeypatch.delenv("KANI_NB_CACHE")
    environment = {**os.environ, "HF_HUB_DISABLE_XET": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}

    def run(program, **changes):
        ran = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment | changes, timeout=250
        )
        assert ran.returncode == 0, ran.stderr
        return dict(line.split(" ", 1) for line in ran.stdout.splitlines() if line.startswith(("ANSWER", "ADDRESS")))

    pushed = run(PUSH, HF_TOKEN=TOKEN)
    assert pushed["ADDRESS"] == f"{hub.url}/ada/smollm2-nf4"
    pulled = run(PULL, HF_HOME=str(tmp_path / "theirs"))
    assert "Paris" in pulled["ANSWER"]
    assert pulled["ANSWER"] == pushed["ANSWER"]
