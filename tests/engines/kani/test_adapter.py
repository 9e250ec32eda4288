"""Engines of the real kani package run as ours: the contract, how they are left, and how they are found."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import sys
import threading
from contextlib import aclosing
from typing import ClassVar

import pytest

from kani_nb import ChatMessage, EngineConfig
from kani_nb._runtime import Runtime
from kani_nb.engines.base import prompt_len
from kani_nb.engines.kani_adapter import KaniEngine
from kani_nb.engines.kani_adapter.params import Asked, family_of
from kani_nb.errors import ConfigError, EngineError, GenerationError, MissingDependencyError, UnknownModelError
from kani_nb.testing import EngineContract

kani = pytest.importorskip("kani", reason="these are engines of the kani package: pip install 'kani>=1.10'")
from kani.engines.base import WrapperEngine  # noqa: E402 - after the check that it is there

from tests.engines.kani.kani_engines import HELLO, Predicting, Repeating, Saying, answer  # noqa: E402 - it imports kani

# -- the contract -----------------------------------------------------------------------------------------------------


class TestAnEngineThatBlocksItsLoop(EngineContract):
    params: ClassVar = {"max_new_tokens": 12}
    pause_s = 0.5

    def make_engine(self):
        return KaniEngine(lambda: Repeating(pause_s=0.003))


class TestAnEngineThatIsThereAlready(EngineContract):
    params: ClassVar = {"max_new_tokens": 12}

    def make_engine(self):
        return KaniEngine(Repeating())


class TestAnEngineThatOnlyPredicts(EngineContract):
    params: ClassVar = {"max_new_tokens": 12}
    pause_s = 0.5

    def make_engine(self):
        return KaniEngine(lambda: WrapperEngine(Predicting(pause_s=0.02)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # kani's: of the folder's name, of torch_dtype
class TestKanisOwnHuggingEngine(EngineContract):
    @pytest.fixture(autouse=True)
    def folder(self, tiny_model):
        self.tiny_model = tiny_model

    def make_engine(self):
        return KaniEngine.from_config(EngineConfig(f"kani:huggingface:{self.tiny_model}"))


# -- leaving ----------------------------------------------------------------------------------------------------------


async def test_leaving_an_engine_that_blocks_returns_at_once_and_the_next_call_waits_for_it():
    gate = threading.Event()
    engine = KaniEngine(Repeating(gate=gate))
    blocked = asyncio.ensure_future(answer(engine))
    while not engine.engine.seen:
        await asyncio.sleep(0.001)
    blocked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await blocked  # the gate is still shut
    following = asyncio.ensure_future(answer(engine, [ChatMessage.user("next")]))
    done, _ = await asyncio.wait([following], timeout=0.05)
    assert not done
    assert engine.slot.is_taken, "the engine is still in its call"
    gate.set()
    assert (await following)[0] == ["next"]
    await engine.close()
    assert not engine.slot.is_taken


async def test_leaving_an_engine_that_waits_cancels_its_call():
    ended = threading.Event()

    class Waiting(Saying):
        async def stream(self, messages, functions=None, **hyperparams):
            yield "Hi"
            try:
                await asyncio.sleep(3600)
            finally:
                ended.set()

    engine = KaniEngine(Waiting())
    async with aclosing(engine.stream(HELLO)) as events:
        async for event in events:
            if event == "Hi":
                break
    assert await asyncio.to_thread(ended.wait, 10)
    await engine.close()


async def test_closing_tells_whoever_still_reads_or_waits():
    class Waiting(Saying):
        async def stream(self, messages, functions=None, **hyperparams):
            yield "Hi"
            await asyncio.sleep(3600)

    engine = KaniEngine(Waiting())
    reading = asyncio.ensure_future(answer(engine))
    queued = asyncio.ensure_future(answer(engine))
    while not engine.slot.queue_length:
        await asyncio.sleep(0.001)
    await engine.close()
    for each in (reading, queued):
        with pytest.raises(GenerationError, match="was closed meanwhile"):
            await each


async def test_one_loop_serves_all_calls_until_it_is_closed():
    # Clients of providers keep connections that belong to the loop which made them.
    loops = []

    class Remembering(Saying):
        async def stream(self, messages, functions=None, **hyperparams):
            loops.append(asyncio.get_running_loop())
            yield "ok"

        async def close(self):
            loops.append(asyncio.get_running_loop())

    engine = KaniEngine(Remembering())
    await answer(engine)
    await answer(engine)
    await engine.close()
    assert loops[0] is loops[1] is loops[2] is not asyncio.get_running_loop()
    assert loops[0].is_closed()


async def test_an_engine_that_nobody_closes_takes_its_loop_with_it():
    engine = KaniEngine(Saying("ok"))
    await answer(engine)
    loop = engine._loop
    del engine
    gc.collect()
    assert loop.is_closed()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
async def test_kanis_hugging_engine_is_stopped_within_its_generation(tiny_model):
    engine = KaniEngine.from_config(EngineConfig(f"kani:hf:{tiny_model}"))
    await engine.load()
    steps = []
    engine.engine.model.register_forward_hook(lambda *args: steps.append(1))
    async with aclosing(engine.stream(HELLO, max_new_tokens=400, do_sample=False)) as events:
        async for event in events:
            if isinstance(event, str):
                break
    await prompt_len(engine, HELLO)  # its turn comes when the generation has ended
    assert len(steps) < 400
    assert not [each for each in threading.enumerate() if "thread_target" in each.name]
    await engine.close()


# -- names ------------------------------------------------------------------------------------------------------------


class Named(Repeating):
    """Found by its class, and made with the model's name."""

    def __init__(self, model="none"):
        super().__init__()
        self.model = model


@pytest.mark.parametrize("prefix", ["", "kani:"])
async def test_an_engine_is_found_by_its_class(prefix):
    config = EngineConfig(f"{prefix}{__name__}:Named:a:model", max_context_size=50)
    engine = KaniEngine.from_config(config)
    assert not engine.is_loaded
    await engine.load()
    assert (engine.engine.model, engine.max_context_size) == ("a:model", 50)
    assert repr(engine) == f"KaniEngine(kani:{__name__}:Named:a:model, max_context_size=50)"
    await engine.close()
    assert not engine.is_loaded


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("antropic:claude", ConfigError, "did you mean anthropic"),
        ("anthropic", ConfigError, "names no model"),
        ("", ConfigError, "names no provider"),
        (f"{__name__}:Nothing:x", ConfigError, "no engine of kani called 'Nothing'"),
        (f"{__name__}:ChatMessage:x", ConfigError, "no engine of kani called 'ChatMessage'"),
        ("no_such.module:Class:x", MissingDependencyError, "no_such"),
        ("huggingface:smollm2", ConfigError, r"alias of kani_nb(.|\n)*%load_engine smollm2"),
        ("hf:./no/such/folder", UnknownModelError, "there is no folder ./no/such/folder"),
        ("hf:~/no-such-folder", UnknownModelError, "there is no folder"),
        (f"hf:{__file__}", UnknownModelError, "it is a file"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(model, error, words):
    with pytest.raises(error, match=words):
        KaniEngine.from_config(EngineConfig(f"kani:{model}"))


def test_options_that_kani_has_not_are_refused():
    with pytest.raises(ConfigError, match="do not take dtype, threads"):
        KaniEngine.from_config(EngineConfig("kani:openai:gpt-4.1", threads=2, dtype="float32"))


async def test_a_provider_whose_package_is_not_installed_is_told_with_the_line_that_installs_it():
    if importlib.util.find_spec("anthropic") is not None:
        pytest.skip("the package is installed here")
    engine = KaniEngine.from_config(EngineConfig("kani:anthropic:claude-sonnet-4-0"))
    for ask in (engine.prepare, engine.load):
        with pytest.raises(MissingDependencyError, match=r"pip install 'kani\[anthropic\]'"):
            await ask()
    await engine.close()
    other = KaniEngine.from_config(EngineConfig("kani:claude:claude-sonnet-4-0"))
    with pytest.raises(MissingDependencyError, match=r"pip install 'kani\[anthropic\]'"):
        await other.prepare()
    await other.close()


def test_nothing_is_freed_for_a_provider_that_cannot_be_had(tmp_path):
    if importlib.util.find_spec("anthropic") is not None:
        pytest.skip("the package is installed here")
    rt = Runtime(tmp_path / "c.db")
    first = rt.load_sync(EngineConfig("echo"))
    with pytest.raises(MissingDependencyError) as caught:
        rt.load_sync(EngineConfig("kani:anthropic:claude-sonnet-4-0"))
    assert "freed" not in str(caught.value)
    assert rt.engine is first.engine
    rt.close()


class Keyless(Repeating):
    """Of a service, and cannot be made."""

    def __init__(self, model):
        raise ValueError("no key")


async def test_an_engine_of_a_service_is_made_before_anything_is_freed_and_another_is_not(monkeypatch):
    monkeypatch.setattr(Keyless, "__module__", "kani.engines.openai.engine")
    service = KaniEngine.from_config(EngineConfig(f"kani:{__name__}:Keyless:x"))
    with pytest.raises(EngineError, match="no key"):
        await service.prepare()
    await service.close()
    local = KaniEngine.from_config(EngineConfig(f"kani:{__name__}:Named:x"))
    await local.prepare()
    assert not local.is_loaded
    await local.close()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"logprobs": 3}, r"HuggingEngine has no logprobs(.|\n)*%load_engine MODEL"),
        ({"json_schema": '{"type": "object"}'}, r"HuggingEngine has no json_schema(.|\n)*llamacpp"),
    ],
)
def test_what_only_our_engines_can_is_never_passed_to_kanis_hugging_engine(given, words):
    class HuggingEngine(Repeating):
        pass

    HuggingEngine.__module__ = "kani.engines.huggingface"
    engine = HuggingEngine()
    with pytest.raises(ConfigError, match=words):
        Asked.of(given, None).hyperparams(engine, family_of(engine), 100)


async def test_an_engine_that_cannot_be_made_is_told():
    def broken():
        raise ValueError("no key")

    engine = KaniEngine(broken)
    with pytest.raises(EngineError, match="broken could not be made: ValueError: no key"):
        await engine.load()
    await engine.close()
    other = KaniEngine(lambda: 3, name="three")
    with pytest.raises(ConfigError, match="three made a int"):
        await other.load()
    await other.close()
    with pytest.raises(ConfigError, match="int is no engine of kani"):
        KaniEngine(3)


def test_without_kani_the_line_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "kani.engines.base", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        KaniEngine(Repeating())
