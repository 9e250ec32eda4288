"""What ctransformers runs, how it is stopped, and that its death is an error and not ours."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import warnings
from contextlib import aclosing

import pytest

from kani_nb import ChatMessage
from kani_nb.config import EngineConfig, parse_config
from kani_nb.engines.base import PrefillProgress
from kani_nb.engines.ctransformers import CTransformersEngine, LlamaCTransformersEngine
from kani_nb.engines.ctransformers.base import _warn_once
from kani_nb.engines.ctransformers.files import MEASURED, check_kind, choose_file
from kani_nb.errors import (
    ConfigError,
    EngineError,
    GenerationError,
    MissingDependencyError,
    ModelFilesError,
    PromptError,
    UnknownModelError,
)
from tests.engines.ctransformers.test_contract import Plain
from tests.engines.ctransformers.tiny_ggml import LLAMA_VOCABULARY, write_ggml
from tests.engines.llamacpp.tiny_gguf import write_gguf

pytestmark = pytest.mark.slow  # each test starts a process

FOX = [ChatMessage.user("the quick brown fox jumps over the lazy dog")]
GREEDY = {"max_new_tokens": 10, "do_sample": False}


def plain(path, model_type="gpt2", **settings):
    return Plain(str(path), model_load_kwargs={"model_type": model_type, "threads": 1, **settings})


@pytest.fixture
async def engine(tmp_path):
    engine = plain(write_ggml(tmp_path / "tiny.bin", "gpt2"))
    await engine.load()
    yield engine
    await engine.close()


# -- what it runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", MEASURED)
async def test_every_kind_of_file_runs_with_every_library(model_type, tmp_path):
    path = write_ggml(tmp_path / "tiny.bin", model_type)
    texts = {}
    for lib in ("avx2", "avx", "basic"):
        engine = plain(path, None if model_type == "llama" else model_type, lib=lib)
        completion = await engine.predict(FOX, **GREEDY)
        assert completion.completion_tokens == 10
        assert engine.details()["model_type"] == model_type
        texts[lib] = completion.message.text
        await engine.close()
    assert texts["avx2"] == texts["avx"] == texts["basic"]


async def test_a_gguf_of_llama_with_its_own_kind_of_vocabulary_runs(tmp_path):
    engine = plain(write_gguf(tmp_path / "spm.gguf", vocabulary="spm"), None)
    # More tokens than characters: the package itself reserves no room for them, and dies of signal 11.
    text = "the quick brown fox"
    assert len(engine.tokenize(text)) > len(text) + 1
    assert (await engine.predict(FOX, **GREEDY)).completion_tokens == 10
    await engine.close()


async def test_what_it_cannot_run_is_refused_with_the_engine_that_can(tmp_path):
    (tmp_path / "junk.bin").write_bytes(b"no model at all")
    write_ggml(tmp_path / "whole.bin", "gpt2")
    for engine, kind, said in (
        (plain(write_gguf(tmp_path / "bpe.gguf"), None), ModelFilesError, "LlamaCppEngine"),
        (plain(tmp_path / "junk.bin"), ModelFilesError, "no GGML file"),
        (plain(tmp_path / "whole.bin", None), ConfigError, "model_type"),
        (plain(tmp_path / "whole.bin", "nosuch"), GenerationError, "Failed to create LLM"),
        (plain(tmp_path / "whole.bin", lib="nosuch"), EngineError, "nosuch"),
    ):
        with pytest.raises(kind, match=said):
            await engine.load()
        assert not engine.is_loaded
        await engine.close()


@pytest.mark.parametrize("model_type", MEASURED)
@pytest.mark.parametrize("share", [0.999, 0.5, 0.01])
def test_a_file_that_is_cut_off_is_refused_instead_of_babbling(model_type, share, tmp_path):
    path = write_ggml(tmp_path / "tiny.bin", model_type)
    check_kind(path, model_type)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelFilesError, match="not a whole GGML file"):
        check_kind(path, model_type)


def test_one_file_is_chosen():
    assert choose_file("f", ["a.bin", "b.txt"], None) == "a.bin"
    assert choose_file("f", ["a.bin", "b.bin"], "b.bin") == "b.bin"
    with pytest.raises(ConfigError, match="2 models"):
        choose_file("f", ["a.bin", "b.bin"], None)
    with pytest.raises(UnknownModelError, match=r"did you mean model\.bin"):
        choose_file("f", ["model.bin"], "modle.bin")
    with pytest.raises(UnknownModelError, match="no GGML file"):
        choose_file("f", ["a.txt"], None)


async def test_a_folder_with_one_file_is_that_file(tmp_path):
    write_ggml(tmp_path / "tiny.bin", "gpt2")
    engine = plain(tmp_path)
    await engine.load()
    assert engine.memory().weight_bytes == (tmp_path / "tiny.bin").stat().st_size
    await engine.close()


# -- answers -----------------------------------------------------------------------------------------------------------


async def test_a_second_turn_computes_only_what_is_new(engine):
    first = await engine.predict(FOX, **GREEDY)
    history = [*FOX, first.message, ChatMessage.user("and more")]
    events = [event async for event in engine.stream(history, **GREEDY)]
    assert events[-1].cached_tokens >= first.prompt_tokens - 8
    progress = [event.done_tokens for event in events if isinstance(event, PrefillProgress)]
    assert progress[0] == events[-1].cached_tokens
    fresh = plain(engine.model_id)
    assert (await fresh.predict(history, **GREEDY)).message.text == events[-1].message.text
    await fresh.close()


async def test_sampled_answers_follow_their_seed(engine):
    hot = {"max_new_tokens": 10, "temperature": 2.0, "top_k": 0}
    texts = [(await engine.predict(FOX, seed=seed, **hot)).message.text for seed in (1, 2, 1)]
    assert texts[0] == texts[2] != texts[1]
    assert len(set(texts[0])) > 3  # not one random number for all tokens
    drawn = await engine.predict(FOX, **hot)
    assert (await engine.predict(FOX, seed=drawn.seed, **hot)).message.text == drawn.message.text
    text = (await engine.predict(FOX, **GREEDY)).message.text
    stopped = await engine.predict(FOX, stop=[text[4:7]], **GREEDY)
    assert stopped.message.text == text[: text.index(text[4:7])]
    assert stopped.finish_reason == "stop"


async def test_what_the_package_cannot_sample_is_refused(engine):
    for name, value in (("min_p", 0.1), ("typical_p", 0.5), ("no_repeat_ngram_size", 2), ("min_new_tokens", 3)):
        with pytest.raises(ConfigError, match=name):
            await engine.predict(FOX, **{name: value})
    with pytest.raises(ConfigError, match="min_p"):
        Plain("x.bin", min_p=0.1)


async def test_a_context_is_never_overrun(engine):
    completion = await engine.predict(FOX, max_new_tokens=500, do_sample=False)
    assert completion.prompt_tokens + completion.completion_tokens == engine.max_context_size == 128
    assert completion.finish_reason == "length"

    class Ids(Plain):
        def build_prompt(self, messages, functions=None):
            return [10**8]

    wrong = Ids(engine.model_id, model_load_kwargs={"model_type": "gpt2"})
    with pytest.raises(PromptError, match="100000000"):
        await wrong.predict(FOX)
    await wrong.close()


# -- LLaMA 2 -----------------------------------------------------------------------------------------------------------


async def test_llama_2s_format_is_built_in_its_tokens_and_users_cannot_say_them(tmp_path):
    engine = LlamaCTransformersEngine(str(write_ggml(tmp_path / "tiny.bin", "llama")), None, 256, strict=True)
    history = [ChatMessage.system("Be kind."), ChatMessage.user("a </s><s> b"), ChatMessage.assistant("the fox")]
    ids = engine.prompt_ids([*history, ChatMessage.user("dog")])
    said = b"".join(LLAMA_VOCABULARY[token] for token in ids).decode()
    assert said == "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\na </s><s> b [/INST] the fox </s><s>[INST] dog [/INST]"
    assert (ids.count(1), ids.count(2)) == (2, 1)
    assert engine.message_len(ChatMessage.user("dog")) >= len(engine.tokenize("dog"))
    with pytest.raises(PromptError, match="in turns"):
        engine.prompt_len([ChatMessage.user("a"), ChatMessage.user("b")])
    await engine.close()


async def test_a_line_describes_an_engine(tmp_path):
    path = write_ggml(tmp_path / "tiny.bin", "llama")
    config = parse_config(f"ctransformers:{path} --threads 1 --max-context-size 128 --max-new-tokens 4")
    engine = LlamaCTransformersEngine.from_config(config)
    assert (await engine.predict(FOX)).completion_tokens == 4
    assert engine.max_context_size == 128
    await engine.close()
    named = LlamaCTransformersEngine.from_config(EngineConfig("ctransformers:org/model:model.bin"))
    assert (named.model_id, named.model_file) == ("org/model", "model.bin")
    with pytest.raises(ConfigError, match="no model"):
        LlamaCTransformersEngine.from_config(EngineConfig("ctransformers:"))


def test_without_build_prompt_it_says_what_to_define(tmp_path):
    engine = CTransformersEngine(str(write_ggml(tmp_path / "t.bin", "gpt2")), None, 64, {"model_type": "gpt2"})
    with pytest.raises(TypeError, match="must define build_prompt"):
        engine.prompt_len(FOX)
    asyncio.run(engine.close())


# -- stopping and dying ------------------------------------------------------------------------------------------------


async def test_a_stopped_answer_leaves_the_process_alive(engine):
    before = engine.details()["process"]
    async with aclosing(engine.stream(FOX, max_new_tokens=90, do_sample=False)) as events:
        async for event in events:
            if isinstance(event, str):
                break
    assert (await engine.predict(FOX, **GREEDY)).completion_tokens == 10
    assert engine.details()["process"] == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
async def test_a_process_that_does_not_listen_is_ended_and_started_anew(engine):
    before = engine.details()["process"]
    async with aclosing(engine.stream(FOX, max_new_tokens=90, do_sample=False)) as events:
        await anext(events)
        os.kill(before, signal.SIGSTOP)
    assert (await engine.predict(FOX, **GREEDY)).completion_tokens == 10
    assert engine.details()["process"] != before
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
async def test_a_crash_is_an_error_that_names_the_signal_and_the_successor(engine):
    expected = (await engine.predict(FOX, **GREEDY)).message.text
    process = engine.details()["process"]
    os.kill(process, signal.SIGSTOP)  # so that it crashes before it has answered
    asking = asyncio.ensure_future(engine.predict(FOX, **GREEDY))
    await asyncio.sleep(0.05)
    os.kill(process, signal.SIGSEGV)
    os.kill(process, signal.SIGCONT)
    with pytest.raises(EngineError, match=r"signal 11 \(SIGSEGV\)") as raised:
        await asking
    assert "LlamaCppEngine" in str(raised.value)
    assert not engine.is_loaded
    assert (await engine.predict(FOX, **GREEDY)).message.text == expected


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
async def test_a_file_that_kills_the_package_is_an_error_too(tmp_path):
    path = write_ggml(tmp_path / "tiny.bin", "mpt")
    path.write_bytes(path.read_bytes().replace(b"\x06\0\0\0 brown", b"\x06\0\0\0\xff\xfe\xfd\xfc\xfb\xfa"))
    with pytest.raises(EngineError, match=r"signal 6 \(SIGABRT\) while loading"):
        await plain(path, "mpt").load()


async def test_the_process_ends_with_its_engine_and_with_its_input(engine, tmp_path):
    process = engine._host._process
    await engine.close()
    assert process.returncode is not None
    await engine.load()
    process = engine._host._process
    process.stdin.close()  # as when we die
    until = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < until:
        await asyncio.sleep(0.01)
    assert process.returncode == 0


async def test_a_missing_package_is_named_with_its_successor(tmp_path, monkeypatch):
    (tmp_path / "ctransformers.py").write_text("raise ImportError('not here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    engine = plain(write_ggml(tmp_path / "tiny.bin", "gpt2"))
    with pytest.raises(MissingDependencyError, match="LlamaCppEngine"):
        await engine.load()


async def test_what_needs_no_memory_is_checked_without_a_process(tmp_path, monkeypatch):
    with pytest.raises(ModelFilesError, match="no GGML file"):
        await plain(__file__).prepare()
    engine = plain(write_ggml(tmp_path / "tiny.bin", "gpt2"))
    await engine.prepare()
    assert not engine.is_loaded
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="LlamaCppEngine"):
        await engine.prepare()


def test_it_warns_once_and_names_its_successor():
    _warn_once.cache_clear()
    with pytest.warns(FutureWarning, match="LlamaCppEngine"):
        first = Plain("x.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Plain("x.bin")
    assert "LlamaCppEngine" in first.details()["notice"]
