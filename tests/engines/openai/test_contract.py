"""The contract, against the stand-in: as a server that counts, and as one of which nothing is known."""

from __future__ import annotations

from typing import ClassVar

import pytest

from kani_nb.engines.openai import OpenAIEngine
from kani_nb.testing import EngineContract
from tests.engines.openai.stand_in import StandIn


class TestAServerThatCounts(EngineContract):
    @pytest.fixture(autouse=True)
    def server(self):
        with StandIn(pause=0.002) as self.stand_in:
            yield

    def make_engine(self):
        return OpenAIEngine(api_base=self.stand_in.base)


class TestAServerOfWhichNothingIsKnown(EngineContract):
    counts_exactly: ClassVar = False

    @pytest.fixture(autouse=True)
    def server(self):
        with StandIn(owner="somebody", pause=0.002) as self.stand_in:
            yield

    def make_engine(self):
        return OpenAIEngine(api_base=self.stand_in.base)
