"""A loaded engine."""

import pytest

from tests.engines.asking import engine_of


@pytest.fixture
async def engine(tiny_model):
    engine = engine_of(tiny_model)
    await engine.load()
    yield engine
    await engine.close()
