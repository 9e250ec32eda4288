"""The contract against two real servers on 127.0.0.1: `transformers serve`, and llama-cpp-python's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from typing import ClassVar

import httpx
import pytest

from kani_nb.engines.base import TextDelta
from kani_nb.engines.openai import OpenAIEngine
from kani_nb.errors import PromptTooLongError, UnknownModelError
from kani_nb.messages import ChatMessage
from kani_nb.testing import EngineContract
from tests.engines.llamacpp.tiny_gguf import write_gguf

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def need(*modules):
    missing = [each for each in modules if importlib.util.find_spec(each) is None]
    if missing:
        pytest.skip(f"the server needs {', '.join(missing)}")


def serve(command, log, health, env=None):
    """A server's process, once it answers; its port is one that was free."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        )
    deadline = time.monotonic() + 120
    while True:
        try:
            if httpx.get(health, timeout=2, trust_env=False).status_code == 200:
                return process
        except httpx.HTTPError:
            pass
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.1)


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def transformers_serve(tiny_model, tmp_path_factory):
    need("fastapi", "uvicorn", "openai")
    home, port = tmp_path_factory.mktemp("serve"), free_port()
    (home / "hub").mkdir()
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tiny_model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    env = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    process = serve(command, home / "log.txt", f"http://127.0.0.1:{port}/health", env)
    yield f"http://127.0.0.1:{port}/v1", str(tiny_model)
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def llama_cpp_server(tmp_path_factory):
    need("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")
    home, port = tmp_path_factory.mktemp("llama-cpp"), free_port()
    gguf = write_gguf(home / "tiny.gguf")
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--model_alias", "tiny"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--n_ctx", "512", "--n_threads", "1"]
    process = serve(command, home / "log.txt", f"http://127.0.0.1:{port}/v1/models")
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait(30)


class TestTransformersServe(EngineContract):
    """It does not say how much it can read, nor count a prompt before it has answered it."""

    counts_exactly: ClassVar = False

    @pytest.fixture(autouse=True)
    def server(self, transformers_serve):
        self.base, self.model = transformers_serve

    def make_engine(self):
        return OpenAIEngine(model=self.model, api_base=self.base, max_context_size=512, retry=1)

    def test_its_counts_are_those_of_the_tokenizer(self, tiny_model):
        async def check(engine):
            from transformers import AutoTokenizer

            messages = self.make_messages()
            completion = await self._answer(engine, messages)
            chat = [{"role": "user", "content": messages[0].text}]
            tokenizer = AutoTokenizer.from_pretrained(tiny_model)
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            assert completion.prompt_tokens == len(ids)
            assert await engine.prompt_len(messages) == len(ids)

        self._with_engine(check)

    def test_a_model_that_it_does_not_serve_is_said(self):
        async def check():
            engine = OpenAIEngine(model="another", api_base=self.base)
            with pytest.raises(UnknownModelError, match="has no model 'another'"):
                await engine.predict([ChatMessage.user("hello")])
            await engine.close()

        self._run(check())


class TestLlamaCppServer(EngineContract):
    """It counts texts, but not what its template puts around them; and does not say how much it can read."""

    counts_exactly: ClassVar = False

    @pytest.fixture(autouse=True)
    def server(self, llama_cpp_server):
        self.base = llama_cpp_server

    def make_engine(self):
        return OpenAIEngine(api_base=self.base, max_context_size=512, retry=1)

    def test_its_tokenizer_counts_and_the_only_model_is_taken(self):
        async def check(engine):
            assert engine.model == "tiny"
            assert engine.details()["server"] == "llama-cpp-python"
            assert "the server's tokenizer" in engine.details()["counted_by"]
            texts = ("the quick brown fox", "the quick brown fox jumps over the lazy dog")
            short, long = [await engine.prompt_len(self.make_messages(text)) for text in texts]
            assert 0 < short < long < 60

        self._with_engine(check)

    def test_its_pieces_are_counted_as_tokens(self):
        """It gives no usage in a stream; asked without one, it counts at least as many."""

        async def check(engine):
            messages, params = self.make_messages(), {"do_sample": False, "max_new_tokens": 12}
            events = [event async for event in engine.stream(messages, **params)]
            counts, whole = [each.tokens for each in events if isinstance(each, TextDelta)], events[-1]
            assert counts == list(range(1, len(counts) + 1))
            assert (whole.prompt_tokens, whole.completion_tokens) == (None, counts[-1])
            assert engine.details()["tokens_from"].startswith("the pieces of the stream")
            record = await engine.client.create_chat_completion("tiny", messages, temperature=0, max_tokens=12)
            assert counts[-1] <= record["usage"]["completion_tokens"] <= 12

        self._with_engine(check)

    def test_what_it_only_says_when_it_does_not_stream_is_heard(self):
        """It breaks off where a prompt is too long for it; asked without a stream it says why."""

        async def check():
            engine = OpenAIEngine(api_base=self.base, max_context_size=100_000, retry=1)
            with pytest.raises(PromptTooLongError, match="512"):
                await engine.predict(self.make_messages("word " * 700))
            await engine.close()

        self._run(check())

    def test_an_answer_is_held_to_a_schema(self):
        schema = '{"type": "object", "properties": {"size": {"enum": [1, 2]}}, "required": ["size"]}'

        async def check(engine):
            assert engine.holds_to_schemas
            completion = await engine.predict(self.make_messages(), json_schema=schema, max_new_tokens=60)
            assert json.loads(completion.message.text)["size"] in (1, 2)

        self._with_engine(check)
