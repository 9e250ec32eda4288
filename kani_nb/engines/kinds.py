"""What each engine is for, what it can do and how that was tested: one record per engine, and their table.

The record stands on the engine's class, so that the table in the README and `%engine kinds` cannot name an engine that
is not there, or leave one out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from kani_nb.engines.base import BaseEngine


class Ability(StrEnum):
    """What some engines can and others cannot."""

    TOOLS = "tools"
    REASONING = "reasoning"
    SCHEMAS = "schemas"
    IMAGES = "images"
    AUDIO = "audio"
    LOGPROBS = "logprobs"
    REUSE = "reuse"
    MEMORY = "memory plan"


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One engine, for people who choose.

    Attributes:
        runs: which models.
        example: what stands behind `%load_engine`.
        install: beside `pip install kani-nb`; empty where nothing is needed.
        can: what it can do beside streaming, stopping and counting, which all do.
        tested: on what its contract and its abilities were run.
    """

    runs: str
    example: str
    install: str
    can: tuple[Ability, ...]
    tested: str


def kinds() -> Iterator[tuple[str, type[BaseEngine], EngineKind]]:
    """Each of our engines with its registered name; imports the classes, and no library behind them."""
    from kani_nb.engines.registry import engine_class, our_engine_names

    for name in our_engine_names():
        found = engine_class(name)
        if found.kind is not None:
            yield name, found, found.kind


def markdown_table() -> str:
    """The table of the README."""
    lines = ["| engine | runs | to load | needs | can | tested on |", "|---|---|---|---|---|---|"]
    for _, found, kind in kinds():
        needs = f"`{kind.install}`" if kind.install else "nothing more"
        can = ", ".join(kind.can) or "text"
        lines.append(f"| `{found.__name__}` | {kind.runs} | `{kind.example}` | {needs} | {can} | {kind.tested} |")
    return "\n".join(lines)
