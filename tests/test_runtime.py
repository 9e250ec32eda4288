"""The Runtime: which engine answers, what is freed for what, and which conversation goes on."""

import asyncio

import pytest

from kani_nb import BaseEngine, ChatMessage, Completion, EchoEngine, EngineConfig, HuggingEngine
from kani_nb._runtime import Runtime
from kani_nb.config import parse_config
from kani_nb.errors import ConfigError, ConversationError, KaniNbError, NoEngineError


@pytest.fixture
def rt(tmp_path):
    runtime = Runtime(tmp_path / "c.db")
    yield runtime
    runtime.close()


def config(folder, **options):
    return EngineConfig(str(folder), dtype="float32", threads=1, **options)


def test_what_a_cell_shows_is_closed_when_the_cell_runs_again_and_not_before(rt):
    class Panel:
        is_closed = False

        def close(self):
            self.is_closed = True

    first, second, third, elsewhere = (Panel() for _ in range(4))
    rt.keep_shown("cell 1", first, "run 1")
    rt.keep_shown("cell 1", second, "run 1")
    rt.keep_shown("cell 2", elsewhere, "run 2")
    assert not first.is_closed
    rt.keep_shown("cell 1", third, "run 3")
    assert [each.is_closed for each in (first, second, third, elsewhere)] == [True, True, False, False]
    rt.close_shown()
    assert third.is_closed
    assert elsewhere.is_closed
    assert rt.shown == {}


def test_an_equal_configuration_is_loaded_once(rt, tiny_model):
    first = rt.load_sync(config(tiny_model))
    again = rt.load_sync(config(tiny_model))
    assert again.engine is first.engine
    assert (first.reused, again.reused) == (False, True)


def test_another_engine_replaces_the_one_without_a_name_and_stands_beside_the_named(rt, tiny_model, sliding_model):
    named = rt.load_sync(config(tiny_model), name="kept")
    first = rt.load_sync(config(tiny_model, max_context_size=100))
    second = rt.load_sync(config(sliding_model))
    assert second.replaced == first.name
    assert not first.engine.is_loaded
    assert named.engine.is_loaded
    assert set(rt.engines) == {"kept", second.name}
    third = rt.load_sync(config(tiny_model, max_context_size=50))
    assert set(rt.engines) == {"kept", third.name}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_context_size": 999_999},
        {"device": "cuda:7"},
        {"device": "nonsense"},
        {"device_map": "{bad"},
        {"device": "cpu", "device_map": "auto"},
    ],
)
def test_a_configuration_that_cannot_be_loaded_leaves_what_is_loaded(rt, tiny_model, wrong):
    first = rt.load_sync(config(tiny_model))
    with pytest.raises(KaniNbError):
        rt.load_sync(config(tiny_model, **wrong))
    assert rt.engine is first.engine
    assert rt.engine.is_loaded


def test_when_the_weights_fail_the_error_says_how_to_bring_back_what_was_freed(rt, tiny_model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = load_file(broken / "model.safetensors")
    weights.pop(next(name for name in weights if ".layers.0." in name))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    rt.load_sync(config(tiny_model))
    with pytest.raises(KaniNbError) as caught:
        rt.load_sync(config(broken))
    line = str(caught.value).split("was freed for it: ")[1].split(" brings it back")[0]
    assert parse_config(line) == config(tiny_model)
    assert rt.engine is None


def test_unloading_frees_and_the_engine_before_becomes_current(rt, tiny_model):
    rt.load_sync(EngineConfig("echo"), name="first")
    loaded = rt.load_sync(config(tiny_model))
    report = rt.unload_sync()
    assert report.name == loaded.name
    assert report.weight_bytes > 0
    assert not loaded.engine.is_loaded
    assert rt.engine_name == "first"
    with pytest.raises(NoEngineError, match="did you mean first"):
        rt.unload_sync("frist")


def test_any_engine_of_ones_own_can_answer(rt, tiny_model):
    class Shouting(BaseEngine):
        max_context_size = 1000

        def message_len(self, message):
            return len(message.text)

        async def predict(self, messages, functions=None, **hyperparams):
            return Completion(ChatMessage.assistant(messages[-1].text.upper()))

    rt.use(Shouting(), name="mine")
    assert rt.chat.ask_sync("hello").text == "HELLO"
    rt.load_sync(EngineConfig("echo"))
    again = rt.load_sync(EngineConfig("mine"))
    assert again.reused
    assert rt.engine is again.engine is rt.engines["mine"]
    rt.use(Shouting(), name="tiny")
    assert rt.load_sync(config(tiny_model, max_context_size=64), name="other").name == "other"
    assert isinstance(rt.use("tiny"), Shouting)
    with pytest.raises(ConfigError, match="3 is not an engine"):
        rt.use(3)


def test_an_engine_of_ones_own_is_not_freed_for_a_model_of_the_same_name(rt):
    own = EchoEngine()
    rt.use(own, name="echo")
    loaded = rt.load_sync(EngineConfig("echo:delay=0.01"))
    assert loaded.name == "echo-2"
    assert rt.engines["echo"] is own


async def test_two_engines_on_one_device_take_turns(rt, tiny_model, sliding_model):
    first = (await rt.load(config(tiny_model), name="a")).engine
    second = (await rt.load(config(sliding_model), name="b")).engine
    assert isinstance(first, HuggingEngine)
    assert first.slot is second.slot


def test_resuming_goes_on_with_the_latest_conversation_and_again_with_the_same(tmp_path):
    for name in ("older", "newer"):
        with_chat = Runtime(tmp_path / "c.db")
        with_chat.use(EchoEngine())
        with_chat.new_chat(name).ask_sync(f"hello {name}")
        with_chat.close()
    rt = Runtime(tmp_path / "c.db")
    rt.use(EchoEngine())
    assert [rt.resume().conversation.name for _ in range(3)] == ["newer"] * 3
    rt.chat.ask_sync("more")
    assert [message.text for message in rt.resume().history] == ["hello newer", "hello newer", "more", "more"]
    rt.close()


def test_a_conversation_of_another_notebook_is_found_by_its_name(tmp_path):
    rt = Runtime(tmp_path / "c.db")
    rt.notebook = "a.ipynb"
    rt.use(EchoEngine())
    rt.new_chat("mine").ask_sync("hello")
    rt.close()
    rt.notebook = "b.ipynb"
    assert rt.resume("mine").history[0].text == "hello"
    with pytest.raises(ConversationError, match="no conversation 'other'"):
        rt.open_chat("other")
    rt.close()


def test_opening_again_shows_what_another_kernel_has_added(tmp_path):
    first, second = Runtime(tmp_path / "c.db"), Runtime(tmp_path / "c.db")
    for runtime in (first, second):
        runtime.use(EchoEngine())
    first.new_chat("shared").ask_sync("one")
    second.open_chat("shared").ask_sync("two")
    first.chat.ask_sync("three")
    assert len(first.chat.conversation.turns) == 2
    assert len(first.open_chat("shared").conversation.branches()) == 2
    for runtime in (first, second):
        runtime.close()


def test_a_store_that_never_opened_is_left_when_its_place_changes(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("KANI_NB_HOME", str(blocked))
    rt = Runtime()
    rt.use(EchoEngine())
    with pytest.raises(KaniNbError, match="KANI_NB_HOME"):
        _ = rt.chat
    monkeypatch.setenv("KANI_NB_HOME", str(tmp_path / "good"))
    assert rt.chat.ask_sync("hello").text == "hello"
    assert (tmp_path / "good").exists()
    rt.close()


async def test_ask_can_be_awaited_on_any_loop_and_cancelled_there(rt):
    rt.use(EchoEngine(delay=0.02))
    assert (await rt.chat.ask("hello there")).text == "hello there"
    task = asyncio.create_task(rt.chat.ask("one two three " * 50))
    await asyncio.sleep(0.3)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while rt.chat.is_busy:
        await asyncio.sleep(0.01)
    assert rt.chat.turns[-1].interrupted


def test_whoever_watches_is_told_of_each_change_and_harms_nothing(rt, caplog):
    seen = []

    def fail():
        raise RuntimeError("a watcher's own")

    rt.watch(fail)
    undo = rt.watch(lambda: seen.append(rt.engine_name))
    rt.load_sync(EngineConfig("echo"))
    rt.load_sync(EngineConfig("echo:delay=0.01"), name="second")
    rt.use("echo")
    rt.unload_sync("second")
    assert seen == ["echo", "second", "echo", "echo"]
    assert [record.message for record in caplog.records] == ["a watcher failed"] * 4
    undo()
    undo()
    rt.unload_sync("echo")
    assert len(seen) == 4


def test_what_the_next_load_gives_back_is_known(rt, tiny_model):
    assert rt.given_back() == {}
    rt.load_sync(EngineConfig(str(tiny_model)), name="kept")
    assert rt.given_back() == {}, "an engine with a name of its own stays"
    loaded = rt.load_sync(EngineConfig(str(tiny_model), dtype="float32"))
    memory = loaded.engine.memory()
    assert rt.given_back() == {"cpu": memory.weight_bytes + memory.kv_bytes}
