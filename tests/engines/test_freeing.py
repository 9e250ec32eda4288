"""Closing frees: after an answer, and after a load that failed or was cancelled."""

import asyncio
import weakref

import pytest
import torch

from kani_nb import ChatMessage
from kani_nb.engines.huggingface import loading
from kani_nb.errors import ModelFilesError
from kani_nb.hardware.remains import Remains
from tests.engines.asking import answer, engine_of
from tests.memory import MIB, SLACK_BYTES, has_mapped_weights, held_bytes

pytestmark = [pytest.mark.memory, pytest.mark.usefixtures("exact_allocator")]

PROMPT = [ChatMessage.user("the quick brown fox")]


@pytest.mark.parametrize("scheme", [None, "int8", "nf4"])
async def test_closing_frees_every_weight_and_the_memory(wide_model, baseline, scheme):
    engine = engine_of(wide_model, quantization=scheme)
    await answer(engine, PROMPT, max_new_tokens=4)
    remains = Remains(engine.model)
    assert remains.held_bytes > 8 * MIB
    assert has_mapped_weights(), "else its absence at the end would say nothing"
    parts = [weakref.ref(each) for each in (*engine.model.modules(), *engine.model.parameters())]
    await engine.close()
    assert remains.is_gone
    assert not any(part() is not None for part in parts)
    assert held_bytes() - baseline < SLACK_BYTES
    assert not has_mapped_weights()


async def test_a_load_that_fails_at_its_end_frees_what_it_had_loaded(wide_model, baseline, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in wide_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.7.mlp.down_proj.weight"
    save_file(weights | {name: weights[name][:3].clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    del weights
    engine = engine_of(tmp_path)
    for _ in range(2):
        with pytest.raises(ModelFilesError) as caught:
            await engine.load()
        assert held_bytes() - baseline < SLACK_BYTES, "while the error is still held"
    assert str(caught.value)


async def test_a_load_that_was_cancelled_frees_what_still_arrives(wide_model, baseline, monkeypatch):
    """Cancelled at the latest moment: when the weights are there, and before they are handed over."""
    arrived, may_go_on = asyncio.Event(), asyncio.Event()
    loop, models = asyncio.get_running_loop(), []
    really = loading.load_model

    def load_and_wait(*arguments, **options):
        loaded = really(*arguments, **options)
        models.append(Remains(loaded.model))
        loop.call_soon_threadsafe(arrived.set)
        asyncio.run_coroutine_threadsafe(may_go_on.wait(), loop).result(30)
        return loaded

    monkeypatch.setattr(loading, "load_model", load_and_wait)
    engine = engine_of(wide_model)
    task = asyncio.create_task(engine.load())
    await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    may_go_on.set()
    while not engine.slot.queue_length and engine.slot.is_taken:
        await asyncio.sleep(0.01)  # until the thread that loads has ended
    assert not engine.is_loaded
    assert models[0].is_gone
    assert held_bytes() - baseline < SLACK_BYTES
    assert not has_mapped_weights()


async def test_weights_that_somebody_keeps_are_known_by_their_bytes(wide_model, baseline):
    engine = engine_of(wide_model)
    await engine.load()
    remains = Remains(engine.model)
    kept = engine.model.model.layers[0].mlp.down_proj.weight.detach()[1:]
    await engine.close()
    assert remains.object is None
    assert remains.held_bytes == kept.untyped_storage().nbytes()
    assert remains.is_part(kept)
    assert not remains.is_part(torch.ones(3))
    del kept
    assert remains.is_gone
