"""Engines of the `kani` package as ours, and ours given to kani."""

from kani_nb.engines.kani_adapter.engine import KaniEngine
from kani_nb.engines.kani_adapter.given import as_kani_engine

__all__ = ["KaniEngine", "as_kani_engine"]
