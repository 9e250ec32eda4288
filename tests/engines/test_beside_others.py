"""What one engine does for long holds up nobody else, and what nobody waits for any more is dropped."""

from __future__ import annotations

import asyncio
import threading
import time

import filelock
import pytest

from kani_nb import ChatMessage, HuggingEngine
from kani_nb.engines.huggingface import loading, saving
from kani_nb.engines.huggingface.placing import choose_placing
from kani_nb.engines.huggingface.saving import ReadyPush
from kani_nb.engines.quantized_copies import copies_folder, copy_key
from kani_nb.errors import ModelUnavailableError
from kani_nb.hardware.shape_reading import shape_of
from tests.engines.asking import answer, engine_of


async def until(claim, seconds=10.0):
    ends = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < ends
        await asyncio.sleep(0.02)


async def test_waiting_for_a_copy_that_another_process_makes_keeps_no_one_from_loading(
    tiny_model, tmp_path, monkeypatch
):
    monkeypatch.setenv("KANI_NB_CACHE", str(tmp_path))
    told = []
    waiting = engine_of(tiny_model, dtype="bfloat16", quantization="cpu-int8", cache_quantized=True)
    request, config = waiting._prepared.request(), waiting._prepared.config()
    placing = choose_placing(request, config)
    key = copy_key(request.folder, placing.quantization, placing.dtype, name=request.name, device=placing.device)
    copies_folder().mkdir(parents=True)
    with filelock.FileLock(key.folder.with_name(f"{key.folder.name}.lock"), thread_local=False):
        load = asyncio.create_task(waiting.load(told.append))
        await until(lambda: any("another process" in each.detail for each in told))
        beside = engine_of(tiny_model)
        await asyncio.wait_for(beside.load(), 20)
        assert (await asyncio.to_thread(shape_of, config)).parameters > 0
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        # The thread that waited ends too, so that the engine can load again.
        await until(lambda: not any(each.name == "kani-nb-load" for each in threading.enumerate()))
    await waiting.load()
    assert "a quantized copy is kept in" in waiting.details()["notes"]
    for engine in (waiting, beside):
        await engine.close()


async def test_closing_while_it_loads_leaves_nothing_loaded(tiny_model, monkeypatch):
    engine, go_on, began = engine_of(tiny_model), threading.Event(), threading.Event()
    load_model = loading.load_model

    def slowly(*args, **options):
        began.set()
        go_on.wait(10)
        return load_model(*args, **options)

    monkeypatch.setattr(loading, "load_model", slowly)
    load = asyncio.create_task(engine.load())
    await until(began.is_set)
    await engine.close()
    go_on.set()
    with pytest.raises(ModelUnavailableError, match="was closed while it was loaded"):
        await load
    assert not engine.is_loaded
    assert engine.memory() is None
    await engine.load()
    assert engine.is_loaded
    await engine.close()


async def test_an_upload_holds_up_neither_answers_nor_closing(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("KANI_NB_CACHE", str(tmp_path))
    began, go_on = threading.Event(), threading.Event()

    def upload(folder, repo_id, access, **_):
        assert (folder / "model.safetensors").is_file()
        began.set()
        assert go_on.wait(20)
        return "https://hub/ada/first"

    monkeypatch.setattr(saving, "require_push", lambda repo_id, token: None)
    monkeypatch.setattr(saving, "push_folder", upload)
    engine = engine_of(tiny_model)
    push = asyncio.create_task(engine.push_to_hub("ada/first"))
    await until(began.is_set)
    assert (await asyncio.wait_for(answer(engine, [ChatMessage.user("hi")]), 10)).message.text is not None
    await asyncio.wait_for(engine.close(), 5)
    go_on.set()
    assert await push == "https://hub/ada/first"
    assert not list((tmp_path / "pushes").iterdir())


async def test_what_was_written_for_a_push_that_was_given_up_is_removed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("KANI_NB_CACHE", str(tmp_path))
    began, go_on, discarded = threading.Event(), threading.Event(), threading.Event()
    prepare, discard = saving.prepare_push, ReadyPush.discard

    def slowly(*args, **options):
        began.set()
        assert go_on.wait(20)
        return prepare(*args, **options)

    def discarding(ready):
        discard(ready)
        discarded.set()

    monkeypatch.setattr(saving, "require_push", lambda repo_id, token: None)
    monkeypatch.setattr(saving, "prepare_push", slowly)
    monkeypatch.setattr(ReadyPush, "discard", discarding)
    engine = engine_of(tiny_model)
    await engine.load()
    push = asyncio.create_task(engine.push_to_hub("ada/first"))
    await until(began.is_set)
    push.cancel()
    with pytest.raises(asyncio.CancelledError):
        await push
    go_on.set()
    await until(discarded.is_set)
    assert not list((tmp_path / "pushes").iterdir())
    await engine.close()


async def test_the_files_that_are_saved_are_those_that_were_loaded(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("KANI_NB_CACHE", str(tmp_path))
    engine = HuggingEngine(str(tiny_model), threads=1, quantization="cpu-int8", cache_quantized=True)
    await engine.load()
    assert engine._origin_of(engine._loaded)["source"].parent == copies_folder()
    await engine.close()
