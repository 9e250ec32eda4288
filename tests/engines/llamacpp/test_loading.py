"""Which file is meant, what cannot be loaded and why, and that nothing of it is printed."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest

from kani_nb import ChatMessage
from kani_nb.config import EngineConfig, parse_config
from kani_nb.engines.llamacpp import LlamaCppEngine
from kani_nb.engines.llamacpp.files import choose_files, parse_model, shard_names
from kani_nb.engines.llamacpp.library import library
from kani_nb.errors import (
    ConfigError,
    DoesNotFitError,
    KaniNbError,
    MissingDependencyError,
    ModelFilesError,
    ModelUnavailableError,
    UnknownModelError,
)
from tests.engines.llamacpp.tiny_gguf import write_gguf

pytestmark = pytest.mark.llamacpp

HELLO = [ChatMessage.user("hello")]


# -- describing --------------------------------------------------------------------------------------------------------


def test_the_constructor_only_describes():
    engine = LlamaCppEngine(model_path="nowhere/at/all.gguf")
    assert not engine.is_loaded
    assert "not loaded" in repr(engine)
    assert engine.details() == {"model": "nowhere/at/all.gguf", "loaded": False}
    assert repr(LlamaCppEngine("org/model", "*q4*.gguf")) == "LlamaCppEngine('org/model:*q4*.gguf', not loaded)"


@pytest.mark.parametrize(
    "named",
    [{}, {"repo_id": "a/b", "model_path": "c.gguf"}, {"filename": "c.gguf"}, {"model_path": "c", "filename": "d"}],
)
def test_either_a_repository_or_a_path_is_named(named):
    with pytest.raises(ConfigError, match="either repo_id"):
        LlamaCppEngine(**named)


@pytest.mark.parametrize("named", ["tiny.gguf", "./tiny.gguf", "sub/tiny.gguf"])
async def test_a_single_name_may_be_a_file(llama_gguf, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / named).parent.mkdir(exist_ok=True)
    (tmp_path / named).symlink_to(llama_gguf)
    engine = LlamaCppEngine(named)
    await engine.prepare()
    assert f"file {tmp_path}" in engine.origin
    await engine.close()
    assert repr(LlamaCppEngine("org/model:Q4_0")) == "LlamaCppEngine('org/model:Q4_0', not loaded)"
    assert repr(LlamaCppEngine("smollm2")) == "LlamaCppEngine('smollm2', not loaded)"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_load_kwargs": {"n_gpu_layer": 1}}, "did you mean n_gpu_layers"),
        ({"model_load_kwargs": {"draft_model": 1}}, "not a setting"),
        ({"max_context_size": -5}, "max_context_size"),
        ({"top_p": 3}, "top_p"),
        ({"temprature": 1}, "temperature"),
    ],
)
def test_what_it_cannot_follow_is_refused_at_once(options, said):
    with pytest.raises(ConfigError, match=said):
        LlamaCppEngine(model_path="x.gguf", **options)


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("x.gguf", {"path": "x.gguf"}),
        ("llamacpp:x.gguf", {"path": "x.gguf"}),
        ("folder/x.gguf", {"path": "folder/x.gguf"}),
        ("/a/b/x.gguf", {"path": "/a/b/x.gguf"}),
        ("llamacpp:smollm2", {"alias": "smollm2"}),
        ("org/model:x.gguf", {"repo": "org/model", "filename": "x.gguf"}),
        ("LlamaCpp:org/model:Q4_K_M", {"repo": "org/model", "filename": "Q4_K_M"}),
        ("llamacpp:org/model-GGUF", {"repo": "org/model-GGUF"}),
    ],
)
def test_a_line_names_a_file_an_alias_or_a_repository(text, fields):
    assert parse_model(text) == fields


def test_a_line_describes_an_engine():
    config = parse_config("llamacpp:x.gguf --max-context-size 128 --threads 1 --temperature 0.5 --cache-gib 0")
    engine = LlamaCppEngine.from_config(config)
    assert (engine.max_context_size, engine.generation.temperature) == (128, 0.5)
    with pytest.raises(ConfigError, match="no model"):
        LlamaCppEngine.from_config(EngineConfig("llamacpp:"))
    for option in ("--quant nf4", "--dtype float16", "--device-map auto", "--max-memory cpu=1GiB", "--allow-offload"):
        with pytest.raises(ConfigError, match=option.split()[0]):
            LlamaCppEngine.from_config(parse_config(f"x.gguf {option}"))


NAMES = ["a-Q4_K_M.gguf", "a-Q8_0-00001-of-00002.gguf", "a-Q8_0-00002-of-00002.gguf", "mmproj-a.gguf", "README.md"]


def test_of_a_repository_one_model_is_chosen():
    assert choose_files("o/r", NAMES, "a-Q4_K_M.gguf") == ["a-Q4_K_M.gguf"]
    assert choose_files("o/r", NAMES, "*q4*") == ["a-Q4_K_M.gguf"]
    assert choose_files("o/r", NAMES, "Q8_0") == NAMES[1:3]
    assert choose_files("o/r", NAMES, NAMES[2]) == NAMES[1:3]
    assert choose_files("o/r", NAMES, None) == ["a-Q4_K_M.gguf"]  # as llama.cpp itself does
    assert choose_files("o/r", NAMES[1:4], None) == NAMES[1:3]
    with pytest.raises(UnknownModelError, match="did you mean a-Q4_K_M"):
        choose_files("o/r", NAMES, "a-Q4_K_S.gguf")
    with pytest.raises(UnknownModelError, match="no GGUF file"):
        choose_files("o/r", ["model.safetensors"], None)
    with pytest.raises(ConfigError, match="3 models"):
        choose_files("o/r", NAMES, "*.gguf")
    assert shard_names("m.gguf") == ["m.gguf"]


# -- loading -----------------------------------------------------------------------------------------------------------


async def refusal(engine):
    with pytest.raises(KaniNbError) as raised:
        await engine.load()
    assert not engine.is_loaded
    await engine.close()
    return raised.value


async def test_an_unknown_architecture_is_named(tmp_path):
    error = await refusal(LlamaCppEngine(model_path=write_gguf(tmp_path / "x.gguf", architecture="nosuch")))
    assert isinstance(error, ModelFilesError)
    assert "unknown model architecture: 'nosuch'" in str(error)
    assert "pip install --upgrade llama-cpp-python" in str(error)


@pytest.mark.parametrize("share", [0.999, 0.5, 0.02, 0.0])
async def test_a_truncated_file_is_refused_before_llama_cpp_sees_it(llama_gguf, tmp_path, share):
    whole = llama_gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * share)])
    error = await refusal(LlamaCppEngine(model_path=tmp_path / "cut.gguf"))
    assert isinstance(error, ModelFilesError)
    assert "not a whole GGUF file" in str(error)
    assert "the file has" in str(error)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"blk.1.ffn_down.weight", b"blk.1.ffn_dawn.weight"),
        (b"llama.block_count", b"llama.block_caunt"),
        (b"tokenizer.ggml.model", b"tokenizer.ggml.madel"),
        (b"tokenizer.ggml.merges", b"tokenizer.ggml.marges"),
    ],
)
async def test_a_file_that_lacks_something_is_refused_in_llama_cpps_words(llama_gguf, tmp_path, old, new):
    (tmp_path / "bad.gguf").write_bytes(llama_gguf.read_bytes().replace(old, new))
    error = await refusal(LlamaCppEngine(model_path=tmp_path / "bad.gguf"))
    assert isinstance(error, ModelFilesError)
    assert "llama.cpp cannot load bad.gguf: " in str(error)
    assert "does not say why" not in str(error)


async def test_a_model_in_shards_is_loaded_by_any_of_them(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", tensors_per_file=8)
    assert not path.exists()
    shards = sorted(tmp_path.glob("*.gguf"))
    assert len(shards) > 2
    engine = LlamaCppEngine(model_path=shards[1], threads=1)
    assert (await engine.predict(HELLO, max_new_tokens=3)).completion_tokens == 3
    assert engine.memory().weight_bytes == engine.details()["parameters"] * 4
    await engine.close()
    shards[2].unlink()
    error = await refusal(LlamaCppEngine(model_path=shards[0]))
    assert isinstance(error, ModelFilesError)
    assert shards[2].name in str(error)


async def test_a_file_that_is_not_there_is_looked_for(tmp_path, llama_gguf):
    (tmp_path / "model.gguf").write_bytes(b"")
    error = await refusal(LlamaCppEngine(model_path=tmp_path / "modle.gguf"))
    assert isinstance(error, UnknownModelError)
    assert "did you mean model.gguf" in str(error)
    assert "name a file in it: model.gguf" in str(await refusal(LlamaCppEngine(model_path=tmp_path)))
    assert "no GGUF" in str(await refusal(LlamaCppEngine.from_config(EngineConfig("llamacpp:qwen3-8b"))))


async def test_a_longer_context_than_the_model_has_is_refused_unless_stretched(llama_gguf):
    error = await refusal(LlamaCppEngine(model_path=llama_gguf, max_context_size=1000))
    assert "made for 512" in str(error)
    stretched = {"rope_freq_scale": 0.5, "n_ctx": 1000}
    engine = LlamaCppEngine(model_path=llama_gguf, model_load_kwargs=stretched, threads=1)
    await engine.load()
    assert engine.max_context_size == 1000
    await engine.close()


async def test_a_context_that_cannot_fit_is_refused_with_the_one_that_can(tmp_path):
    path = write_gguf(tmp_path / "long.gguf", context=2**31 - 1)
    error = await refusal(LlamaCppEngine(model_path=path))
    assert isinstance(error, DoesNotFitError)
    fits = int(str(error).rpartition("--max-context-size ")[2])
    assert 256 <= fits < 2**31
    engine = LlamaCppEngine(model_path=path, max_context_size=512, threads=1)
    await engine.load()
    await engine.close()


async def test_loading_can_be_cancelled(llama_gguf):
    engine = LlamaCppEngine(model_path=llama_gguf, threads=1)
    seen = []

    def stop_at_weights(progress):
        seen.append(progress.stage)
        if progress.stage == "weights":
            loop.call_soon_threadsafe(loading.cancel)

    loop = asyncio.get_running_loop()
    loading = asyncio.ensure_future(engine.load(stop_at_weights))
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert "weights" in seen
    assert not engine.is_loaded
    assert (await engine.predict(HELLO, max_new_tokens=2)).completion_tokens == 2
    await engine.close()


def test_an_interrupted_load_says_so(llama_gguf):
    engine = LlamaCppEngine(model_path=llama_gguf, threads=1)
    cancelled = threading.Event()

    def stop(progress):
        cancelled.set()

    with pytest.raises(ModelUnavailableError, match="interrupted"):
        engine._load_weights(stop, cancelled)


def test_a_missing_package_is_named_with_the_line_that_installs_it(monkeypatch, llama_gguf):
    library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    engine = LlamaCppEngine(model_path=llama_gguf)
    with pytest.raises(MissingDependencyError, match="pip install llama-cpp-python"):
        asyncio.run(engine.load())


async def test_nothing_is_printed(llama_gguf, tmp_path, capfd):
    engine = LlamaCppEngine(model_path=llama_gguf, threads=1)
    await engine.predict(HELLO, max_new_tokens=3)
    await engine.close()
    await refusal(LlamaCppEngine(model_path=write_gguf(tmp_path / "x.gguf", architecture="nosuch")))
    abandoned = LlamaCppEngine(model_path=llama_gguf, threads=1)
    await abandoned.load()
    del abandoned  # freed by whoever collects it
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
