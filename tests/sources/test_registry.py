"""Which engine runs a name, and engines of other packages, good and broken."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from kani_nb.config import EngineConfig
from kani_nb.engines.base import BaseEngine
from kani_nb.engines.registry import _OURS, GROUP, create_engine, engine_class, engine_names, parse_spec
from kani_nb.errors import ConfigError, EngineError, MissingDependencyError

ENGINES = """
from kani_nb.engines.base import BaseEngine, Completion
from kani_nb.messages import ChatMessage

class Parrot(BaseEngine):
    max_context_size = 64
    def __init__(self, model="grey"):
        self.model = model
    def prompt_len(self, messages, functions=None, **kwargs):
        return len(messages)
    async def predict(self, messages, functions=None, **hyperparams):
        return Completion(ChatMessage.assistant("squawk"))

class Configured(Parrot):
    @classmethod
    def from_config(cls, config):
        return cls(f"{config.model} {config.max_context_size}")

not_a_class = 3

def makes_nothing(model=None):
    return None
"""


@pytest.fixture
def neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages really installed into a folder of their own: one good, one whose module cannot be imported."""
    target = tmp_path / "site"
    for name, modules, points in (
        (
            "parrots",
            {"parrots.py": ENGINES},
            {"parrot": "parrots:Parrot", "configured": "parrots:Configured", "number": "parrots:not_a_class",
             "echo": "parrots:Parrot"},
        ),
        (
            "broken",
            {"broken.py": "import a_library_that_is_not_there", "failing.py": "raise ValueError('no licence key')"},
            {"broken": "broken:Engine", "failing": "failing:Engine", "absent": "parrots:Nowhere"},
        ),
    ):  # fmt: skip
        source = tmp_path / name
        source.mkdir()
        for path, text in modules.items():
            (source / path).write_text(text)
        wanted = "\n".join(f'{key} = "{value}"' for key, value in points.items())
        (source / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
            f'[project]\nname = "kani-nb-{name}"\nversion = "1"\n'
            f'[project.entry-points."kani_nb.engines"]\n{wanted}\n'
            f"[tool.hatch.build.targets.wheel]\ninclude = {list(modules)}\n"
        )
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index",
             "--target", str(target), str(source)],
            check=True,
        )  # fmt: skip
    monkeypatch.syspath_prepend(str(target))
    importlib.invalidate_caches()
    return target


def test_engines_of_other_packages_are_found_and_broken_ones_harm_nobody(neighbours: Path) -> None:
    assert {"echo", "hf", "parrot", "broken", "failing"} <= set(engine_names())
    assert "broken" not in sys.modules
    assert parse_spec("parrot:green") == ("parrot", "green")
    engine = create_engine(EngineConfig("parrot:green"))
    assert type(engine).__name__ == "Parrot"
    assert engine.model == "green"
    assert create_engine(EngineConfig("parrot")).model == "grey"
    configured = create_engine(EngineConfig("configured:x", max_context_size=7))
    assert configured.model == "configured:x 7"
    assert engine_class("echo").__module__ == "kani_nb.engines.echo", "nobody takes over a name of ours"

    with pytest.raises(MissingDependencyError, match="a_library_that_is_not_there") as caught:
        engine_class("broken")
    assert "kani-nb-broken" in caught.value.fix
    with pytest.raises(EngineError, match="ValueError: no licence key"):
        create_engine(EngineConfig("failing:x"))
    with pytest.raises(EngineError, match="Nowhere"):
        engine_class("absent")
    with pytest.raises(ConfigError, match="not a subclass of BaseEngine"):
        engine_class("number")
    with pytest.raises(ConfigError, match="did you mean parrot"):
        parse_spec("parot:green")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("smollm2", ("hf", "smollm2")),
        (" SmolLM2 ", ("hf", "SmolLM2")),
        ("org/model", ("hf", "org/model")),
        ("./folder", ("hf", "./folder")),
        ("C:\\models\\x", ("hf", "C:\\models\\x")),
        ("ctransformers:org/model", ("ctransformers", "org/model")),
        ("hf:org/model", ("hf", "org/model")),
        ("HF:org/model", ("hf", "org/model")),
        ("echo", ("echo", "")),
        ("echo:delay=0.1", ("echo", "delay=0.1")),
        ("http://localhost:8000/v1", ("openai", "http://localhost:8000/v1")),
        ("https://host/v1#m", ("openai", "https://host/v1#m")),
        ("openai:gpt-5", ("openai", "openai:gpt-5")),
        ("vllm:org/model", ("openai", "vllm:org/model")),
        ("1.5-mini/model", ("hf", "1.5-mini/model")),
        ("kani:anthropic", ("kani", "anthropic")),
        ("llamacpp:x.gguf", ("llamacpp", "x.gguf")),
    ],
)
def test_a_name_is_routed_to_its_engine(model: str, expected: tuple[str, str]) -> None:
    assert parse_spec(model) == expected


@pytest.mark.parametrize(
    ("model", "meant"),
    [
        ("localhost:8765/v1", "http://localhost:8765/v1"),
        ("localhost:8765", "http://localhost:8765/v1"),
        ("localhost/v1", "http://localhost/v1"),
        ("127.0.0.1:8765", "http://127.0.0.1:8765/v1"),
        ("127.0.0.1:8765/v1#m", "http://127.0.0.1:8765/v1#m"),
        ("[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("gpu-box.example.org:8000", "http://gpu-box.example.org:8000/v1"),
        ("ollama:llama3", "http://127.0.0.1:11434/v1#llama3"),
        ("ollama:llama3:8b", "http://127.0.0.1:11434/v1#llama3:8b"),
        ("Ollama:http://other:11434/v1#m", "http://other:11434/v1#m"),
    ],
)
def test_a_server_that_is_named_otherwise_is_offered_by_its_address(model: str, meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(model)
    assert caught.value.fix.rstrip("?").endswith(f" {meant}")


def test_an_unknown_engine_offers_near_misses() -> None:
    with pytest.raises(ConfigError, match="did you mean echo"):
        parse_spec("ecko:x")
    with pytest.raises(ConfigError, match="there is no engine 'nothing'"):
        engine_class("nothing")


def test_a_gguf_file_goes_to_llama_cpp_where_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "llama_cpp" else found(name))
    assert parse_spec("model.gguf") == ("hf", "model.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found("json") if name == "llama_cpp" else found(name))
    assert parse_spec("model.gguf") == ("llamacpp", "model.gguf")


@pytest.mark.parametrize("name", engine_names())
def test_every_registered_engine_is_imported_without_the_library_behind_it(name: str) -> None:
    assert issubclass(engine_class(name), BaseEngine)


def test_ours_are_registered_as_a_strangers_would_be() -> None:
    points = {each.name: each.value for each in entry_points(group=GROUP) if each.value.startswith("kani_nb.")}
    assert points == _OURS


def test_echo_is_created_from_its_configuration() -> None:
    engine = create_engine(EngineConfig("echo:delay=0.25"))
    assert engine.delay == 0.25  # type: ignore[attr-defined]
