"""Loading and closing: twice, at once, cancelled, from two loops, and from files that lack something."""

import asyncio
import threading

import pytest

from kani_nb import ChatMessage
from kani_nb.engines.base import FinishReason
from kani_nb.errors import GenerationError, ModelFilesError
from kani_nb.hardware.prompt_chunks import chunk_size
from tests.conftest import make_model
from tests.engines.asking import answer, engine_of


async def test_load_and_close_are_safe_to_call_twice_and_the_first_use_loads(tiny_model):
    engine = engine_of(tiny_model)
    assert not engine.is_loaded
    assert engine.max_context_size == 512
    assert (await answer(engine, [ChatMessage.user("Hello")])).completion_tokens
    await asyncio.gather(engine.load(), engine.load())
    assert engine.is_loaded
    tensors = {*engine.model.parameters(), *engine.model.buffers()}
    assert engine.memory().weight_bytes == sum({each.data_ptr(): each.nbytes for each in tensors}.values())
    await engine.close()
    await engine.close()
    assert engine.model is None
    assert engine.memory() is None


async def test_a_load_that_was_cancelled_does_not_spoil_the_next_one(tiny_model):
    import transformers

    untouched = transformers.PreTrainedModel.tie_weights
    expected = None
    for number in range(6):
        abandoned = engine_of(tiny_model)
        task = asyncio.create_task(abandoned.load())
        await asyncio.sleep(0.01 * number)
        task.cancel()
        fresh = engine_of(tiny_model)
        text = (await answer(fresh, [ChatMessage.user("the quick brown fox")])).message.text
        expected = expected or text
        assert text == expected
        await asyncio.gather(task, return_exceptions=True)
        await fresh.close()
    assert transformers.PreTrainedModel.tie_weights is untouched


async def test_missing_weights_are_refused_and_named(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_model(tmp_path)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFilesError, match=r"(?s)weights of .* are missing .*model\.layers\.1\."):
        await engine_of(folder).load()


async def test_closing_ends_the_present_answer_and_fails_those_that_wait(tiny_model):
    engine = engine_of(tiny_model)
    await engine.load()
    prompt = [ChatMessage.user("the quick brown fox")]
    running = [asyncio.create_task(answer(engine, prompt, max_new_tokens=400)) for _ in range(3)]
    while engine.slot.queue_length < 2:
        await asyncio.sleep(0)
    await engine.close()
    results = await asyncio.gather(*running, return_exceptions=True)
    assert any(isinstance(each, GenerationError) for each in results)
    assert not any(getattr(each, "finish_reason", None) is FinishReason.LENGTH for each in results)


def test_two_loops_can_load_one_engine_at_once(tiny_model):
    engine, errors = engine_of(tiny_model), []

    def use():
        try:
            asyncio.run(engine.load())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert not errors
    assert engine.is_loaded


def test_the_pieces_of_a_prompt_depend_on_the_model_and_the_kind_of_device_only():
    sizes = {
        (name, is_gpu, is_half): chunk_size(parameters, is_gpu=is_gpu, is_half=is_half)
        for name, parameters in {"135M": 135e6, "1B": 1e9, "7B": 7e9}.items()
        for is_gpu in (False, True)
        for is_half in (False, True)
    }
    assert sizes["135M", False, True] == 128
    assert sizes["135M", False, False] == 64
    assert sizes["7B", False, True] == 8
    assert sizes["7B", True, True] == 256
    assert all(size & (size - 1) == 0 for size in sizes.values())
