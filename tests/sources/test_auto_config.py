"""`%load_engine auto` on this machine: caches and the network decide with it."""

from __future__ import annotations

import threading

import pytest

from kani_nb.auto_choice import auto_config
from kani_nb.config import parse_config
from kani_nb.engines.auto_models import AUTO_MODELS
from kani_nb.engines.sources import prefetch
from kani_nb.errors import ConfigError, ModelUnavailableError
from kani_nb.planning import plan_model
from tests.sources.hub_stand_in import HubStandIn, Repo
from tests.sources.tiny import model_files

#: Room for 360 million parameters in 8 bits, and for no more.
SMALL = parse_config("auto --device cpu --max-memory cpu=575MiB --max-new-tokens 7")


@pytest.fixture
def full_hub(hub: HubStandIn) -> HubStandIn:
    """A Hub that has every model of the list."""
    for model in AUTO_MODELS:
        hub.repos[model.alias.repo] = Repo(model_files())
    return hub


def test_the_hub_is_asked_whether_it_has_the_choice(full_hub: HubStandIn) -> None:
    choice = auto_config(SMALL)
    assert choice.config.model == "smollm2-360m"
    assert choice.config.generation.max_new_tokens == 7
    assert "is a download of 72" in choice.why
    assert {seen.path for seen in full_hub.seen} == {
        "/api/models/HuggingFaceTB/SmolLM2-360M-Instruct",
        "/HuggingFaceTB/SmolLM2-360M-Instruct/resolve/c0ffee0000000000000000000000000000000000/config.json",
    }


def test_where_the_hub_does_not_answer_the_packaged_model_is_taken_and_that_is_said() -> None:
    choice = auto_config(SMALL)
    assert choice.config.model == "smollm2"
    assert "comes from the package index (93 MB)" in choice.why
    assert "The next larger, smollm2-360m, is not on this disk, and the Hub cannot be asked." in choice.why
    assert "The Hub could not be asked: " in choice.why


def test_what_is_on_this_disk_needs_no_hub(full_hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    prefetch("smollm2-360m")
    asked = len(full_hub.seen)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    choice = auto_config(SMALL)
    assert choice.config.model == "smollm2-360m"
    assert "is on this disk" in choice.why
    assert len(full_hub.seen) == asked


def test_it_ends_when_it_is_asked_to(full_hub: HubStandIn) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(ModelUnavailableError, match="interrupted"):
        auto_config(SMALL, cancelled=cancelled)
    assert full_hub.seen == []


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="cuda:77"):
        auto_config(parse_config("auto --device cuda:77"))


def test_a_model_of_the_list_is_planned_from_its_shipped_sizes_where_the_hub_does_not_answer() -> None:
    plan = plan_model("qwen3-4b", cards="T4", context=1024)
    assert plan.parameters == 4_022_468_096
    assert any("from the sizes that ship with kani_nb" in note for note in plan.notes)
    with pytest.raises(ModelUnavailableError):
        plan_model("qwen3-8b", cards="T4")
    with pytest.raises(ModelUnavailableError):
        plan_model("qwen3-4b", cards="T4", revision="v1")
