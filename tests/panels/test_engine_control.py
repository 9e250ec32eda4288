"""The panel's buttons on real models: planned, loaded, given up and freed, with everything that is said on the way."""

import json
import threading
import time
from types import SimpleNamespace

import pytest

from kani_nb.config import EngineConfig
from kani_nb.engines.base import BaseEngine, LoadProgress
from kani_nb.notebook.panels.engine_control import EngineControl


class Screen:
    """Keeps every view."""

    def __init__(self):
        self.views = []
        self._changed = threading.Condition()

    def __call__(self, view):
        with self._changed:
            self.views.append(view)
            self._changed.notify_all()

    @property
    def now(self):
        return self.views[-1]

    def wait_for(self, claim, timeout_s=60):
        with self._changed:
            assert self._changed.wait_for(lambda: self.views and claim(self.views[-1]), timeout_s), self.views[-1]
            return self.views[-1]


@pytest.fixture
def screen():
    return Screen()


@pytest.fixture
def shell():
    return SimpleNamespace(user_ns={})


@pytest.fixture
def control(clean_runtime, screen, tiny_model, shell):
    made = EngineControl(clean_runtime, screen, EngineConfig(str(tiny_model), dtype="float32", threads=1), shell)
    assert made.wait()
    yield made
    made.close()


def changed(control, **changes):
    control.set_values({**control.values, **changes})
    assert control.wait()


def test_the_plan_follows_each_change_and_nothing_is_loaded(control, screen, clean_runtime):
    first = screen.now
    assert first["plan"]["fits"] is True
    assert "with a context of 512 tokens" in first["plan"]["verdict"]
    assert first["line"].endswith("--dtype=float32 --threads=1")
    changed(control, scheme="cpu-int8")
    held = [view["plan"]["devices"][-1]["weights"] for view in (first, screen.now)]
    assert held[1] < 0.6 * held[0]
    assert "--quant=cpu-int8" in screen.now["line"]
    changed(control, max_memory="cpu=0.1MiB")
    plan = screen.now["plan"]
    assert (plan["fits"], plan["devices"][-1]["is_over"]) == (False, True)
    assert "too much" in plan["devices"][-1]["words"]
    assert clean_runtime.engines == {}


def test_a_variable_that_keeps_a_freed_model_is_named(control, screen, clean_runtime, shell):
    assert control.load()
    screen.wait_for(lambda view: view["busy"] is None and view["said"])
    shell.user_ns["mine"] = clean_runtime.engine.model
    assert control.unload(clean_runtime.engine_name)
    said = screen.wait_for(lambda view: "unloaded" in view["said"].get("text", ""))["said"]
    assert "held by the variable mine" in said["remarks"]
    assert "(del mine)" in said["remarks"]
    shell.user_ns.clear()


def test_a_load_shows_its_stages_and_what_it_took_and_an_unload_what_it_gave_back(control, screen, clean_runtime):
    assert control.load()
    assert not control.load(), "one at a time"
    done = screen.wait_for(lambda view: view["busy"] is None and view["said"])
    assert done["said"]["kind"] == "done"
    assert "float32" in done["said"]["text"]
    assert " loaded in " in done["said"]["text"]
    (engine,) = done["engines"]
    assert engine["is_current"]
    assert clean_runtime.config_of(engine["name"]) == control.form.config
    assert control.unload(engine["name"])
    done = screen.wait_for(lambda view: view["busy"] is None and "unloaded" in view["said"].get("text", ""))
    assert "freed" in done["said"]["text"]
    assert done["engines"] == []
    assert clean_runtime.engines == {}


def test_a_load_that_fails_says_why_and_leaves_the_engine_that_was_there(control, screen, clean_runtime, tmp_path):
    control.load()
    screen.wait_for(lambda view: view["engines"])
    changed(control, model=str(tmp_path / "nothing"))
    assert "nothing" in screen.now["errors"]["model"]
    control.load()
    done = screen.wait_for(lambda view: view["busy"] is None and view["said"].get("kind") == "error")
    assert done["said"]["text"] == done["errors"]["model"]
    assert len(clean_runtime.engines) == 1


class SlowEngine(BaseEngine):
    """Takes as long to load as it is let."""

    max_context_size = 100
    may_end = threading.Event()

    def __init__(self, model=""):
        self.is_ready = False

    def prompt_len(self, messages, functions=None, **kwargs):
        return 1

    @property
    def is_loaded(self):
        return self.is_ready

    async def load(self, progress=None):
        import asyncio

        progress(LoadProgress("reading", "the first half", 0.5))
        while not self.may_end.is_set():
            await asyncio.sleep(0.01)
        self.is_ready = True


@pytest.fixture
def slow(monkeypatch):
    from kani_nb.engines import registry

    monkeypatch.setitem(registry._OURS, "slow", f"{__name__}:SlowEngine")
    SlowEngine.may_end.clear()
    return SlowEngine


def test_a_load_can_be_given_up(control, screen, clean_runtime, slow):
    changed(control, model="slow:", dtype=None, threads=None)
    control.load()
    view = screen.wait_for(lambda view: view["busy"] and view["busy"]["fraction"] == 0.5)
    assert view["busy"]["stage"] == "reading the first half"
    assert control.cancel()
    done = screen.wait_for(lambda view: view["busy"] is None)
    assert done["said"]["text"].startswith("Cancelled: slow: was not loaded")
    assert "no engine is loaded" in done["said"]["text"]
    assert clean_runtime.engines == {}
    assert not control.cancel()


def test_a_cancelled_load_says_what_was_freed_for_it_and_how_it_comes_back(control, screen, clean_runtime, slow):
    control.load()
    screen.wait_for(lambda view: view["engines"] and view["busy"] is None)
    (name,), line = clean_runtime.engines, screen.now["line"]
    assert screen.now["frees"] == "", "the same again frees nothing"
    changed(control, model="slow:", dtype=None, threads=None)
    assert screen.now["frees"] == f"Load frees {name} first."
    control.load()
    screen.wait_for(lambda view: view["busy"] and view["busy"]["fraction"] == 0.5)
    control.cancel()
    done = screen.wait_for(lambda view: view["busy"] is None)
    assert f"{name} was freed for it: {line} brings it back" in done["said"]["text"]


class Stubborn(BaseEngine):
    """Cannot be closed."""

    max_context_size = 100

    def prompt_len(self, messages, functions=None, **kwargs):
        return 1

    is_stuck = True

    async def close(self):
        if self.is_stuck:
            raise RuntimeError("stuck, with hf_abcdefghijklmnopqrstuv")


def test_an_unload_that_fails_says_so_and_leaves_the_panel_usable(control, screen, clean_runtime):
    engine = Stubborn()
    clean_runtime.use(engine, name="bad")
    assert control.unload("bad")
    said = screen.wait_for(lambda view: view["busy"] is None and view["said"])["said"]
    assert (said["text"], said["kind"]) == ("RuntimeError: stuck, with [token]", "error")
    assert control.load()
    assert screen.wait_for(lambda view: view["busy"] is None and view["said"])["said"]["kind"] == "done"
    engine.is_stuck = False


@pytest.mark.parametrize(
    "content",
    ["5", "null", '{"model_type": ["llama"]}', '{"model_type": "llama", "num_attention_heads": 0}', "{"],
)
def test_a_configuration_of_any_shape_is_told_at_the_model(control, screen, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    changed(control, model=str(tmp_path))
    view = screen.now
    assert view["model"]["is_reading"] is False
    assert list(view["errors"]) == ["model"]
    assert view["errors"]["model"].startswith(("the configuration of", "model: no plan", str(tmp_path), "the shape of"))


@pytest.mark.parametrize("model", ["~nobody_is_called_so/model", "./" + "x" * 400, "a\0b"])
def test_what_can_be_no_path_is_told_at_the_model(control, screen, model):
    changed(control, model=model)
    assert "there is no model" in screen.now["errors"]["model"]


def test_a_model_that_was_missing_is_looked_for_again_when_asked(control, screen, tmp_path, tiny_model):
    folder = tmp_path / "later"
    changed(control, model=str(folder))
    assert "model" in screen.now["errors"]
    folder.symlink_to(tiny_model)
    control.check_again()
    assert control.wait()
    assert screen.now["errors"] == {}
    assert screen.now["plan"]["fits"]


def test_a_setting_of_the_scheme_before_goes_with_it(control, screen):
    changed(control, scheme="cpu-int4", group_size="64")
    assert "--group-size=64" in screen.now["line"]
    changed(control, scheme="nf4")
    assert screen.now["errors"] == {}
    assert control.values["group_size"] is None
    changed(control, group_size="64")
    assert "group_size" in screen.now["errors"], "what is set on purpose is told"


@pytest.mark.parametrize("name", ["model", "revision", "stop_strings"])
def test_a_token_is_refused_and_not_kept(control, screen, name):
    token = "hf_abcdefghijklmnopqrstuv"
    changed(control, **{name: [token] if name == "stop_strings" else token})
    assert "does not belong into a panel" in screen.now["errors"][name]
    assert token not in json.dumps([control.values, screen.now])
    control.set_values(control.values)  # as a front end answers
    assert "does not belong into a panel" in screen.now["errors"][name]
    changed(control, model="echo")
    assert screen.now["errors"] == {}


def test_what_went_wrong_is_forgotten_when_the_controls_change(control, screen, tmp_path):
    changed(control, model=str(tmp_path / "nothing"))
    control.load()
    screen.wait_for(lambda view: view["said"].get("kind") == "error")
    changed(control, threads="2")
    assert screen.now["said"] == {}


def test_what_others_load_and_free_is_shown(control, screen, clean_runtime):
    clean_runtime.load_sync(EngineConfig("echo"))
    assert [each["name"] for each in screen.wait_for(lambda view: view["engines"])["engines"]] == ["echo"]
    clean_runtime.unload_sync("echo")
    screen.wait_for(lambda view: not view["engines"])


def test_the_memory_of_the_engine_that_will_be_replaced_counts_as_free(control, screen, clean_runtime, tiny_model):
    control.load()
    screen.wait_for(lambda view: view["engines"] and view["busy"] is None)
    given_back = clean_runtime.given_back()
    memory = next(iter(clean_runtime.engines.values())).memory()
    assert given_back == {"cpu": memory.weight_bytes + memory.kv_bytes}


def test_nothing_is_shown_after_the_panel_is_closed(control, screen, clean_runtime):
    control.close()
    count = len(screen.views)
    clean_runtime.load_sync(EngineConfig("echo"))
    control.refresh()
    time.sleep(0.05)
    assert len(screen.views) == count
